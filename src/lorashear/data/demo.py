"""The built-in demo: a small trained model, and text that every CPython installation carries.

Nothing is downloaded and no text is shipped: the four sources are read from the source files of the running Python's
own standard library, which are parsed and never imported. Whole modules are held out by a hash of their name, so the
same modules are held out under every version of Python; `scripts/train_demo_model.py` trains on the training side only.
"""

from __future__ import annotations

import ast
import hashlib
import re
import sysconfig
import textwrap
import tokenize
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache, cached_property
from importlib.resources import files
from pathlib import Path
from typing import Literal

from lorashear.errors import DataError

Row = dict[str, str]
Side = Literal["train", "valid"]
Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef

HELD_OUT = 0.08
"""Share of the modules held out."""
HELD_OUT_TOPICS = 0.12
"""Share of the reference's topics held out: they are few and short."""
PASSAGE = 2000
"""Characters in a passage, at most."""
FILE = 150_000
"""Bytes of a source file from which on it is left out."""
QUOTE = 60
"""Characters from which on a repeated paragraph counts as a quotation; shorter ones are idiom."""
MODULE_CODE = 24_000
"""Characters of code taken from one module, at most: no module may outweigh the others."""

_SKIPPED_FOLDERS = frozenset(
    (
        *("__pycache__", "site-packages", "dist-packages", "lib-dynload"),
        *("test", "tests", "idle_test", "idlelib", "turtledemo"),
        *("encodings", "pydoc_data"),  # tables, and the reference, which is a source of its own
        *("curses", "distutils", "ensurepip", "lib2to3", "msilib", "tkinter"),  # not in every installation
    )
)
_SKIPPED_MODULES = frozenset({"html.entities", "stringprep", "this", "antigravity", "sitecustomize", "usercustomize"})
_TOPICS = "pydoc_data/topics.py"
_BLOCKS = ("body", "orelse", "finalbody", "handlers", "cases")
_LETTERS = re.compile(r"[a-zA-Z\s]+")
_ANSWER = 400
_QUESTION_CODE = 600
_FUNCTION_QUESTIONS = (
    "What does `{}` do?",
    "What is `{}` for?",
    "Describe the function `{}`.",
    "Explain in a sentence what `{}` does.",
)
_CLASS_QUESTIONS = ("What is the class `{}`?", "What is `{}` for?", "Describe the class `{}`.")
_CODE_QUESTIONS = ("What does this function do?", "Write a docstring for this function.")


@dataclass(frozen=True)
class DemoSource:
    """One source of text, split into a training and a held-out side that share no module."""

    name: str
    kind: Literal["text", "instruct"]
    train: list[Row]
    """Rows of kind text are `{"text"}`, rows of kind instruct are `{"instruction", "input", "output"}`."""
    valid: list[Row]


@dataclass(frozen=True)
class Module:
    """One module of the standard library: its dotted name and its source."""

    name: str
    source: str
    tree: ast.Module

    @cached_property
    def lines(self) -> list[str]:
        """The source by lines."""
        return self.source.split("\n")

    @cached_property
    def docstring_lines(self) -> set[int]:
        """Indices of the lines that hold docstrings; a docstring that is a body's only statement stays."""
        return _docstring_lines(self.tree)


@dataclass(frozen=True)
class Documented:
    """A function, class or method with a docstring."""

    name: str
    """Dotted, from the module on: `json.dumps`."""
    node: Definition
    doc: str

    @property
    def heading(self) -> str:
        """How `help()` would head it: with its parameters."""
        if isinstance(self.node, ast.ClassDef):
            return f"class {self.name}"
        return f"{self.name}({ast.unparse(self.node.args)})"


def demo_model_path() -> Path:
    """Folder of the demo model: config, weights, tokenizer, and `training.json` on how it was made."""
    return Path(str(files("lorashear.data"))) / "demo_model"


