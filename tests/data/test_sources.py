from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import pytest

from lorashear.config import CompressSettings, DataSettings
from lorashear.data import sources
from lorashear.data.demo import DemoSource
from lorashear.data.sources import Source, plain_prompt, question, read_sources, render
from lorashear.errors import DataError, SettingsError

SETTINGS = DataSettings()
TEXTS = [f"passage {number}" for number in range(100)]
ASKED = [{"instruction": f"ask {n}", "input": "", "output": f"say {n}"} for n in range(30)]
TEMPLATE = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}"


class Tokenizer:
    """All that rendering needs of one: a chat template, or none."""

    def __init__(self, chat_template: str | None = None) -> None:
        self.chat_template = chat_template

    def apply_chat_template(self, messages: list[dict[str, str]], *, tokenize: bool) -> str:
        assert not tokenize
        return "".join(f"<{message['role']}>{message['content']}" for message in messages)


def write_jsonl(path: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def as_rows(texts: Sequence[str]) -> list[dict[str, str]]:
    return [{"text": text} for text in texts]


def write_yaml(folder: Path, text: str) -> Path:
    path = folder / "data.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def only(data: str | Path, settings: DataSettings = SETTINGS) -> Source:
    (source,) = read_sources(data, settings)
    return source


def texts(rows: Sequence[Mapping[str, str]]) -> list[str]:
    return [row["text"] for row in rows]


def test_yaml_paths_are_relative_to_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "deep").mkdir()
    write_jsonl(tmp_path / "deep" / "wiki.jsonl", as_rows(TEXTS[:5]))
    write_jsonl(tmp_path / "deep" / "held.jsonl", as_rows(TEXTS[5:7]))
    write_jsonl(tmp_path / "math.jsonl", [{"q": "1+1?", "a": "2", "text": "1+1=2"}] * 2)
    data = write_yaml(
        tmp_path,
        "sources:\n"
        "  wiki: {path: deep/wiki.jsonl, valid: deep/held.jsonl}\n"
        "  math: {path: math.jsonl, valid: deep/../math2.jsonl, kind: instruct, instruction: q, output: a}\n",
    )
    write_jsonl(tmp_path / "math2.jsonl", [{"q": "2+2?", "a": "4"}])
    monkeypatch.chdir("/")
    wiki, math = read_sources(data, SETTINGS)
    assert (wiki.name, wiki.kind, wiki.origin) == ("wiki", "text", str(tmp_path / "deep" / "wiki.jsonl"))
    assert texts(wiki.train) == TEXTS[:5]
    assert texts(wiki.valid) == TEXTS[5:7]
    assert math.kind == "instruct"
    assert render(math.train[0], math, Tokenizer(), SETTINGS) == "Instruction:\n1+1?\n\nAnswer:\n2"
    assert math.valid == [{"q": "2+2?", "a": "4"}]


