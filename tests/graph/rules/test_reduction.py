"""Operators that reduce an axis, or couple all entries along it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lorashear.graph.groups import Exactness

See = Callable[..., Any]


@pytest.mark.parametrize(
    ("operator", "named"),
    [
        (lambda h: h.softmax(-1), "_softmax"),
        (lambda h: h.log_softmax(-1), "_log_softmax"),
        (lambda h: h.cumsum(-1), "cumsum"),
        (lambda h: h * h.amax(-1, keepdim=True), "amax"),
        (lambda h: h * h.max(-1, keepdim=True).values, "max"),
        (lambda h: h - h.var(-1, keepdim=True), "var"),
        (lambda h: h - h.logsumexp(-1, keepdim=True), "logsumexp"),
        (lambda h: h - h.prod(-1, keepdim=True), "prod"),
    ],
)
def test_what_couples_entries_is_not_exact(see: See, operator: Callable[[Tensor], Tensor], named: str) -> None:
    seen = see(lambda m, x: operator(x @ m.a) @ m.b, a=(2, 5), b=(5, 2))
    assert seen.ties == []
    assert seen.why("a.1") == f"not exact: {named} in the model couples its entries"


def test_sorted_entries_stay(see: See) -> None:
    assert see(lambda m, x: (x @ m.a).sort(-1).values @ m.b, a=(2, 5), b=(5, 2)).ties == []


@pytest.mark.parametrize(
    "operator",
    [
        lambda h: h.sum(-1, keepdim=True),
        lambda h: h.sum((0, 2), keepdim=True),
        lambda h: h.sum(),
        lambda h: torch.linalg.vector_norm(h, dim=-1, keepdim=True),
        lambda h: h.norm(dim=-1, keepdim=True),
    ],
)
def test_zeros_add_nothing_to_a_sum(see: See, operator: Callable[[Tensor], Tensor]) -> None:
    seen = see(lambda m, x: (operator(h := x @ m.a) * h) @ m.b, a=(2, 5), b=(5, 2))
    assert seen.ties == [{"a.1": [1], "b.0": [1]}]


def test_a_sum_over_one_dimension_leaves_the_others(see: See) -> None:
    seen = see(lambda m, x: (x @ m.a).view(1, 3, 4, 5).sum(2) @ m.b, a=(2, 20), b=(5, 2))
    assert seen.ties == [{"a.1": [5, 6, 7, 8, 9]}, {"a.1": [1, 6, 11, 16], "b.0": [1]}]


@pytest.mark.parametrize(
    "operator", [lambda h: h.mean(-1, keepdim=True), lambda h: h.square().mean(-1, keepdim=True).rsqrt()]
)
def test_a_mean_is_exact_once_it_is_rescaled(see: See, operator: Callable[[Tensor], Tensor]) -> None:
    seen = see(lambda m, x: (operator(h := x @ m.a) * h) @ m.b, a=(2, 5), b=(5, 2))
    group = seen.group("a.1")
    assert (group.exactness, seen.why("a.1")) == (Exactness.RESCALED, "averaged over by mean in the model")
    assert group is seen.group("b.0")


def test_the_least_entry_is_no_sum(see: See) -> None:
    seen = see(lambda m, x: torch.linalg.vector_norm(x @ m.a, -torch.inf, dim=-1, keepdim=True) * m.b, a=(2, 5), b=(2,))
    assert seen.ties == []


def test_a_mean_of_what_is_not_zero_is_not_exact(see: See) -> None:
    seen = see(lambda m, x: (x @ m.a).sigmoid().mean(-1, keepdim=True) * m.b, a=(2, 5), b=(2,))
    assert seen.group("a.1").exactness is Exactness.PINNED


@pytest.mark.parametrize("operator", [lambda h: h.softmax(1), lambda h: h.cumsum(1), lambda h: h.amax(1, keepdim=True)])
def test_what_goes_over_the_sequence_leaves_the_channels(see: See, operator: Callable[[Tensor], Tensor]) -> None:
    seen = see(lambda m, x: operator(x @ m.a) @ m.b, a=(2, 5), b=(5, 2))
    assert seen.ties == [{"a.1": [1], "b.0": [1]}]


def test_heads_ride_along_a_softmax_over_the_sequence(see: See) -> None:
    def run(m: Any, x: Tensor) -> Tensor:
        q, k = ((x @ each).view(1, 3, 4, 5).transpose(1, 2) for each in (m.q, m.k))
        return ((q @ k.mT).softmax(-1) @ x[:, None]).transpose(1, 2).flatten(2) @ m.o

    seen = see(run, q=(2, 20), k=(2, 20), o=(8, 2))
    kinds = {
        g.kind: {f"{m.parameter}.{m.dim}" for m in g.members} for g in seen.graph if not g.reason.startswith("an axis")
    }
    assert kinds["heads"] == {"q.1", "k.1", "o.0"}
    assert kinds["head-dim"] == {"q.1", "k.1"}


def test_a_layer_norm_carries_its_weights_and_is_not_exact(see: See) -> None:
    seen = see(lambda m, x: m.norm(x @ m.a) @ m.b, a=(2, 5), norm=nn.LayerNorm(5), b=(5, 2))
    assert seen.why("a.1") == "not exact: native_layer_norm in norm couples its entries"
    assert seen.group("a.1") is seen.group("norm.weight.0") is seen.group("norm.bias.0") is seen.group("b.0")


def test_a_norm_inside_the_heads_leaves_the_heads(see: See) -> None:
    seen = see(
        lambda m, x: F.layer_norm((x @ m.a).view(1, 3, 4, 5), (5,), m.w).flatten(2) @ m.b, a=(2, 20), w=(5,), b=(20, 2)
    )
    assert seen.ties == [{"a.1": [5, 6, 7, 8, 9], "b.0": [5, 6, 7, 8, 9]}]


def test_a_norm_over_two_dimensions_couples_both(see: See) -> None:
    seen = see(lambda m, x: F.layer_norm((x @ m.a).view(1, 3, 4, 5), (4, 5), m.w).flatten(2) @ m.b,
               a=(2, 20), w=(4, 5), b=(20, 2))  # fmt: skip
    assert seen.ties == []
    assert seen.why("w.0") == seen.why("w.1") == "not exact: native_layer_norm in the model couples its entries"


def test_a_root_mean_square_norm_is_a_mean(see: See) -> None:
    seen = see(lambda m, x: m.norm(x @ m.a) @ m.b, a=(2, 5), norm=nn.RMSNorm(5), b=(5, 2))
    group = seen.group("norm.weight.0")
    assert group is seen.group("a.1") is seen.group("b.0")
    assert group.exactness is Exactness.RESCALED
    assert "norm" in group.reason
