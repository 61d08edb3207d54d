"""Settings from a file, from options, and by assignment."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import lorashear as ls
from lorashear.config import CompressSettings
from lorashear.pruning.methods import wants_profile
from lorashear.settings_file import read_settings


def test_later_sources_win(tmp_path: Path) -> None:
    file = tmp_path / "s.yaml"
    file.write_text("tokens: 5\nprune: {ratio: 0.3, periods: 7}\n")
    settings = read_settings(
        base={"tokens": 4, "seed": 3}, file=file, options={"prune.ratio": 0.4}, assignments=["prune.periods=9"]
    )
    assert (settings.tokens, settings.seed, settings.prune.ratio, settings.prune.periods) == (5, 3, 0.4, 9)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("prune: {ratoi: 0.3}", r'unknown key "prune.ratoi"; did you mean "ratio"'),
        ("prune: {ratio: 1.5}", r"prune.ratio = 1.5: Input should be less than 1"),
        ("prune: [1", "not readable as YAML"),
        ("- 1", "expected a mapping"),
    ],
)
def test_mistakes_in_a_file_are_named(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "s.yaml"
    file.write_text(text)
    with pytest.raises(ls.SettingsError, match=message) as raised:
        read_settings(file=file)
    assert str(file) in str(raised.value)


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("prune.periods", "expected KEY=VALUE"),
        ("seed={1", "--set seed={1: the value is not readable as YAML"),
        ("prunes.periods=1", 'unknown key "prunes"'),
        ("seed.x=1", "seed"),
        ("seed=-1", "seed = -1: Input should be greater than or equal to 0"),
        ("data=5", "data = 5"),
        ("data=", "data = None"),
        ("data.window=1", "data.window = 1: Input should be greater than or equal to 2"),
        ("data.weights={web: .inf}", "data.weights.web = inf: Input should be a finite number"),
        ("prune.warmup=1.0", "prune.warmup = 1.0: Input should be less than 1"),
    ],
)
def test_mistakes_in_an_assignment_are_named(assignment: str, message: str) -> None:
    with pytest.raises(ls.SettingsError, match=message):
        read_settings(assignments=[assignment])


def test_a_file_that_is_no_text_is_named(tmp_path: Path) -> None:
    file = tmp_path / "s.yaml"
    file.write_bytes(b"prune: \xff\xfe")
    with pytest.raises(ls.SettingsError, match=r"s\.yaml: not readable as YAML"):
        read_settings(file=file)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ls.SettingsError, match="No such file"):
        read_settings(file=tmp_path / "none.yaml")


@pytest.mark.parametrize(
    ("given", "batch"),
    [
        ({}, 8),
        ({"tokens": 204_800}, 2),
        ({"tokens": 2_000_000}, 16),
        ({"tokens": 2_000_000, "data": {"window": 2048}}, 2),
        ({"tokens": 204_800, "micro_batch": 3}, 3),
        ({"tokens": 204_800, "batch": 16}, 16),
    ],
)
def test_batch_follows_the_budget_unless_it_is_set(given: dict[str, Any], batch: int) -> None:
    assert CompressSettings.from_mapping(given).batch == batch


@pytest.mark.parametrize(
    ("assignments", "wanted"),
    [
        ([], False),
        (["prune.shape=per-layer"], False),
        (["analysis.unprunable=0.1"], False),
        (["prune.shape=per-layer", "analysis.unprunable=0.1"], True),
        (["analysis.in_compress=true"], True),
        (["prune.shape=per-layer", "analysis.unprunable=0.1", "analysis.in_compress=false"], False),
    ],
)
def test_the_profile_is_measured_where_it_decides_something(assignments: list[str], wanted: bool) -> None:
    assert wants_profile(read_settings(assignments=assignments)) is wanted


def test_a_weight_is_assigned_by_its_dotted_name() -> None:
    assert read_settings(assignments=["data.weights.code=4"]).data.weights == {"code": 4.0}


@pytest.mark.parametrize("value", ["on", "off", "auto", '"off"'])
def test_a_bare_on_or_off_is_the_word(value: str, tmp_path: Path) -> None:
    """YAML reads them as true and false."""
    file = tmp_path / "settings.yaml"
    file.write_text(f"distill:\n  teacher: {value}\n", encoding="utf-8")
    for settings in (read_settings(assignments=[f"distill.teacher={value}"]), read_settings(file=file)):
        assert settings.distill.teacher == value.strip('"')
