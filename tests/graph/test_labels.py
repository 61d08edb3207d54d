"""What groups are called."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import lorashear as ls
from lorashear.graph.groups import Kind


class Attention(nn.Module):
    """Six queries of two channels over three key/value heads, five tokens of seven channels."""

    def __init__(self, *, bias: bool, single: bool) -> None:
        super().__init__()
        self.heads = 1 if single else 3
        self.q, self.o = nn.Parameter(torch.randn(7, 12)), nn.Parameter(torch.randn(12, 7))
        self.k, self.v = (nn.Parameter(torch.randn(7, 2 * self.heads)) for _ in range(2))
        self.bias = nn.Parameter(torch.randn(7, 5)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        repeats = 6 // self.heads
        q, k, v = (self.apart(x @ weight) for weight in (self.q, self.k, self.v))
        k, v = (t[:, None].expand(self.heads, repeats, 5, 2).reshape(6, 5, 2) for t in (k, v))
        scores = q @ k.mT
        if self.bias is not None:
            scores = scores + (x @ self.bias).expand(6, 5, 5)
        return (scores.softmax(-1) @ v).transpose(0, 1).reshape(5, 12) @ self.o

    @staticmethod
    def apart(x: Tensor) -> Tensor:
        return x.view(5, -1, 2).transpose(0, 1)


def kinds_of(module: nn.Module) -> dict[Kind, int]:
    graph = ls.discover(module, inputs={"x": torch.randn(5, 7)})
    return {group.kind: group.size for group in graph if group.exact and group.kind in (Kind.HEADS, Kind.QUERY_SLOTS)}


@pytest.mark.parametrize("bias", [False, True])
def test_keys_and_values_tell_heads_from_their_queries(bias: bool) -> None:
    """A bias for all heads repeats over heads and queries alike."""
    assert kinds_of(Attention(bias=bias, single=False)) == {Kind.HEADS: 3, Kind.QUERY_SLOTS: 2}


def test_queries_of_a_single_key_are_heads() -> None:
    assert kinds_of(Attention(bias=False, single=True)) == {Kind.HEADS: 6}