@cache
def demo_sources() -> list[DemoSource]:
    """The demo's four sources, read from the running Python's standard library in a few seconds.

    `reference` is the language reference that `help()` shows, `docs` the docstrings of modules, classes and functions,
    `code` their source without docstrings, `questions` questions about functions and classes, answered by the first
    paragraph of the docstring. Every row lies on one side only, and no paragraph of a held-out row is trained on.

    Raises:
        DataError: where the standard library comes without its source files.
    """
    docs: list[tuple[str, Row]] = []
    code: list[tuple[str, Row]] = []
    questions: list[tuple[str, Row]] = []
    for module in read_modules():
        docs += ((module.name, row) for row in _docs(module))
        code += ((module.name, row) for row in _code(module))
        questions += ((module.name, row) for row in _questions(module))
    return [
        DemoSource("reference", "text", *_split(_reference(), HELD_OUT_TOPICS)),
        DemoSource("docs", "text", *_split(docs, HELD_OUT)),
        DemoSource("code", "text", *_split(code, HELD_OUT)),
        DemoSource("questions", "instruct", *_split(questions, HELD_OUT)),
    ]


def side_of(name: str, held_out: float) -> Side:
    """Which side a module or topic lies on; depends on nothing but its name."""
    return "valid" if _hash(name) % 1000 < held_out * 1000 else "train"


def read_modules() -> Iterator[Module]:
    """The modules the text is taken from, in order of their names; one at a time, as their trees are large."""
    root = Path(sysconfig.get_paths()["stdlib"])
    found = 0
    for name, path in sorted(_module_files(root)):
        source = _read(path)
        if source is not None and (tree := _parse(source)) is not None:
            found += 1
            yield Module(name, source, tree)
    if found < 100:
        raise DataError(
            f"{root} holds {found} readable source files of Python's standard library; the demo's text is taken"
            " from them: use a Python installed with its sources, or give data of your own with --data"
        )


def _module_files(root: Path) -> Iterator[tuple[str, Path]]:
    for path in root.rglob("*.py"):
        parts = path.relative_to(root).with_suffix("").parts
        if _SKIPPED_FOLDERS.intersection(parts) or any(not part.isidentifier() for part in parts):
            continue
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        skipped = name in _SKIPPED_MODULES or name.startswith(("_sysconfigdata", "__"))
        if not skipped and path.stat().st_size <= FILE:
            yield name, path


def _read(path: Path) -> str | None:
    try:
        with tokenize.open(path) as file:  # honours a file's own encoding line
            return file.read().expandtabs(4)
    except (SyntaxError, UnicodeDecodeError):  # a stray file that is not Python is no loss
        return None


def _parse(source: str) -> ast.Module | None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about the library's own code, nothing a user could act upon
        try:
            return ast.parse(source)
        except SyntaxError:
            return None


def _reference() -> Iterator[tuple[str, Row]]:
    """Passages of the language reference with the topic they belong to."""
    path = Path(sysconfig.get_paths()["stdlib"]) / _TOPICS
    tree = _parse(_read(path) or "") if path.is_file() else None
    table = next((node.value for node in tree.body if isinstance(node, ast.Assign)), None) if tree else None
    if table is None:
        raise DataError(
            f"{path} does not hold Python's language reference, from which the demo's text is taken: use a Python"
            " installed with its documentation topics, or give data of your own with --data"
        )
    topics: dict[str, str] = ast.literal_eval(table)
    for topic in sorted(topics):
        for passage in _passages(topics[topic]):
            yield topic, {"text": passage}


def _docs(module: Module) -> Iterator[Row]:
    """One passage for the module's docstring, and one or more a class or function, as `help()` would list them."""
    if doc := ast.get_docstring(module.tree):
        yield from ({"text": passage} for passage in _passages(f"{module.name}\n\n{doc}"))
    sections: dict[str, list[str]] = {}
    for item in _documented(module):
        top = item.name.removeprefix(f"{module.name}.").split(".")[0]
        sections.setdefault(top, []).append(f"{item.heading}\n\n{item.doc}")
    for parts in sections.values():
        yield from ({"text": passage} for passage in _passages("\n\n".join(parts)))


def _documented(module: Module) -> Iterator[Documented]:
    """Public functions, classes and their public methods that have a docstring."""
    pending: list[tuple[str, ast.AST]] = [(module.name, node) for node in reversed(module.tree.body)]
    while pending:
        prefix, node = pending.pop()
        if not isinstance(node, Definition) or node.name.startswith("_"):
            continue
        name = f"{prefix}.{node.name}"
        if doc := ast.get_docstring(node):
            yield Documented(name, node, doc)
        if isinstance(node, ast.ClassDef):
            pending.extend((name, child) for child in reversed(node.body))


def _code(module: Module) -> Iterator[Row]:
    size = 0
    for passage in _passages(_excerpt(module)):
        size += len(passage)
        if size > MODULE_CODE:
            return
        yield {"text": passage}


