"""Tensors made from nothing but sizes, operators without a rule, and buffers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lorashear.graph.inference import infer
from lorashear.graph.trace import record

See = Callable[..., Any]


@pytest.mark.parametrize(
    "made",
    [
        lambda _: torch.zeros(1, 3, 5),
        lambda _: torch.ones(5),
        lambda _: torch.full((5,), 0.5),
        lambda h: h.new_zeros(5),
        lambda h: h.new_ones(3, 5),
        lambda h: torch.zeros_like(h),
        lambda _: torch.full((), 3.0).expand(5),
    ],
)
def test_constants_are_cut_with_what_they_meet(see: See, made: Callable[[Tensor], Tensor]) -> None:
    seen = see(lambda m, x: ((h := x @ m.a) * made(h) + made(h)) @ m.b, a=(2, 5), b=(5, 2))
    assert seen.ties == [{"a.1": [1], "b.0": [1]}]


@pytest.mark.parametrize(
    "made",
    [
        lambda: torch.arange(5),
        lambda: 2.0 ** -torch.arange(1, 6),
        lambda: torch.cat([torch.arange(3), torch.arange(0, 4, 2)]),
        lambda: torch.linspace(0, 1, 5),
        lambda: torch.eye(5),
    ],
)
def test_values_that_count_the_index_are_cut_with_what_they_meet(see: See, made: Callable[[], Tensor]) -> None:
    seen = see(lambda m, x: ((x @ m.a)[..., None, :] * made()).sum(-2) @ m.b, a=(2, 5), b=(5, 2))
    assert {"a.1": [1], "b.0": [1]} in seen.ties


def test_values_that_count_the_sequence_do_no_harm(see: See) -> None:
    seen = see(lambda m, x: (x @ m.a * torch.arange(3)[:, None]) @ m.b, a=(2, 5), b=(5, 2))
    assert seen.ties == [{"a.1": [1], "b.0": [1]}]


def test_a_buffer_is_cut_with_what_it_meets(see: See) -> None:
    table = nn.Module()
    table.register_buffer("values", torch.rand(5))
    seen = see(lambda m, x: (x @ m.a * m.table.values) @ m.b, a=(2, 5), table=table, b=(5, 2))
    assert seen.ties == [{"a.1": [1], "b.0": [1], "table.values.0": [1]}]


def test_a_literal_of_the_code_is_cut_with_what_it_meets(see: See) -> None:
    seen = see(lambda m, x: (x @ m.a * torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0])) @ m.b, a=(2, 5), b=(5, 2))
    assert seen.ties == [{"a.1": [1], "b.0": [1]}]


@pytest.mark.parametrize(
    ("operator", "named"),
    [
        (torch.i0, "i0"),
        (torch.lgamma, "lgamma"),
        (lambda h: torch.fft.fft(h).real, "_fft_r2c"),
        (lambda h: h.median(-1, keepdim=True).values * h, "median"),
        (lambda h: torch.cdist(h, h) @ h, "_cdist_forward"),
        (lambda h: torch.bucketize(h, torch.tensor([0.0, 1.0])) * h, "bucketize"),
        (lambda h: h.clone().lgamma_(), "lgamma_"),
        (lambda h: torch.searchsorted(torch.arange(5.0), h) * h, "searchsorted"),
    ],
)
def test_an_operator_without_a_rule_is_named_where_it_stands_in_the_way(
    see: See, operator: Callable[[Tensor], Tensor], named: str
) -> None:
    seen = see(lambda m, x: operator(x @ m.a) @ m.b + torch.relu(x @ m.c) @ m.d, a=(2, 5), b=(5, 2), c=(2, 4), d=(4, 2))
    assert f"no rule for {named} in the model" in seen.why("a.1")
    assert seen.why("b.0")
    assert seen.ties == [{"c.1": [1], "d.0": [1]}]


def test_a_call_that_a_rule_does_not_know_pins_and_does_not_raise() -> None:
    """`repeat` with more factors than the rule was given axes for."""
    module = nn.Linear(2, 5)
    trace = record(Sequence(module), {"x": torch.zeros(1, 3, 2)})
    (relu,) = [node for node in trace.nodes if node.name == "relu"]
    relu.args = (relu.args[0], "what is this", None)
    relu.op = torch.ops.aten.gather.default
    axis = infer(trace).dims[relu.outs[0]][-1]
    assert axis.root().tags["pin"] == "no rule for gather in the model"


class Sequence(nn.Module):
    def __init__(self, first: nn.Module) -> None:
        super().__init__()
        self.first = first

    def forward(self, x: Tensor, **_: Any) -> Tensor:
        return torch.relu(self.first(x)).sum(-1)
