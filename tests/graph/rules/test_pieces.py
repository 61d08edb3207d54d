"""Dimensions that are taken apart or put together."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

See = Callable[..., Any]


def test_a_slice_leaves_three_pieces(see: See) -> None:
    seen = see(lambda m, x: (x @ m.a)[..., 2:5] @ m.b + (x @ m.a)[..., -4:] @ m.c, a=(2, 9), b=(3, 2), c=(4, 2))
    assert seen.ties == [{"a.1": [1]}, {"a.1": [3], "b.0": [1]}, {"a.1": [6], "c.0": [1]}]


def test_slices_that_overlap_refine_each_other(see: See) -> None:
    seen = see(lambda m, x: (x @ m.a)[..., :6] @ m.b + (x @ m.a)[..., 3:] @ m.c, a=(2, 8), b=(6, 2), c=(5, 2))
    assert seen.ties == [{"a.1": [1], "b.0": [1]}, {"a.1": [4], "b.0": [4], "c.0": [1]}, {"a.1": [7], "c.0": [4]}]


def test_an_empty_slice_takes_nothing(see: See) -> None:
    """`q[..., rotary_dim:]` of a model whose rotary embedding turns all of it."""
    seen = see(lambda m, x: torch.cat([(x @ m.a)[..., :5], (x @ m.a)[..., 5:]], -1) @ m.b, a=(2, 5), b=(5, 2))
    assert seen.ties == [{"a.1": [1], "b.0": [1]}]


def test_interleaved_gate_and_up_go_in_pairs(see: See) -> None:
    seen = see(lambda m, x: ((h := x @ m.a)[..., ::2].sigmoid() * h[..., 1::2]) @ m.b, a=(2, 10), b=(5, 2))
    assert seen.ties == [{"a.1": [2, 3], "b.0": [1]}]
    assert seen.why("a.1") == "its positions are told apart by slice in the model"


def test_a_step_that_does_not_come_out_even_stays(see: See) -> None:
    seen = see(lambda m, x: (x @ m.a)[..., ::4] @ m.b, a=(2, 10), b=(3, 2))
    assert seen.ties == []
    assert seen.why("a.1") == seen.why("b.0") == "a step of 4 in slice in the model"


def test_a_step_that_does_not_start_in_the_first_stretch(see: See) -> None:
    seen = see(lambda m, x: (x @ m.a)[..., 3::4] @ m.b, a=(2, 12), b=(3, 2))
    assert seen.ties == [{"a.1": [4, 5, 6, 7], "b.0": [1]}]


def test_one_index_is_told_apart_from_those_around_it(see: See) -> None:
    seen = see(lambda m, x: ((h := (x @ m.a).view(1, 3, 5, 4)).select(2, -2) + h[:, :, 0]) @ m.b, a=(2, 20), b=(4, 2))
    assert {"a.1": [1, 5, 9, 13, 17], "b.0": [1]} in seen.ties
    assert {"a.1": [8, 9, 10, 11]} in seen.ties  # the second of those between 0 and -2


def test_halves_that_are_multiplied_are_one_structure(see: See) -> None:
    seen = see(lambda m, x: torch.mul(*(x @ m.a).split(5, -1)) @ m.b, a=(2, 10), b=(5, 2))
    assert seen.ties == [{"a.1": [1, 6], "b.0": [1]}]


def test_unequal_parts_are_groups_of_their_own(see: See) -> None:
    def run(m: Any, x: Tensor) -> Tensor:
        p, q, r = (x @ m.a).split([2, 3, 4], -1)
        return p @ m.p + q.relu() @ m.q + r.tanh() @ m.r

    assert see(run, a=(2, 9), p=(2, 2), q=(3, 2), r=(4, 2)).ties == [
        {"a.1": [1], "p.0": [1]},
        {"a.1": [3], "q.0": [1]},
        {"a.1": [6], "r.0": [1]},
    ]


def test_what_is_unbound_stays(see: See) -> None:
    seen = see(lambda m, x: sum((h.tanh() for h in (x @ m.a).view(1, 3, 4, 5).unbind(2)), start=0 * m.b) @ m.c,
               a=(2, 20), b=(5,), c=(5, 2))  # fmt: skip
    assert seen.ties == [{"a.1": [1, 6, 11, 16], "b.0": [1], "c.0": [1]}]


def test_what_is_joined_keeps_its_groups(see: See) -> None:
    seen = see(lambda m, x: torch.cat([x @ m.a, x @ m.b], -1) @ m.c, a=(2, 3), b=(2, 4), c=(7, 2))
    assert seen.ties == [{"a.1": [1], "c.0": [1]}, {"b.1": [1], "c.0": [4]}]


def test_joining_ties_the_other_dimensions(see: See) -> None:
    seen = see(
        lambda m, x: torch.cat([x @ m.a, x @ m.b, m.c], 1).sum(1) @ m.d, a=(2, 3), b=(2, 3), c=(1, 4, 3), d=(3, 2)
    )
    assert {"a.1": [1], "b.1": [1], "c.2": [1], "d.0": [1]} in seen.ties


def test_rotated_halves_pair_up(see: See) -> None:
    def run(m: Any, x: Tensor) -> Tensor:
        q = x @ m.q
        first, second = q[..., :3], q[..., 3:]
        return (q * m.cos + torch.cat([-second, first], -1) * m.sin) @ m.o

    seen = see(run, q=(2, 6), cos=(6,), sin=(6,), o=(6, 2))
    assert seen.ties == [{"q.1": [1, 4], "cos.0": [1, 4], "sin.0": [1, 4], "o.0": [1, 4]}]


def test_stacked_operands_are_told_apart(see: See) -> None:
    seen = see(lambda m, x: torch.stack([x @ m.a, x @ m.b], 2).flatten(2) @ m.c, a=(2, 5), b=(2, 5), c=(10, 2))
    assert seen.ties == [{"a.1": [1], "b.1": [1], "c.0": [1, 6]}]
    assert seen.why("c.0") == "operands are told apart by stack in the model"


def test_padding_stays_beside_what_is_padded(see: See) -> None:
    seen = see(lambda m, x: F.pad(x @ m.a, (1, 2)) @ m.b, a=(2, 4), b=(7, 2))
    assert seen.ties == [{"a.1": [1], "b.0": [2]}]
    assert seen.why("b.0") == "padding of constant_pad_nd in the model"


def test_padding_of_what_stays_stays(see: See) -> None:
    seen = see(lambda m, x: F.pad(x.mT.abs(), (0, 2)) @ m.a, a=(5, 3))
    assert seen.ties == []
    assert "input x" in seen.why("a.0")


@pytest.mark.parametrize(
    ("order", "named"),
    [
        (lambda h: h.flip(-1), "flip"),
        (lambda h: h.roll(1, -1), "roll"),
        (lambda h: h.tril(), "tril"),
        (lambda h: h.triu(), "triu"),
        (lambda h: h.unfold(-1, 2, 2).flatten(-2), "unfold"),
    ],
)
def test_positions_that_mean_something_stay(see: See, order: Callable[[Tensor], Tensor], named: str) -> None:
    seen = see(lambda m, x: order(x @ m.a) @ m.b, a=(2, 6), b=(6, 2))
    assert seen.ties == []
    assert f"told apart by {named} in the model" in seen.why("a.1")
    assert seen.why("b.0")


def test_joining_with_nothing(see: See) -> None:
    seen = see(lambda m, x: torch.cat([torch.zeros(0), x @ m.a], -1) @ m.b, a=(2, 5), b=(5, 2))
    assert seen.ties == [{"a.1": [1], "b.0": [1]}]


def test_padding_on_one_side_and_less_on_the_other(see: See) -> None:
    seen = see(lambda m, x: F.pad(x @ m.a, (-1, 1)) @ m.b, a=(2, 6), b=(6, 2))
    assert seen.ties == [{"a.1": [2], "b.0": [1]}]


def test_negative_padding_takes_away(see: See) -> None:
    seen = see(lambda m, x: F.pad(x @ m.a, (0, -2)) @ m.b, a=(2, 6), b=(4, 2))
    assert seen.ties == [{"a.1": [1], "b.0": [1]}, {"a.1": [5]}]
