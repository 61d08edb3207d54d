from __future__ import annotations

import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lorashear.evaluation.tasks import TaskResult

Script = Callable[[str], Any]


def results(**tasks: list[float]) -> dict[str, TaskResult]:
    return {name: TaskResult({"acc": items}, 1.0) for name, items in tasks.items()}


def random_pair(seed: int) -> tuple[dict[str, TaskResult], dict[str, TaskResult]]:
    """Two tasks of 60 and 25 items; the small model errs on some that the dense one gets right."""
    generator = torch.Generator().manual_seed(seed)
    sizes = {"long": 60, "short": 25}
    dense = {name: (torch.rand(size, generator=generator) < 0.7).double() for name, size in sizes.items()}
    small = {name: right * (torch.rand(len(right), generator=generator) < 0.9) for name, right in dense.items()}
    return results(**{n: t.tolist() for n, t in dense.items()}), results(**{n: t.tolist() for n, t in small.items()})


def test_the_drop_is_of_the_mean_over_tasks(script: Script) -> None:
    dense = results(a=[1, 1, 1, 0], b=[1, 0])
    small = results(a=[1, 0, 0, 0], b=[0, 1])
    drop = script("zeroshot").paired_bootstrap(dense, small, draws=50)
    assert drop.points == pytest.approx(100 * ((3 / 4 - 1 / 4) + 0) / 2)
    assert drop.percent == pytest.approx(100 * 0.25 / ((3 / 4 + 1 / 2) / 2))


def test_equal_items_have_no_interval(script: Script) -> None:
    dense, _ = random_pair(0)
    drop = script("zeroshot").paired_bootstrap(dense, dense, draws=500)
    assert drop.points_interval == drop.percent_interval == (0.0, 0.0)


def test_the_interval_is_that_of_the_paired_differences(script: Script) -> None:
    """By the normal approximation: the variance of a task's mean difference is that of its items over their number."""
    dense, small = random_pair(1)
    drop = script("zeroshot").paired_bootstrap(dense, small)
    variance = 0.0
    for name in dense:
        lost = torch.tensor(dense[name].quoted) - torch.tensor(small[name].quoted)
        variance += lost.var(correction=0).item() / len(lost) / len(dense) ** 2
    half = 100 * 1.96 * math.sqrt(variance)
    low, high = drop.points_interval
    assert low == pytest.approx(drop.points - half, abs=0.15 * half)
    assert high == pytest.approx(drop.points + half, abs=0.15 * half)
    assert drop.percent_interval[0] < drop.percent < drop.percent_interval[1]
    assert script("zeroshot").paired_bootstrap(dense, small) == drop


def test_table_of_tasks(script: Script) -> None:
    dense, small = results(a=[1, 1, 1, 0], b=[1, 0]), results(a=[1, 0, 0, 0], b=[1, 0])
    lines = script("zeroshot").render(["whole", "cut"], [dense, small]).splitlines()
    assert lines[0] == "| task | metric | items | whole | cut |"
    assert lines[2] == "| a | acc | 4 | 75.0% | 25.0% |"
    assert lines[4] == "| **mean of 2** |  | 6 | **62.5%** | **37.5%** |"
    assert lines[5].startswith("| drop in points |  |  |  | 25.00 (")
    assert lines[6].startswith("| drop in % of dense |  |  |  | 40.00 (")
    assert len({line.count("|") for line in lines}) == 1
    assert "drop" not in script("zeroshot").render(["whole"], [dense])


def test_measured_tasks_are_not_measured_again(
    script: Script, pico_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    zeroshot, asked = script("zeroshot"), []

    def evaluate(*_: Any, limit: int | None, batch_size: int) -> TaskResult:
        asked.append((limit, batch_size))
        if len(asked) == 2:
            raise KeyboardInterrupt
        return TaskResult({"acc": [1.0, 0.0]}, 0.1)

    def run(*more: str) -> None:
        line = ["zeroshot.py", str(tmp_path), str(pico_folder), "--out", str(tmp_path / "out"), *more]
        monkeypatch.setattr(sys, "argv", line)
        zeroshot.main()

    monkeypatch.setattr(zeroshot, "task_names", lambda _: ("a", "b"))
    monkeypatch.setattr(zeroshot, "evaluate_task", evaluate)
    with pytest.raises(KeyboardInterrupt):
        run()
    run()
    assert len(asked) == 3  # a, b stopped, b again
    run()
    assert len(asked) == 3
    run("--limit", "1")
    assert asked[3:] == [(1, 16), (1, 16)]


def test_records_go_by_content(script: Script, tmp_path: Path) -> None:
    records = script("records")
    for name, weights in (("one", b"same"), ("two", b"same"), ("three", b"other")):
        (tmp_path / name / "model").mkdir(parents=True)
        (tmp_path / name / "model" / "w.safetensors").write_bytes(weights)
    one, two, three = (records.fingerprint([tmp_path / name / "model"]) for name in ("one", "two", "three"))
    assert one == two != three
    assert records.fingerprint(["hub/a"]) != records.fingerprint(["hub/b"])
    path = records.record_path(tmp_path, str(tmp_path / "one" / "model"), "bfloat16")
    assert path.name.startswith("one-")
    assert path != records.record_path(tmp_path, str(tmp_path / "one" / "model"), "float32")
    assert records.label("some/Model-1.7B.gguf") == "Model-1.7B"
    assert records.label("hub/Model-1.7B") == "Model-1.7B"
