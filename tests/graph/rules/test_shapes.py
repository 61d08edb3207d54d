"""Dimensions that are split, merged, reordered or repeated."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

See = Callable[..., Any]


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Of `(batch, sequence, heads, dim)`, to `(batch, sequence, heads * dim)`."""
    q, k, v = (each.transpose(1, 2) for each in (q, k, v))
    return ((q @ k.mT).softmax(-1) @ v).transpose(1, 2).flatten(2)


def test_heads_and_their_dimensions_are_told_apart_by_a_view(see: See) -> None:
    seen = see(lambda m, x: (x @ m.a).view(1, 3, 3, 4).transpose(2, 3).flatten(2) @ m.b, a=(2, 12), b=(12, 2))
    assert seen.ties == [
        {"a.1": [4, 5, 6, 7], "b.0": [1, 4, 7, 10]},
        {"a.1": [1, 5, 9], "b.0": [3, 4, 5]},
    ]


@pytest.mark.parametrize("heads_first", [True, False])
def test_fused_attention_as_one_view(see: See, heads_first: bool) -> None:
    """`view(heads, 3, dim)` or `(3, heads, dim)`: the 3 is told apart; query, key and value lose the same dimensions."""

    def run(m: Any, x: Tensor) -> Tensor:
        sizes = (2, 3, 4) if heads_first else (3, 2, 4)
        return attend(*(x @ m.qkv).view(1, 3, *sizes).unbind(3 if heads_first else 2)) @ m.o

    one_head = list(range(12, 24)) if heads_first else [*range(4, 8), *range(12, 16), *range(20, 24)]
    assert see(run, qkv=(2, 24), o=(8, 2)).ties == [
        {"qkv.1": one_head, "o.0": [4, 5, 6, 7]},
        {"qkv.1": [1, 5, 9, 13, 17, 21], "o.0": [1, 5]},
    ]


def test_fused_attention_in_three_blocks(see: See) -> None:
    """A chunk first, and a view of each: a head is three stretches of rows."""

    def run(m: Any, x: Tensor) -> Tensor:
        return attend(*(each.view(1, 3, 2, 4) for each in (x @ m.qkv).chunk(3, -1))) @ m.o

    seen = see(run, qkv=(2, 24), o=(8, 2))
    heads, query_key, value = sorted(seen.ties, key=lambda tie: -len(tie["qkv.1"]))
    assert heads == {"qkv.1": [*range(4, 8), *range(12, 16), *range(20, 24)], "o.0": [4, 5, 6, 7]}
    assert query_key == {"qkv.1": [1, 5, 9, 13]}
    assert value == {"qkv.1": [17, 21], "o.0": [1, 5]}


def test_keys_that_are_expanded_serve_several_queries(see: See) -> None:
    def run(m: Any, x: Tensor) -> Tensor:
        k, v = ((x @ w).view(1, 3, 2, 1, 5).expand(1, 3, 2, 3, 5).flatten(2, 3) for w in (m.k, m.v))
        return attend((x @ m.q).view(1, 3, 6, 5), k, v) @ m.o

    seen = see(run, q=(2, 30), k=(2, 10), v=(2, 10), o=(30, 2))
    heads = {
        "k.1": list(range(5, 10)),
        "v.1": list(range(5, 10)),
        "q.1": list(range(15, 30)),
        "o.0": list(range(15, 30)),
    }
    slots = [*range(5, 10), *range(20, 25)]
    assert heads in seen.ties
    assert {"q.1": slots, "o.0": slots} in seen.ties
    assert {"q.1": [1, 6, 11, 16, 21, 26], "k.1": [1, 6]} in seen.ties
    assert {"v.1": [1, 6], "o.0": [1, 6, 11, 16, 21, 26]} in seen.ties


def test_copies_are_the_outer_index(see: See) -> None:
    seen = see(lambda m, x: (x @ m.a).repeat(1, 1, 2) @ m.b, a=(2, 5), b=(10, 2))
    assert seen.ties == [{"a.1": [1], "b.0": [1, 6]}, {"b.0": [5, 6, 7, 8, 9]}]


def test_copies_in_a_new_dimension(see: See) -> None:
    seen = see(lambda m, x: ((x @ m.a).repeat(4, 1, 1, 1) * m.b).sum(0) @ m.c, a=(2, 5), b=(4, 1, 1, 5), c=(5, 2))
    assert seen.ties == [{"a.1": [1], "b.3": [1], "c.0": [1]}, {"b.0": [1]}]


def test_units_come_and_go(see: See) -> None:
    seen = see(
        lambda m, x: ((x @ m.a).unsqueeze(2) * m.b).squeeze(2).permute(0, 2, 1).mT @ m.c, a=(2, 5), b=(1, 5), c=(5, 2)
    )
    assert seen.ties == [{"a.1": [1], "b.1": [1], "c.0": [1]}]


def test_views_that_cut_across_each_other_stay(see: See) -> None:
    def run(m: Any, x: Tensor) -> Tensor:
        hidden = x @ m.a
        first, second = hidden.view(1, 3, 4, 6), hidden.view(1, 3, 6, 4)
        return first.transpose(2, 3).flatten(2) @ m.b + second.transpose(2, 3).flatten(2) @ m.c

    seen = see(run, a=(2, 24), b=(24, 2), c=(24, 2))
    assert seen.ties == []
    assert seen.why("a.1").startswith("ragged split (4 of 6) at ")
    assert all("view in the model" in seen.why(at) for at in ("a.1", "b.0", "c.0"))


def test_views_that_refine_each_other_share_a_factor(see: See) -> None:
    def run(m: Any, x: Tensor) -> Tensor:
        hidden = x @ m.a
        first, second = hidden.view(1, 3, 2, 12), hidden.view(1, 3, 8, 3)
        return first.transpose(2, 3).flatten(2) @ m.b + second.transpose(2, 3).flatten(2) @ m.c

    ties = see(run, a=(2, 24), b=(24, 2), c=(24, 2)).ties
    assert [tie["a.1"] for tie in ties] == [
        list(range(12, 24)),
        [3, 4, 5, 15, 16, 17],
        [1, 4, 7, 10, 13, 16, 19, 22],
    ]


def test_the_two_halves_of_a_complex_number_stay(see: See) -> None:
    """Rotary embedding with complex numbers: the pairs can go, real and imaginary part cannot."""

    def run(m: Any, x: Tensor) -> Tensor:
        turned = torch.view_as_complex((x @ m.a).view(1, 3, 4, 2)) * torch.view_as_complex(m.turn)
        return torch.view_as_real(turned).flatten(2) @ m.b

    seen = see(run, a=(2, 8), turn=(4, 2), b=(8, 2))
    assert seen.ties == [{"a.1": [2, 3], "turn.0": [1], "b.0": [2, 3]}]
    assert "real and imaginary part of view_as_complex" in seen.why("a.1")
    assert "real and imaginary part of view_as_real" in seen.why("b.0")


@pytest.mark.parametrize(
    "change",
    [
        lambda h: h.unsqueeze_(2).sum(2),
        lambda h: (h[:, :, None] * 1.0).squeeze_(2),
        lambda h: (h.view(1, 3, 5, 1, 1).expand(1, 3, 5, 4, 2).clone().transpose_(3, 4) * 1.0).sum((3, 4)),
    ],
)
def test_shapes_that_change_in_place(see: See, change: Callable[[Tensor], Tensor]) -> None:
    seen = see(lambda m, x: change(x @ m.a) @ m.b, a=(2, 5), b=(5, 2))
    assert seen.ties == [{"a.1": [1], "b.0": [1]}]
