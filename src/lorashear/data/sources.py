"""Sources of text: what `--data` names, held-out part set aside, and how a row becomes a passage."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorashear.config import DataSettings
from lorashear.data.demo import demo_sources
from lorashear.data.rows import SUFFIXES, Keys, Row, read_dataset, read_file
from lorashear.data.spec import Kind, SourceSpec, read_specs
from lorashear.errors import DataError, SettingsError, did_you_mean

MIN_HELD_OUT = 20
"""Passages held out at least, where a source names no held-out text."""


@dataclass(frozen=True)
class Source:
    """Passages of one origin, not yet rendered to text; training and held-out part share no passage."""

    name: str
    kind: Kind
    train: Sequence[Row]
    valid: Sequence[Row]
    origin: str
    """File or dataset, for display."""
    text: str = "text"
    """Key of the passage; the other three are those of an instruction row."""
    instruction: str = "instruction"
    input: str = "input"
    output: str = "output"


def read_sources(data: str | Path, settings: DataSettings) -> list[Source]:
    """Reads every source that `data` names.

    Args:
        data: a YAML file with `sources:` (`lorashear.data.spec`), a folder of JSONL files (one file a source, in
            alphabetical order), a single .jsonl, .txt or .parquet file, or `demo` for the built-in text.
        settings: `held_out` and `render` are used; the names in `weights` are checked.

    Raises:
        DataError: for anything missing, unreadable, empty or too small; the message names file and line.
        SettingsError: for a weight of an unknown source, or only weights of 0.
    """
    sources = _read(data, settings)
    _check_weights(settings.weights, [source.name for source in sources])
    return sources


def _read(data: str | Path, settings: DataSettings) -> list[Source]:
    if str(data) == "demo":
        return [Source(s.name, s.kind, s.train, s.valid, "demo") for s in demo_sources()]
    path = Path(data).expanduser()
    if path.is_dir():
        return _read_folder(path, settings)
    if not path.is_file():
        raise DataError(f"{data}: no such file or folder; expected a YAML file, a folder of JSONL files, or `demo`")
    if path.suffix in SUFFIXES:
        return [_read_plain(path, settings)]
    if path.suffix not in (".yaml", ".yml"):
        raise DataError(f"{path}: expected .yaml, {', '.join(SUFFIXES)}, a folder of JSONL files, or `demo`")
    return [_read_spec(name, spec, path.parent, settings) for name, spec in read_specs(path).items()]


def _check_weights(weights: Mapping[str, float], names: Sequence[str]) -> None:
    for name in weights:
        if name not in names:
            raise SettingsError(f'data.weights: no source is called "{name}"; {did_you_mean(name, names)}')
    if not any(weights.get(name, 1.0) for name in names):
        raise SettingsError("data.weights: every source has the weight 0; give one of them a positive weight")


def render(row: Row, source: Source, tokenizer: Any, settings: DataSettings) -> str:
    """The passage that a row becomes.

    Instruction rows become a conversation in the tokenizer's chat template, the plain layout of `plain_prompt`, or
    their own text field, as `settings.render` says.

    Raises:
        DataError: where the tokenizer has no chat template, or the row no text field, that was asked for.
    """
    if source.kind == "text":
        return row[source.text]
    layout = settings.render
    if layout == "text":
        if source.text not in row:
            raise DataError(
                f'source {source.name} ({source.origin}): data.render is "text", but a row has no "{source.text}", '
                f'only {", ".join(row)}; set it to "auto"'
            )
        return row[source.text]
    if layout == "chat" and not tokenizer.chat_template:
        raise DataError('data.render is "chat", but the tokenizer has no chat template; set it to "auto" or "plain"')
    instruction, given, answer = row[source.instruction], row.get(source.input, ""), row[source.output]
    if layout == "plain" or not tokenizer.chat_template:
        return plain_prompt(instruction, given) + answer
    messages = [{"role": "user", "content": question(row, source)}, {"role": "assistant", "content": answer}]
    return str(tokenizer.apply_chat_template(messages, tokenize=False))


def question(row: Row, source: Source) -> str:
    """What the user says in the chat that an instruction row becomes: the instruction and, below it, its input."""
    instruction, given = row[source.instruction], row.get(source.input, "")
    return f"{instruction}\n\n{given}" if given.strip() else instruction


def plain_prompt(instruction: str, given: str = "") -> str:
    """The layout for models without a chat template, up to where the answer begins."""
    middle = f"Input:\n{given}\n\n" if given.strip() else ""
    return f"Instruction:\n{instruction}\n\n{middle}Answer:\n"


def _read_folder(folder: Path, settings: DataSettings) -> list[Source]:
    paths = sorted(folder.glob("*.jsonl"))
    if not paths:
        there = ", ".join(sorted(item.name for item in folder.iterdir())[:5]) or "nothing"
        raise DataError(f"{folder}: no .jsonl file in the folder, which holds {there}; name other files in a YAML file")
    return [_read_plain(path, settings) for path in paths]


def _read_plain(path: Path, settings: DataSettings) -> Source:
    """A file by itself, without a YAML entry: the keys of its first row say what kind it is."""
    kind: Kind = "instruct" if path.suffix == ".jsonl" and {"instruction", "output"} <= _first_keys(path) else "text"
    return _read_spec(path.stem, SourceSpec(path=path.name, kind=kind), path.parent, settings)


def _first_keys(path: Path) -> set[str]:
    with path.open("rb") as lines:
        first = next((line for line in lines if line.strip()), b"{}")
    try:
        row = json.loads(first)
    except ValueError:
        return set()  # reading the file reports it, with its line
    return set(row) if isinstance(row, dict) else set()


def _read_spec(name: str, spec: SourceSpec, folder: Path, settings: DataSettings) -> Source:
    keys = _keys(spec, settings)
    rows = _read_part(spec, folder, keys, None)
    origin = str(folder / Path(spec.path).expanduser()) if spec.path is not None else str(spec.dataset)
    if spec.valid is None:
        train, valid = _hold_out(rows, settings.held_out, name, origin)
    else:
        train, valid = rows, _read_part(spec, folder, keys, spec.valid)
    return Source(name, spec.kind, train, valid, origin, spec.text, spec.instruction, spec.input, spec.output)


def _read_part(spec: SourceSpec, folder: Path, keys: Keys, valid: str | None) -> list[Row]:
    """The rows of the file or split `valid` or, for None, those to train on."""
    if spec.path is not None:
        return read_file(folder / Path(valid or spec.path).expanduser(), keys, limit=spec.max_rows)
    assert spec.dataset is not None
    return read_dataset(
        spec.dataset,
        keys,
        folder=folder,
        name=spec.name,
        split=valid or spec.split,
        streaming=spec.streaming,
        limit=spec.max_rows,
    )


def _keys(spec: SourceSpec, settings: DataSettings) -> Keys:
    if spec.kind == "text" or settings.render == "text":
        return Keys((spec.text,))
    return Keys((spec.instruction, spec.output), (spec.input, spec.text))


def _hold_out(rows: list[Row], share: float, name: str, origin: str) -> tuple[list[Row], list[Row]]:
    """The last passages, so that held-out text is apart from the training text also within a document."""
    count = max(MIN_HELD_OUT, math.ceil(share * len(rows)))
    if len(rows) <= count:
        raise DataError(
            f"source {name} ({origin}) has {len(rows)} passages, and {count} of them would be held out; "
            "give more text, or name a file of held-out text with `valid`"
        )
    return rows[:-count], rows[-count:]
