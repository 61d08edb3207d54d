from __future__ import annotations

import errno
import json
import re
from pathlib import Path
from typing import Any

import pytest
from safetensors import SafetensorError

from lorashear.config import CompressSettings
from lorashear.errors import OutputError, SettingsError
from lorashear.reporting.runfolder import (
    PACKAGES,
    check_output,
    check_space,
    note_stage,
    start_run,
    write_json,
    written_beside,
)

MODEL = {"source": "m", "config": "0123", "parameters": 7}
DATA = {"given": "d.yaml", "sources": {"wiki": "ab", "math": "cd"}}


def begin(out: Path, *, resume: bool = False, **changes: Any) -> dict[str, Any]:
    given = {"settings": CompressSettings(), "command": "compress", "model": MODEL, "data": DATA, **changes}
    return start_run(out, resume=resume, **given)


def names(folder: Path) -> list[str]:
    return sorted(item.name for item in folder.iterdir())


def test_new_and_empty_folders_are_taken_and_nothing_is_created(tmp_path: Path) -> None:
    check_output(tmp_path / "a" / "b", resume=False)
    assert names(tmp_path) == []
    check_output(tmp_path, resume=False)


def test_a_folder_that_holds_something_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(OutputError, match=r"is not empty.*name a new folder.*--resume"):
        check_output(tmp_path, resume=False)
    with pytest.raises(OutputError, match=r"no run to resume \(run\.json is missing\)"):
        check_output(tmp_path, resume=True)
    with pytest.raises(OutputError, match="no run to resume"):
        check_output(tmp_path / "new", resume=True)
    with pytest.raises(OutputError, match="is a file"):
        check_output(tmp_path / "notes.txt", resume=False)


def test_space(tmp_path: Path) -> None:
    check_space(tmp_path / "deep" / "er", 1)
    with pytest.raises(OutputError, match=r"MiB are free on its disk, about [\d,]+ MiB are needed"):
        check_space(tmp_path / "deep" / "er", 2**60)
    assert names(tmp_path) == []


def test_a_run_describes_itself(tmp_path: Path) -> None:
    out = tmp_path / "run"
    info = begin(out)
    assert json.loads((out / "run.json").read_text()) == info
    assert info["command"] == "compress"
    assert CompressSettings.from_mapping(info["settings"]) == CompressSettings()
    assert info["model"] == MODEL
    assert info["data"] == DATA
    assert info["stages"] == {}
    assert set(info["versions"]) == set(PACKAGES)
    note_stage(out, info, "prune", {"net": 0.25})
    again = begin(out, resume=True)
    assert again == info
    assert again["stages"]["prune"]["net"] == 0.25
    assert names(out) == ["run.json"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"settings": CompressSettings(seed=3)}, "started with settings.seed = 0, now it is 3"),
        (
            {"settings": CompressSettings.from_mapping({"batch": 8, "tokens": 5, "prune": {"ratio": 0.5}})},
            "started with settings.prune.ratio = 0.2, now it is 0.5",
        ),
        ({"command": "prune", "settings": CompressSettings(seed=3)}, "command = 'compress', now it is 'prune'"),
        ({"data": {**DATA, "sources": {"wiki": "xy", "math": "cd"}}}, "data.sources.wiki = 'ab', now it is 'xy'"),
        ({"data": {**DATA, "sources": {"wiki": "ab"}}}, "data.sources.math = 'cd', now it is None"),
        ({"model": {**MODEL, "parameters": 8}}, "model.parameters = 7, now it is 8"),
    ],
)  # fmt: skip
def test_a_resume_with_something_else_names_the_first_difference(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    begin(tmp_path)
    before = (tmp_path / "run.json").read_text()
    with pytest.raises(SettingsError, match=re.escape(message) + r".*resume with the same settings"):
        begin(tmp_path, resume=True, **changes)
    assert (tmp_path / "run.json").read_text() == before


def test_a_folder_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "model"
    with written_beside(target) as partial:
        (partial / "a").write_text("1")
        assert not target.exists()
    assert names(target) == ["a"]
    assert target.stat().st_mode & 0o755 == 0o755
    with pytest.raises(FileNotFoundError), written_beside(target) as partial:
        (partial / "b" / "c").write_text("2")
    with pytest.raises(KeyboardInterrupt), written_beside(target):
        raise KeyboardInterrupt
    assert names(target) == ["a"]
    with written_beside(target) as partial:
        (partial / "c").write_text("3")
    assert names(target) == ["c"]
    assert names(target.parent) == ["model"]


def test_what_a_kill_left_is_swept_away(tmp_path: Path) -> None:
    (tmp_path / ".model.partial-x1y2").mkdir()
    (tmp_path / ".model.partial-x1y2" / "half").write_text("")
    (tmp_path / ".other.partial-x1y2").mkdir()
    with written_beside(tmp_path / "model"):
        pass
    assert names(tmp_path) == [".other.partial-x1y2", "model"]


def full(*_: Any, **__: Any) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_full_disk_is_said_and_nothing_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with (
        pytest.raises(OutputError, match=r"model: the disk is full.*free some space"),
        written_beside(tmp_path / "model"),
    ):
        full()
    with pytest.raises(PermissionError), written_beside(tmp_path / "model"):
        raise PermissionError("no")
    (tmp_path / "run.json").write_text("old")
    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(OutputError, match=r"run\.json: the disk is full"):
        write_json(tmp_path / "run.json", {})
    assert names(tmp_path) == ["run.json"]
    assert (tmp_path / "run.json").read_text() == "old"


def test_a_full_disk_under_safetensors(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="the disk is full"), written_beside(tmp_path / "model"):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
    with pytest.raises(SafetensorError), written_beside(tmp_path / "model"):
        raise SafetensorError("something else")
    assert names(tmp_path) == []
