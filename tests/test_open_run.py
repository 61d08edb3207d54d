"""What is looked at before a run folder is made, and what is left of it when saving fails."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import lorashear as ls
from lorashear import devices, models, open_run
from lorashear.config import CompressSettings
from lorashear.reporting import runfolder

WINDOW, BATCH, STEPS = 16, 4, 20


def settings(**changes: Any) -> CompressSettings:
    values: dict[str, Any] = {
        "tokens": STEPS * WINDOW * BATCH, "batch": BATCH, "micro_batch": 2, "dtype": "float32",
        "data": {"window": WINDOW, "eval_windows": 2, "calibration_windows": 2},
        "prune": {"ratio": 0.25, "periods": 3, "round_to": 8},
        "analysis": {"in_compress": False},
    }  # fmt: skip
    for key, value in changes.items():
        part, _, name = key.rpartition("__")
        (values[part] if part else values)[name] = value
    return CompressSettings.from_mapping(values)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokens": 3 * WINDOW * BATCH}, "tokens"),
        ({"micro_batch": 3}, "batch = 4 is not divisible by micro_batch = 3"),
        ({"prune__ratio": 0.95}, "cannot be reached: the prunable groups give at most"),
        ({"data__window": 65, "tokens": STEPS * 65 * BATCH}, "data.window = 65: the model has 64 positions"),
        ({"device": "no-such"}, "device = 'no-such': not usable on this machine"),
        ({"device": "meta"}, 'device = "meta": nothing is computed there'),
    ],
)
def test_mistakes_are_found_before_the_folder_is_made(
    pico_folder: Path, pico_data: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    for run in (ls.compress, ls.prune):
        with pytest.raises(ls.LorashearError, match=message):
            run(pico_folder, data=pico_data, out=tmp_path / "run", settings=settings(**changes), progress=False)
        assert not (tmp_path / "run").exists()
    if "prune__ratio" not in changes:
        changes = {**changes, "tokens": 10} if [*changes] == ["tokens"] else changes
        with pytest.raises(ls.LorashearError, match=message):
            ls.recover(pico_folder, data=pico_data, out=tmp_path / "run", settings=settings(**changes), progress=False)
        assert not (tmp_path / "run").exists()


def test_a_resumed_run_holds_its_weights_as_it_did(
    pico_folder: Path, pico_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = settings(dtype="auto")
    for free, resume in ((2**18, False), (2**40, True)):
        monkeypatch.setattr(models, "available_bytes", lambda _, free=free: free)
        run = open_run.open_run("compress", pico_folder, pico_data, tmp_path / "run", chosen, resume, False, False)
        assert {run.loaded.model.dtype, run.weight_dtype, run.dtype} == {torch.bfloat16}
        run.load(pico_folder)
        assert run.loaded.model.dtype == torch.bfloat16


def test_weights_in_bfloat16_do_not_go_with_training_in_float32() -> None:
    with pytest.raises(ls.SettingsError, match='dtype = "float32" asks for more digits than weight_dtype = "bfloat16"'):
        settings(weight_dtype="bfloat16")


def test_a_full_disk_leaves_nothing_half_written(
    pico_folder: Path, pico_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(open_run, "save", full)
    with pytest.raises(ls.OutputError, match="the disk is full"):
        ls.prune(
            pico_folder,
            data=pico_data,
            out=tmp_path / "run",
            settings=settings(prune__method="magnitude"),
            progress=False,
        )
    assert not [item.name for item in (tmp_path / "run").iterdir() if "partial" in item.name or item.name == "model"]
    assert runfolder.RUN_FILE in {item.name for item in (tmp_path / "run").iterdir()}


@pytest.mark.parametrize(
    "changes", [{"prune__share": 0.75}, {"adapt": {"share": 0.95}}, {"adapt": {"share": 0.5}, "prune__share": 0.5}]
)
def test_shares_that_leave_nothing_to_recovery(
    pico_folder: Path, pico_data: Path, tmp_path: Path, changes: dict[str, Any]
) -> None:
    with pytest.raises(
        ls.SettingsError, match=r"pay for 20 optimizer steps, adapting \(adapt.share\) may take .* lower"
    ):
        ls.compress(pico_folder, data=pico_data, out=tmp_path / "run", settings=settings(**changes), progress=False)
    assert not (tmp_path / "run").exists()


def test_a_cut_in_one_shot_has_no_walk_to_pay_for(pico_folder: Path, pico_data: Path, tmp_path: Path) -> None:
    given = settings(prune__share=0.95, prune__method="magnitude", adapt={"share": 0.1})
    done = ls.compress(pico_folder, data=pico_data, out=tmp_path / "run", settings=given, progress=False)
    assert done.tokens == STEPS * WINDOW * BATCH


def test_several_processes_are_refused(
    pico_folder: Path, pico_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ls.SettingsError, match=r"2 processes were started \(WORLD_SIZE\)"):
        ls.prune(pico_folder, data=pico_data, out=tmp_path / "run", settings=settings(), progress=False)
    assert not (tmp_path / "run").exists()


def test_a_teacher_that_nobody_knows_is_refused(pico_folder: Path, pico_data: Path, tmp_path: Path) -> None:
    with pytest.raises(ls.SettingsError, match=r"the full model that .* was cut from is not known"):
        ls.recover(
            pico_folder,
            data=pico_data,
            out=tmp_path / "run",
            settings=settings(distill={"teacher": "on"}),
            progress=False,
        )
    assert not (tmp_path / "run").exists()


def test_the_first_gpu_is_the_one_that_trains(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices.torch, "empty", lambda *_, **__: None)  # as on a machine with several
    assert devices.resolve_device("cuda:0") == torch.device("cuda:0")
    with pytest.raises(ls.SettingsError, match="start with CUDA_VISIBLE_DEVICES=1 and leave `device` out"):
        devices.resolve_device("cuda:1")


def test_an_analysis_asks_for_no_disk(
    pico_folder: Path, pico_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    monkeypatch.setattr(open_run, "check_space", lambda _, needed: asked.append(needed))
    for command in ("analyze", "recover", "prune", "compress"):
        open_run.open_run(command, pico_folder, pico_data, tmp_path / command, settings(), False, False, False)
    assert asked[0] == 0
    assert 0 < asked[1] < asked[2] < asked[3]