def _docstring_lines(tree: ast.Module) -> set[int]:
    dropped: set[int] = set()
    pending: list[ast.AST] = [tree]
    while pending:
        node = pending.pop()
        for field in _BLOCKS:  # statements only: ast.walk would visit ten times as many nodes
            below = getattr(node, field, ())
            pending.extend(below if isinstance(below, list) else ())
        if not isinstance(node, ast.Module | Definition) or len(node.body) < 2 or ast.get_docstring(node) is None:
            continue
        first, second = node.body[0], node.body[1]
        if second.lineno > (first.end_lineno or first.lineno):
            dropped.update(range(first.lineno - 1, first.end_lineno or first.lineno))
    return dropped


def _excerpt(module: Module, start: int = 0, end: int | None = None) -> str:
    """The lines `start` to `end` without docstrings, and without the blank line that stood under one."""
    numbers = range(start, len(module.lines) if end is None else end)
    kept = (module.lines[at].rstrip() for at in numbers if at not in module.docstring_lines)
    return re.sub(r":\n\n+(?= )", ":\n", textwrap.dedent("\n".join(kept)))


def _questions(module: Module) -> Iterator[Row]:
    if any(part.startswith("_") for part in module.name.split(".")):
        return
    for item in _documented(module):
        answer = " ".join(item.doc.split("\n\n")[0].split())
        if not 20 <= len(answer) <= _ANSWER:
            continue
        is_class = isinstance(item.node, ast.ClassDef)
        asked = _CLASS_QUESTIONS if is_class else _FUNCTION_QUESTIONS
        yield {"instruction": asked[_hash(item.name) % len(asked)].format(item.name), "input": "", "output": answer}
        code = _excerpt(module, item.node.lineno - 1, item.node.end_lineno)
        if not is_class and len(code) <= _QUESTION_CODE:
            yield {"instruction": _CODE_QUESTIONS[_hash(code) % len(_CODE_QUESTIONS)], "input": code, "output": answer}


def _passages(text: str, separators: tuple[str, ...] = ("\n\n\n", "\n\n", "\n")) -> list[str]:
    """Cuts a text at its widest gaps into passages of at most `PASSAGE` characters; leaves out what is not language."""
    if not separators or len(text) <= PASSAGE:
        return [text.strip("\n")] if _is_language(text[:PASSAGE]) else []
    gap, passages, current = separators[0], [], ""
    for piece in text.split(gap):
        if current and len(current) + len(gap) + len(piece) > PASSAGE:
            passages += _passages(current, separators[1:])
            current = piece
        else:
            current = f"{current}{gap}{piece}" if current else piece
    return passages + _passages(current, separators[1:])


def _is_language(text: str) -> bool:
    """False for tables of numbers or escapes and for scraps."""
    return len(text.strip()) >= 40 and len(_LETTERS.sub("", text)) <= 0.4 * len(text)


def _split(rows: Iterable[tuple[str, Row]], held_out: float) -> tuple[list[Row], list[Row]]:
    """Splits rows by the name they come with; what stands on both sides word for word is left out of training.

    Topics and modules quote each other (`compound` repeats the topics `if`, `for` and `try`), so a split by name alone
    would leak.
    """
    sides: dict[Side, list[Row]] = {"train": [], "valid": []}
    for name, row in rows:
        sides[side_of(name, held_out)].append(row)
    valid = _unique(sides["valid"], set())
    return _unique(sides["train"], {part for row in valid for part in _quotes(row)}), valid


def _unique(rows: list[Row], seen: set[str]) -> list[Row]:
    """The rows less the paragraphs seen before; grows `seen`. A question is kept or left out whole."""
    kept = []
    for row in rows:
        quotes = set(_quotes(row))
        if "text" in row and quotes & seen:
            fresh = [part for part in row["text"].split("\n\n") if part not in seen]
            row = {"text": "\n\n".join(fresh)}
        if ("text" in row and _is_language(row["text"])) or not quotes & seen:
            kept.append(row)
        seen |= quotes
    return kept


def _quotes(row: Row) -> list[str]:
    """The parts of a row that are long enough for their repetition to be a quotation."""
    if "text" in row:
        return [part for part in row["text"].split("\n\n") if len(part) >= QUOTE]
    return [f"{row['instruction']}\n{row['input']}"]


def _hash(name: str) -> int:
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big")
