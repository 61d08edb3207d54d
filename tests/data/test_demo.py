from __future__ import annotations

import ast
import json
import math
import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from lorashear.data import demo
from lorashear.errors import DataError

SCRIPT = Path(__file__).parents[2] / "scripts" / "train_demo_model.py"


@pytest.fixture
def library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty standard library, which `read_modules` reads instead of the real one."""
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    return tmp_path


def module_of(source: str, name: str = "animals") -> demo.Module:
    return demo.Module(name, source, ast.parse(source))


ANIMALS = '''"""What the animals of this module have in common is that they make a noise."""

class Dog:
    """A dog that barks at strangers and sleeps the rest of the day."""

    def bark(self, times=1):
        """Barks as many times as it is told, then waits for a biscuit."""

        # twice is friendlier
        return "woof" * times

    def _sulk(self):
        """Nobody outside is meant to call this one, so no question asks for it."""

def feed(animal, *, grams: int) -> None: "A one-line docstring that shares its line with the definition."
'''


def test_the_sources_and_their_rows() -> None:
    sources = {source.name: source for source in demo.demo_sources()}
    assert list(sources) == ["reference", "docs", "code", "questions"]
    for source in sources.values():
        keys = {"text"} if source.kind == "text" else {"instruction", "input", "output"}
        for rows in (source.train, source.valid):
            assert len(rows) >= 20
            assert all(set(row) == keys for row in rows)
        assert all(len(row["text"]) <= demo.PASSAGE for row in source.train if "text" in row)
    size = sum(len(text) for source in sources.values() for row in source.train for text in row.values())
    assert 3e6 < size < 1e7


@pytest.mark.slow
def test_the_sources_are_the_same_in_every_process() -> None:
    code = "import json, lorashear.data.demo as d; print(json.dumps([s.train + s.valid for s in d.demo_sources()]))"
    environment = os.environ | {"PYTHONHASHSEED": "1234"}
    printed = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, env=environment).stdout
    assert json.loads(printed) == [source.train + source.valid for source in demo.demo_sources()]


def test_no_module_and_no_paragraph_is_on_both_sides() -> None:
    names = {name for name, _ in demo._module_files(Path(sysconfig.get_paths()["stdlib"]))}
    held_out = {name for name in names if demo.side_of(name, demo.HELD_OUT) == "valid"}
    assert 0.03 < len(held_out) / len(names) < 0.15
    for source in demo.demo_sources():
        if source.kind == "text":
            parts = [
                {part for row in rows for part in row["text"].split("\n\n")} for rows in (source.train, source.valid)
            ]
            assert not {part for part in parts[0] & parts[1] if len(part) >= demo.QUOTE}
        else:
            asked = [{row["instruction"] + row["input"] for row in rows} for rows in (source.train, source.valid)]
            assert not asked[0] & asked[1]
    docs = next(source for source in demo.demo_sources() if source.name == "docs")
    for rows, module in ((docs.valid, "datetime"), (docs.train, "json")):
        assert any(row["text"].startswith(f"{module}\n\n") for row in rows)


def test_the_side_depends_on_the_name_alone() -> None:
    assert demo.side_of("datetime", demo.HELD_OUT) == "valid"  # the shipped weights rest on it
    assert demo.side_of("json", demo.HELD_OUT) == "train"


def test_docs_list_what_is_public() -> None:
    texts = [row["text"] for row in demo._docs(module_of(ANIMALS))]
    assert texts[0].startswith("animals\n\nWhat the animals")
    assert texts[1].startswith("class animals.Dog\n\nA dog that barks")
    assert "animals.Dog.bark(self, times=1)\n\nBarks as many times" in texts[1]
    assert texts[2].startswith("animals.feed(animal, *, grams: int)\n\nA one-line docstring")
    assert "_sulk" not in "".join(texts)


def test_code_is_without_docstrings_and_still_python() -> None:
    (row,) = demo._code(module_of(ANIMALS))
    assert "biscuit" not in row["text"]
    assert "    def bark(self, times=1):\n        # twice is friendlier\n" in row["text"]
    assert "A one-line docstring" in row["text"]  # a body needs a statement
    ast.parse(row["text"])


def test_questions_are_answered_by_the_docstring() -> None:
    rows = list(demo._questions(module_of(ANIMALS)))
    assert all(row["output"][0].isupper() for row in rows)
    asked = {row["instruction"]: row for row in rows}
    about_dog = next(row for question, row in asked.items() if "`animals.Dog`" in question)
    assert about_dog["output"] == "A dog that barks at strangers and sleeps the rest of the day."
    with_code = [row for row in rows if row["input"]]
    assert any(row["input"].startswith("def bark(self") and "biscuit" not in row["input"] for row in with_code)
    assert list(demo._questions(module_of(ANIMALS, name="_animals"))) == []


@pytest.mark.parametrize("gap", ["\n\n\n", "\n\n", "\n"])
def test_long_texts_are_cut_at_gaps_and_nothing_is_lost(gap: str) -> None:
    pieces = [f"paragraph number {i} of a text that is too long for one passage" for i in range(200)]
    passages = demo._passages(gap.join(pieces))
    assert len(passages) > 1
    assert max(map(len, passages)) <= demo.PASSAGE
    assert gap.join(passages) == gap.join(pieces)


def test_tables_are_left_out() -> None:
    assert demo._passages("\n".join(f"0x{i:04x}, 0x{i + 1:04x}," for i in range(50))) == []


def test_a_quotation_of_held_out_text_is_not_trained_on() -> None:
    quoted, own = "a paragraph that two modules share, word for word" * 2, "a paragraph of its own, nobody else's" * 2
    rows = [("json", {"text": f"{own}\n\n{quoted}"}), ("datetime", {"text": quoted}), ("json", {"text": quoted})]
    assert demo._split(rows, demo.HELD_OUT) == ([{"text": own}], [{"text": quoted}])


def test_a_python_without_sources_is_reported(library: Path) -> None:
    (library / "json.py").write_text("x = 1\n")
    with pytest.raises(DataError, match=r"holds 1 readable source files .* data of your own with --data"):
        list(demo.read_modules())


def test_a_python_without_the_reference_is_reported(library: Path) -> None:
    with pytest.raises(DataError, match=r"topics\.py does not hold .* language reference"):
        list(demo._reference())
    (library / "pydoc_data").mkdir()
    (library / "pydoc_data" / "topics.py").write_text('topics = {"if": ' + repr("The if statement. " * 9) + "}\n")
    assert [topic for topic, _ in demo._reference()] == ["if"]


def test_stray_files_are_passed_over(library: Path) -> None:
    (library / "broken.py").write_text("def (:\n")
    (library / "latin.py").write_bytes(b"x = '\xff'\n")
    (library / "site-packages").mkdir()
    for i in range(101):
        (library / f"module{i}.py").write_text("x = 1\n")
        (library / "site-packages" / f"other{i}.py").write_text("x = 1\n")
    names = {module.name for module in demo.read_modules()}
    assert names == {f"module{i}" for i in range(101)}


def held_out_loss(model: PreTrainedModel, name: str) -> float:
    tokenizer = AutoTokenizer.from_pretrained(demo.demo_model_path())
    rows = next(source for source in demo.demo_sources() if source.name == name).valid
    text = "".join("<|endoftext|>" + row["text"] for row in rows[:12])
    windows = torch.tensor(tokenizer(text, truncation=True, max_length=1024)["input_ids"]).view(4, 256)
    with torch.no_grad():
        return float(model(input_ids=windows, labels=windows).loss)


@pytest.mark.parametrize("name", ["reference", "docs", "code"])
def test_the_demo_model_knows_held_out_text_and_an_untrained_one_does_not(name: str) -> None:
    model = AutoModelForCausalLM.from_pretrained(demo.demo_model_path(), dtype=torch.float32)
    assert held_out_loss(model, name) < 0.55 * math.log(model.config.vocab_size)
    torch.manual_seed(0)
    untrained = AutoModelForCausalLM.from_config(model.config, dtype=torch.float32)
    assert held_out_loss(untrained, name) > 0.95 * math.log(model.config.vocab_size)


def test_the_demo_model_is_small_and_has_what_the_pipeline_asks_of_it() -> None:
    folder = demo.demo_model_path()
    assert sum(path.stat().st_size for path in folder.iterdir()) <= 6_000_000
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.convert_tokens_to_ids("<|endoftext|>") == 0
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Why?"}], tokenize=False, add_generation_prompt=True
    )
    assert chat == "<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n"
    text = "def f(x):\n    return x  # naïve “quotes”\n"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    report = json.loads((folder / "training.json").read_text())
    perplexity = report["held_out_perplexity"]
    assert set(perplexity["trained"]) == {source.name for source in demo.demo_sources()}
    assert all(perplexity["trained"][name] < 0.05 * perplexity["untrained"][name] for name in perplexity["trained"])


def test_the_demo_model_ends_its_answers() -> None:
    tokenizer = AutoTokenizer.from_pretrained(demo.demo_model_path())
    model = AutoModelForCausalLM.from_pretrained(demo.demo_model_path(), dtype=torch.float32)
    chat = [{"role": "user", "content": "What does `json.dumps` do?"}]
    ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    written = model.generate(**ids, max_new_tokens=100, do_sample=False)[0, ids["input_ids"].shape[1] :]
    assert written[-1] == tokenizer.eos_token_id
    assert len(tokenizer.decode(written, skip_special_tokens=True).split()) >= 3


@pytest.mark.slow
def test_the_script_that_made_it_still_runs(tmp_path: Path) -> None:
    options = ["--steps", "6", "--no-bfloat16", "--threads", "1", "--out", str(tmp_path / "model")]
    subprocess.run([sys.executable, str(SCRIPT), *options], check=True, capture_output=True)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    report = json.loads((tmp_path / "model" / "training.json").read_text())
    assert report["steps"] == 6
    assert report["parameters"] == model.num_parameters()
    shipped = json.loads((demo.demo_model_path() / "training.json").read_text())
    assert report["recipe"] == shipped["recipe"]
