from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedModel

from lorashear.evaluation.samples import Answer, answers_perplexity

Script = Callable[[str], Any]


def test_figures_of_answers(script: Script, pico_llama: Callable[..., PreTrainedModel]) -> None:
    writing, dense = script("writing"), pico_llama().eval()
    answers = [Answer([1, 2], [7, 7, 7, 7, 7, 0], ended=True), Answer([3], [4, 5, 6], ended=False)]
    found = writing.measure(dense, answers)
    assert found == writing.Writing(
        repeated=pytest.approx((1 / 2 + 0) / 2),
        perplexity=answers_perplexity(dense, answers),
        tokens=4.0,
        ended=0.5,
    )


def test_writing_from_end_to_end(
    script: Script, pico_folder: Path, pico_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writing = script("writing")
    line = ["writing.py", str(pico_data), str(pico_folder), "--count", "2", "--new-tokens", "4", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", line)
    writing.main()
    (kept,) = tmp_path.glob("*.json")
    answers = json.loads(kept.read_text())["sources"]["asked"]["answers"]
    assert [len(each["written"]) <= 4 for each in answers] == [True, True]
    assert answers[0]["question"].startswith("What ")
    table = (tmp_path / "table.md").read_text()
    assert table.splitlines()[2].startswith(f"| asked | {pico_folder.name} | ")
    monkeypatch.setattr(writing, "write_answers", None)
    writing.main()  # from what is kept
    assert (tmp_path / "table.md").read_text() == table


def test_writing_names_the_instruction_sources(script: Script, pico_data: Path) -> None:
    writing = script("writing")
    assert list(writing.read_questions(str(pico_data), None, 3)) == ["asked"]
    with pytest.raises(SystemExit, match="no instruction source heads; it has asked"):
        writing.read_questions(str(pico_data), ["heads"], 3)
