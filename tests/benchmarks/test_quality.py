from __future__ import annotations

import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import lorashear as ls
from lorashear.evaluation.tasks import TaskResult

Script = Callable[[str], Any]


def quality_run(method: str, ratio: float, seed: int, macro: float, **more: Any) -> dict[str, Any]:
    after = {"macro": macro, "per_source": {"news": macro * 2, "wiki": macro / 2}}
    return {"method": method, "ratio": ratio, "seed": seed, "before": None, "after": after, "net": ratio + 0.004,
            "tokens": 1_228_800, "seconds": 60, **more}  # fmt: skip


def test_table_of_quality(script: Script) -> None:
    before = {"macro": 30.0, "per_source": {"news": 60.0, "wiki": 15.0}}
    runs = [
        {"method": "whole", "ratio": 0.0, "seed": 0, "before": before, "zeroshot": {"a": [1, 1, 0, 0], "b": [1, 0]}},
        quality_run("random", 0.2, 0, 40.0, before=before),
        quality_run("dense", 0.0, 0, 25.0),
        quality_run("lhspg", 0.2, 0, 26.0, before=before, zeroshot={"a": [1, 0, 0, 0], "b": [1, 0]}),
        quality_run("lhspg", 0.2, 1, 27.0, before=before),
    ]
    main, sources = script("quality_table").render(runs, reference=24.5).split("\n\n")
    lines = main.splitlines()
    head = [cell.strip() for cell in lines[0].split("|")[1:-1]]
    cells = [dict(zip(head, map(str.strip, line.split("|")[1:-1]), strict=True)) for line in lines[2:]]
    assert [line["method"] for line in cells] == ["whole model", "dense + same fine-tuning", "lhspg", "random"]
    whole, dense, lhspg, random = cells
    macro = math.sqrt(26 * 27)
    assert whole["before recovery"] == "30.00"
    assert whole["zero-shot"] == "50.0%"
    assert dense["excess over dense + same"] == "0.0000"
    assert lhspg["after"] == f"**{macro:.2f}**"
    assert lhspg["spread"] == f"{math.log(27 / 26):.4f}"
    assert lhspg["excess over dense + same"] == f"{math.log(macro / 25):.4f}"
    assert lhspg["excess over 24.5"] == f"{math.log(macro / 24.5):.4f}"
    assert lhspg["zero-shot"] == "37.5%"
    assert lhspg["worst source"] == f"news {2 * macro:.1f}"
    assert lhspg["tokens"] == "1,228,800"
    assert random["spread"] == random["zero-shot"] == ""
    assert sources.splitlines()[0] == "| perplexity after | ratio | news | wiki |"
    assert sources.splitlines()[4] == f"| lhspg | 20% | {2 * macro:.2f} | {macro / 2:.2f} |"
    without = script("quality_table").render([run for run in runs if run["method"] != "dense"])
    assert "excess over 24.5" not in without


def test_the_main_table_shows_a_source(script: Script) -> None:
    def perplexity(macro: float, news: float) -> dict[str, Any]:
        return {"macro": macro, "per_source": {"news": news, "wiki": 50.0}}

    whole = {"method": "whole", "ratio": 0.0, "seed": 0, "before": perplexity(30.0, 5.0)}
    run = quality_run("one-shot", 0.2, 0, 40.0) | {"before": perplexity(14.0, 7.25), "after": perplexity(12.0, 6.5)}
    render = script("quality_table").render
    head, _, first, line = render([whole, run], source="news").split("\n\n")[0].splitlines()
    assert head.endswith("| news before | news after |")
    assert [cell.strip() for cell in first.split("|")[-3:-1]] == ["5.00", ""]
    assert line.endswith("| 7.25 | 6.50 |")
    assert len({row.count("|") for row in (head, first, line)}) == 1
    assert "before |" not in render([whole, run])


@pytest.mark.slow
def test_quality_from_end_to_end(
    script: Script, pico_folder: Path, pico_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quality = script("quality")
    line = ["quality.py", str(pico_folder), str(pico_data)]
    line += ["--out", str(tmp_path / "out"), "--save", str(tmp_path / "models")]
    line += ["--tasks", str(tmp_path), "--reference", "24.5"]
    line += ["--methods", "dense", "magnitude:ffn-channels", "--ratios", "0.2", "--seeds", "1", "--threads", "1"]
    line += ["--set", "data.render=auto", "data.window=32", "data.eval_windows=2", "batch=2", "tokens=512"]
    monkeypatch.setattr(sys, "argv", line)
    monkeypatch.setattr(quality, "task_names", lambda _: ("a", "b"))
    monkeypatch.setattr(quality, "evaluate_task", lambda *_: TaskResult({"acc": [1.0, 0.0]}, 0.1))
    quality.main()
    assert {path.name for path in (tmp_path / "models").iterdir()} == {"dense-0-0", "magnitude_ffn-channels-0.2-0"}
    small, whole = ls.load(tmp_path / "models" / "magnitude_ffn-channels-0.2-0"), ls.load(pico_folder)
    assert small.num_parameters() < whole.num_parameters()
    table = (tmp_path / "out" / "table.md").read_text()
    assert "| magnitude:ffn-channels | 20% |" in table
    assert table.count("| 50.0% |") == 3
