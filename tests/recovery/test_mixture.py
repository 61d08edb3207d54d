from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from lorashear.recovery.mixture import MixtureDataset, deviation_weights, proportional_weights


@dataclass(frozen=True)
class Source:
    """Windows that are told apart by their first token: 100 x source + number."""

    name: str
    train: Tensor
    weight: float = 1.0


def source(name: str, number: int, windows: int, window: int = 3) -> Source:
    return Source(name, (100 * number + torch.arange(windows))[:, None].expand(windows, window).contiguous())


SOURCES = (source("a", 1, 7), source("b", 2, 5), source("c", 3, 11))
EVEN = {"a": 1.0, "b": 1.0, "c": 1.0}


def mixture(weights: dict[str, float] = EVEN, *, samples: int = 60, seed: int = 0) -> MixtureDataset:
    return MixtureDataset(SOURCES, weights, num_samples=samples, seed=seed)


def drawn(dataset: MixtureDataset) -> list[int]:
    return [int(dataset[n]["input_ids"][0]) for n in range(len(dataset))]


def test_samples_are_windows_of_the_source_that_is_named() -> None:
    dataset = mixture()
    for n in range(len(dataset)):
        window = dataset[n]["input_ids"]
        assert window.shape == (3,)
        assert window.dtype == torch.int64
        assert "abc"[int(window[0]) // 100 - 1] == dataset.source_of(n)
    with pytest.raises(IndexError, match="sample 60 of 60"):
        dataset[60]


def test_the_seed_decides_alone_whatever_the_order_of_reading() -> None:
    torch.manual_seed(5)
    first = drawn(mixture())
    torch.manual_seed(6)
    assert drawn(mixture()) == first
    assert drawn(mixture(seed=1)) != first
    backwards = mixture()
    assert [int(backwards[n]["input_ids"][0]) for n in reversed(range(60))][::-1] == first


def test_no_window_repeats_before_all_of_its_source_were_seen() -> None:
    dataset = mixture({"a": 3.0, "b": 1.0, "c": 2.0}, samples=200)
    dataset.change(77, {"a": 1.0, "b": 5.0})
    by_source: dict[str, list[int]] = {}
    for n, token in enumerate(drawn(dataset)):
        by_source.setdefault(dataset.source_of(n), []).append(token)
    for each in SOURCES:
        tokens, size = by_source[each.name], len(each.train)
        laps = [tokens[start : start + size] for start in range(0, len(tokens), size)]
        assert all(len(set(lap)) == len(lap) for lap in laps)
        assert len(laps) < 3 or laps[0] != laps[1]  # each pass has an order of its own


def test_shares_follow_the_weights() -> None:
    dataset = mixture({"a": 1.0, "c": 3.0}, samples=4000)
    counts = Counter(dataset.source_of(n) for n in range(4000))
    assert set(counts) == {"a", "c"}
    assert counts["c"] / 4000 == pytest.approx(0.75, abs=0.03)


def test_a_change_counts_from_its_sample_and_leaves_what_came_before() -> None:
    before = drawn(mixture())
    dataset = mixture()
    dataset.change(40, {"b": 1.0})
    assert drawn(dataset)[:40] == before[:40]
    assert {dataset.source_of(n) for n in range(40, 60)} == {"b"}
    dataset.change(50, {"a": 1.0})
    assert [dataset.source_of(n) for n in range(39, 60)] == [dataset.source_of(39), *"b" * 10, *"a" * 10]
    assert [change.from_sample for change in dataset.history] == [0, 40, 50]


def test_a_history_that_is_replayed_gives_the_same_samples() -> None:
    dataset = mixture()
    dataset.change(21, {"a": 0.1, "b": 0.9})
    dataset.change(33, {"c": 1.0, "b": 0.25})
    again = mixture()
    for change in dataset.history:
        again.change(change.from_sample, change.weights)
    assert drawn(again) == drawn(dataset)
    assert again.history == dataset.history


def test_a_change_past_the_end_changes_nothing() -> None:
    dataset = mixture()
    before = drawn(dataset)
    dataset.change(64, {"b": 1.0})
    assert drawn(dataset) == before


def test_weights_that_draw_nothing() -> None:
    with pytest.raises(ValueError, match=r"weights for \['d'\]"):
        mixture({"d": 1.0})
    with pytest.raises(ValueError, match="all weights are 0"):
        mixture({"a": 0.0, "b": -1.0})


def test_proportional_weights() -> None:
    assert proportional_weights(SOURCES) == pytest.approx({"a": 7 / 23, "b": 5 / 23, "c": 11 / 23})


def test_a_source_counts_what_it_weighs() -> None:
    heavy = [replace(SOURCES[0], weight=4.0), replace(SOURCES[1], weight=0.0), SOURCES[2]]
    assert proportional_weights(heavy) == pytest.approx({"a": 28 / 39, "b": 0.0, "c": 11 / 39})


def test_deviation_weights_have_a_floor() -> None:
    proportional = {"a": 0.5, "b": 0.25, "c": 0.25}
    weights = deviation_weights({"a": 0.1, "b": 0.3, "c": -0.2}, proportional, floor=0.2)
    assert weights == pytest.approx({"a": 0.1 + 0.8 * 0.25, "b": 0.05 + 0.8 * 0.75, "c": 0.05})
    assert sum(weights.values()) == pytest.approx(1.0)


def test_sources_without_a_deviation_keep_the_floor_only() -> None:
    weights = deviation_weights({"a": 2.0}, {"a": 1.0, "b": 3.0}, floor=0.4)
    assert weights == pytest.approx({"a": 0.1 + 0.6, "b": 0.3})


def test_where_nothing_is_missing_the_sizes_decide() -> None:
    assert deviation_weights({"a": -1.0, "b": 0.0}, {"a": 1.0, "b": 3.0}, floor=0.1) == {"a": 0.25, "b": 0.75}
