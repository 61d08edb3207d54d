"""Operators that work entry by entry."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from lorashear.graph.groups import Kind

See = Callable[..., Any]

ONE_STRUCTURE = [{"a.1": [1], "b.1": [1], "c.0": [1]}]


@pytest.mark.parametrize(
    "operator",
    [
        torch.add, torch.sub, torch.mul, torch.maximum, torch.atan2, torch.logical_and,
        lambda a, b: torch.where(a > 0, a, b),
        lambda a, b: a.masked_fill(b > 0, 0.0),
        lambda a, b: torch.lerp(a, b, 0.3),
        lambda a, b: torch.addcmul(a, a, b),
        lambda a, b: a / b.exp(),
        lambda a, b: a.copy_(b),
        lambda a, b: a.add_(b).relu_(),
    ],
)  # fmt: skip
def test_equal_dimensions_meet(see: See, operator: Callable[[Tensor, Tensor], Tensor]) -> None:
    seen = see(lambda m, x: operator(x @ m.a, x @ m.b).float() @ m.c, a=(2, 5), b=(2, 5), c=(5, 2))
    assert seen.ties == ONE_STRUCTURE


@pytest.mark.parametrize("name", "relu silu gelu tanh sigmoid softplus mish elu hardswish leaky_relu".split())
def test_activations_keep_what_they_are_given(see: See, name: str) -> None:
    seen = see(lambda m, x: getattr(F, name)(x @ m.first @ m.a) @ m.c, first=(2, 4), a=(4, 5), c=(5, 2))
    assert seen.ties == [{"first.1": [1], "a.0": [1]}, {"a.1": [1], "c.0": [1]}]
    assert seen.group("a.1").kind is Kind.CHANNELS


def test_dimensions_align_from_the_right_and_units_spread(see: See) -> None:
    seen = see(lambda m, x: ((x @ m.a).view(1, 3, 1, 5) * m.b * m.scale + m.c).flatten(2) @ m.d,
               a=(2, 5), b=(4, 1), scale=(1,), c=(4, 5), d=(20, 2))  # fmt: skip
    assert {"b.0": [1], "c.0": [1], "d.0": [5, 6, 7, 8, 9]} in seen.ties
    assert {"a.1": [1], "c.1": [1], "d.0": [1, 6, 11, 16]} in seen.ties


@pytest.mark.parametrize(
    ("operator", "exact"),
    [
        (torch.relu, True), (torch.tanh, True), (lambda h: h * 3, True), (lambda h: h.clamp(-1, 2), True),
        (lambda h: h.pow(2), True), (lambda h: h / 2, True), (lambda h: h.neg(), True), (lambda h: h - h.abs(), True),
        (torch.sigmoid, False), (torch.exp, False), (lambda h: h + 1, False), (lambda h: h.clamp(1, 2), False),
        (lambda h: h.pow(0), False), (torch.cos, False), (F.softplus, False),
        (lambda h: h.masked_fill(h > 0, 1.0), False), (lambda h: torch.where(h > 0, h, 1.0), False),
    ],
)  # fmt: skip
def test_a_sum_needs_zeros_where_something_is_removed(
    see: See, operator: Callable[[Tensor], Tensor], exact: bool
) -> None:
    """Silent at zero or not: decided by what flows, not where the axis ends."""
    seen = see(lambda m, x: operator(x @ m.a).sum(-1, keepdim=True) * m.b, a=(2, 5), b=(2,))
    assert seen.ties == ([{"a.1": [1]}] if exact else [])
    assert exact or seen.why("a.1") == "not exact: sum in the model couples its entries"


def test_sums_of_an_axis_with_itself_the_other_way_round(see: See) -> None:
    """Of all pairs: only equal indices are silent, so a row of a removed structure speaks."""
    seen = see(lambda m, x: ((h := x @ m.a)[..., :, None] * h[..., None, :]).flatten(2) @ m.b, a=(2, 3), b=(9, 2))
    assert [{at: sorted(set(rows)) for at, rows in tie.items()} for tie in seen.ties] == [
        {"a.1": [1], "b.0": [1, 3, 4, 5, 7]}
    ]


@pytest.mark.parametrize(
    "pairs",
    [
        lambda _, h: h[..., :, None] + h[..., None, :],
        lambda m, h: h[..., :, None] * h[..., None, :] + m.bias,
    ],
)
def test_a_sum_over_pairs_of_an_axis_with_itself_is_not_exact(see: See, pairs: Callable[[Any, Tensor], Tensor]) -> None:
    """At (removed, kept) the pair is not zero, and the sum over the first of the two meets it."""
    seen = see(lambda m, x: pairs(m, x @ m.a).sum(-2) @ m.b, a=(2, 3), bias=(3,), b=(3, 2))
    assert seen.ties == []


@pytest.mark.parametrize("operator", [lambda a, b: a / b, torch.fmod, lambda a, b: a + b.abs().log()])
def test_what_is_infinite_at_zero_is_not_exact(see: See, operator: Callable[[Tensor, Tensor], Tensor]) -> None:
    """0 / 0 and 0 * log(0) are not numbers, so nothing can be zeroed here."""
    assert see(lambda m, x: operator(x @ m.a, x @ m.b) @ m.c, a=(2, 5), b=(2, 5), c=(5, 2)).ties == []


def test_bounds_that_are_tensors(see: See) -> None:
    bound = torch.tensor(0.5)
    seen = see(lambda m, x: (x @ m.a).clamp(min=bound).sum(-1, keepdim=True) * m.b, a=(2, 5), b=(2,))
    assert seen.ties == []