def test_the_last_passages_are_held_out(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", as_rows(TEXTS))
    source = only(tmp_path)
    assert texts(source.train) == TEXTS[:80]  # 5 % would be 5, but 20 are the least
    assert texts(source.valid) == TEXTS[80:]
    half = only(tmp_path, DataSettings(held_out=0.5))
    assert texts(half.train) == TEXTS[:50]


def test_too_few_passages_to_hold_some_out(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", as_rows(TEXTS[:20]))
    with pytest.raises(DataError, match=r"source a .* has 20 passages, and 20 of them would be held out.*`valid`"):
        read_sources(tmp_path, SETTINGS)


def test_a_folder_is_read_in_order_and_kinds_are_seen(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "b.jsonl", as_rows(TEXTS))
    write_jsonl(tmp_path / "a.jsonl", ASKED)
    (tmp_path / "README.txt").write_text("not a source")
    found = read_sources(tmp_path, SETTINGS)
    assert [(source.name, source.kind) for source in found] == [("a", "instruct"), ("b", "text")]


def test_an_empty_folder(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("x")
    with pytest.raises(DataError, match=r"no \.jsonl file in the folder, which holds a\.csv"):
        read_sources(tmp_path, SETTINGS)


def test_text_files_split_on_blank_lines(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("\n \n" + "\n  \n\n".join(f"first {n}\nsecond {n}" for n in range(25)) + "\n", encoding="utf-8")
    source = only(path)
    assert len(source.train) + len(source.valid) == 25
    assert source.train[2] == {"text": "first 2\nsecond 2"}


def test_blank_passages_are_skipped(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [*as_rows(TEXTS), {"text": "  "}, {"text": None}])
    assert texts(only(path).valid) == TEXTS[80:]


def test_limit(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", as_rows(TEXTS))
    source = only(write_yaml(tmp_path, "sources: {a: {path: a.jsonl, limit: 30}}"))
    assert texts(source.train) == TEXTS[:10]


def test_parquet(tmp_path: Path) -> None:
    datasets.Dataset.from_list(as_rows(TEXTS)).to_parquet(tmp_path / "a.parquet")
    assert texts(only(tmp_path / "a.parquet").train) == TEXTS[:80]


@pytest.mark.parametrize("streaming", ["true", "false"])
def test_a_local_dataset_of_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, streaming: str) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "mine").mkdir()
    write_jsonl(tmp_path / "mine" / "train.jsonl", [{"body": text} for text in TEXTS])
    write_jsonl(tmp_path / "mine" / "test.jsonl", [{"body": "held out"}])
    entry = f"dataset: mine, valid: test, text: body, limit: 40, streaming: {streaming}"
    source = only(write_yaml(tmp_path, f"sources: {{a: {{{entry}}}}}"))
    assert [row["body"] for row in source.train] == TEXTS[:40]
    assert list(source.valid) == [{"body": "held out"}]
    assert render(source.train[1], source, Tokenizer(), SETTINGS) == "passage 1"


def test_a_saved_dataset(tmp_path: Path) -> None:
    rows = datasets.Dataset.from_list(as_rows(TEXTS))
    rows.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": rows, "dev": rows.select(range(3))}).save_to_disk(tmp_path / "two")
    data = write_yaml(tmp_path, "sources: {one: {dataset: one}, two: {dataset: ./two, valid: dev}}")
    one, two = read_sources(data, SETTINGS)
    assert texts(one.train) == TEXTS[:80]
    assert texts(two.train) == TEXTS
    assert texts(two.valid) == TEXTS[:3]
    with pytest.raises(DataError, match="split test: no such split in the folder; it holds dev, train"):
        read_sources(write_yaml(tmp_path, "sources: {two: {dataset: two, split: test}}"), SETTINGS)


def test_a_saved_dataset_that_is_damaged(tmp_path: Path) -> None:
    datasets.Dataset.from_list(as_rows(TEXTS)).save_to_disk(tmp_path / "one")
    next((tmp_path / "one").glob("*.arrow")).write_bytes(b"not arrow")
    with pytest.raises(DataError, match=r"one, split train: cannot be loaded .*save the dataset again"):
        read_sources(write_yaml(tmp_path, "sources: {one: {dataset: one}}"), SETTINGS)


@pytest.mark.parametrize("name", ["a.jsonl", "a.txt"])
def test_a_file_that_cannot_be_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    (tmp_path / name).write_text("{}")
    data = write_yaml(tmp_path, f"sources: {{a: {{path: {name}}}}}")
    real = Path.open

    def forbidden(path: Path, *args: Any, **options: Any) -> Any:
        if path.name == name:  # a test may run as root, whom no permission stops
            raise PermissionError(13, "Permission denied", str(path))
        return real(path, *args, **options)

    monkeypatch.setattr(Path, "open", forbidden)
    with pytest.raises(DataError, match=rf"{name}: cannot be read \(Permission denied\)"):
        read_sources(data, SETTINGS)


def test_a_dataset_that_is_nowhere(tmp_path: Path) -> None:
    data = write_yaml(tmp_path, "sources: {web: {dataset: lorashear-tests/nothing, streaming: true}}")
    with pytest.raises(DataError, match=r"lorashear-tests/nothing, split train: cannot be loaded .*offline"):
        read_sources(data, SETTINGS)


def test_demo(monkeypatch: pytest.MonkeyPatch) -> None:
    made_up = [
        DemoSource("docs", "text", [{"text": "x"}], [{"text": "y"}]),
        DemoSource("questions", "instruct", [{"instruction": "a", "input": "", "output": "b"}], ASKED),
    ]
    monkeypatch.setattr(sources, "demo_sources", lambda: made_up)  # the real ones take seconds to read
    docs, questions = read_sources("demo", SETTINGS)
    assert (docs.name, docs.kind, docs.origin) == ("docs", "text", "demo")
    assert render(docs.valid[0], docs, Tokenizer(), SETTINGS) == "y"
    assert render(questions.train[0], questions, Tokenizer(), SETTINGS) == "Instruction:\na\n\nAnswer:\nb"


@pytest.mark.parametrize(
    ("yaml", "message"),
    [
        ("sources:\n  a: {path: a.jsonl\n  b: 1\n", r"data\.yaml, line 3: .*not readable as YAML"),
        ("sources:\n  a: {path: x}\n  a: {path: y}\n", r'data\.yaml, line 3: "a" is there twice'),
        ("- a\n", r"expected a mapping `sources:`"),
        ("", r"expected a mapping `sources:`.*found None"),
        ("sources: {}\n", r"data\.yaml: sources = \{\}"),
        ("source: {}\n", r'unknown key "source"; did you mean "sources"\?'),
        ("sources: {a: {path: x, txt: body}}\n", r'data\.yaml: a: unknown key "txt"; did you mean "text"\?'),
        ("sources: {a: {path: x, kind: chat}}\n", r"a: kind = 'chat'.*'text' or 'instruct'"),
        ("sources: {a: {path: x, dataset: y}}\n", r"either `path`.*or `dataset`"),
        ("sources: {a: {text: body}}\n", r"either `path`.*or `dataset`"),
        ("sources: {a: {path: x, split: test}}\n", r"split belong to `dataset`"),
        ("sources: {a: {path: x, output: o}}\n", r"belong to `kind: instruct`"),
        ("sources: {a: {path: x, valid: x}}\n", r"`valid` is x, which is trained on"),
        ("sources: {a: {path: nothing.jsonl}}\n", r"nothing\.jsonl: no such file"),
        ("sources: {a: {path: data.yaml}}\n", r"files of kind '\.yaml' are not read; expected \.jsonl"),
    ],
)
def test_mistakes_in_the_yaml_file(tmp_path: Path, yaml: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        read_sources(write_yaml(tmp_path, yaml), SETTINGS)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", r"a\.jsonl: holds no text"),
        (b'{"text": " "}\n', r"a\.jsonl: holds no text"),
        (b'{"text": "x"}\n\n{"text": \n', r"a\.jsonl, line 3: not readable as JSON"),
        (b'{"text": "\xff"}\n', r"a\.jsonl, line 1: not readable as JSON"),
        (b'{"text": "x"}\n["y"]\n', r"a\.jsonl, line 2: found list, expected one JSON object"),
        (b'{"text": "x"}\n{"body": "y", "id": 1}\n', r'a\.jsonl, line 2: no key "text" in the row, which has body, id'),
        (b'{"text": ["x"]}\n', r"a\.jsonl, line 1: \"text\" is list .*expected text"),
        (b'{"instruction": "x", "output": "y"}\n{"instruction": "x"}\n', r'a\.jsonl, line 2: no key "output"'),
    ],
)
def test_mistakes_in_a_jsonl_file(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "a.jsonl").write_bytes(content)
    with pytest.raises(DataError, match=message):
        read_sources(tmp_path, SETTINGS)


def test_data_that_is_nothing_we_read(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file or folder"):
        read_sources(tmp_path / "nothing", SETTINGS)
    (tmp_path / "a.csv").write_text("x")
    with pytest.raises(DataError, match=r"a\.csv: expected \.yaml"):
        read_sources(tmp_path / "a.csv", SETTINGS)


def test_rendering_of_instructions() -> None:
    row = {"instruction": "Add.", "input": "1 and 2", "output": "3", "text": "whole"}
    source = Source("math", "instruct", [row], [row], "math.jsonl")
    chat = Tokenizer(TEMPLATE)
    plain = "Instruction:\nAdd.\n\nInput:\n1 and 2\n\nAnswer:\n3"
    assert render(row, source, chat, SETTINGS) == "<user>Add.\n\n1 and 2<assistant>3"
    assert render(row, source, Tokenizer(), SETTINGS) == plain
    assert render(row, source, chat, DataSettings(render="plain")) == plain
    assert render(row, source, chat, DataSettings(render="text")) == "whole"
    assert plain.startswith(plain_prompt("Add.", "1 and 2"))
    with pytest.raises(DataError, match="the tokenizer has no chat template"):
        render(row, source, Tokenizer(), DataSettings(render="chat"))
    del row["text"]
    with pytest.raises(DataError, match='a row has no "text", only instruction, input, output'):
        render(row, source, chat, DataSettings(render="text"))


def test_a_question_is_the_instruction_and_its_input() -> None:
    source = Source("asked", "instruct", [], [], "here", instruction="ask", input="about")
    assert question({"ask": "Why?", "about": " "}, source) == "Why?"
    assert question({"ask": "Why?"}, source) == "Why?"
    assert question({"ask": "Why?", "about": "the sky"}, source) == "Why?\n\nthe sky"


def test_weights_are_of_sources_that_are_there(tmp_path: Path) -> None:
    for name in ("code", "wiki"):
        (tmp_path / f"{name}.jsonl").write_text("".join(f'{{"text": "{n}"}}\n' for n in range(30)))
    assert len(read_sources(tmp_path, DataSettings(weights={"code": 4.0, "wiki": 0.0}))) == 2
    with pytest.raises(SettingsError, match=r'data\.weights: no source is called "cod"; did you mean "code"'):
        read_sources(tmp_path, DataSettings(weights={"cod": 4.0}))
    with pytest.raises(SettingsError, match="every source has the weight 0"):
        read_sources(tmp_path, DataSettings(weights={"code": 0.0, "wiki": 0.0}))
    with pytest.raises(SettingsError, match=r"data\.weights\.code = -1"):
        CompressSettings.from_mapping({"data": {"weights": {"code": -1}}})
