"""A module out of a function and the shapes of its parameters, and what its trace says of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from random import Random

import pytest
import torch
from torch import Tensor, nn

import lorashear as ls
from lorashear.graph.groups import Exactness, Kind
from lorashear.graph.replay import Replay


class Small(nn.Module):
    def __init__(self, run: Callable[..., Tensor], parts: dict[str, tuple[int, ...] | nn.Module]) -> None:
        super().__init__()
        self.run = run
        random = torch.Generator().manual_seed(0)
        for name, part in parts.items():
            made = part if isinstance(part, nn.Module) else nn.Parameter(torch.randn(part, generator=random))
            setattr(self, name, made)
        self.eval()

    def forward(self, use_cache: bool = False, **inputs: Tensor) -> Tensor:  # noqa: ARG002
        return self.run(self, **inputs)


@dataclass(frozen=True)
class Seen:
    graph: ls.Graph

    @property
    def ties(self) -> list[dict[str, list[int]]]:
        """Structure 1 of every group that can be cut exactly: "parameter.dim" -> rows."""
        found = [group for group in self.graph if group.exactness is Exactness.EXACT]
        return [{f"{m.parameter}.{m.dim}": m.rows[1].tolist() for m in group.members} for group in found]

    def why(self, at: str) -> str:
        """What keeps the groups along "parameter.dim" from being cut."""
        groups = [g for g in self.graph if at in {f"{m.parameter}.{m.dim}" for m in g.members}]
        assert groups
        return "; ".join(group.reason for group in groups if group.exactness is not Exactness.EXACT)

    def group(self, at: str) -> ls.NodeGroup:
        """The one group along "parameter.dim"."""
        (group,) = [g for g in self.graph if at in {f"{m.parameter}.{m.dim}" for m in g.members}]
        return group


See = Callable[..., Seen]


@pytest.fixture
def see() -> See:
    """Calls `run(module, x)` on `x` `(1, 3, 2)`, or on given inputs; proves on the way that (zeroed == cut)."""

    def build(
        run: Callable[..., Tensor], *, inputs: dict[str, Tensor] | None = None, **parts: tuple[int, ...] | nn.Module
    ) -> Seen:
        random = torch.Generator().manual_seed(1)
        inputs = {"x": torch.randn(1, 3, 2, generator=random)} if inputs is None else inputs
        module = Small(run, parts)
        graph = ls.discover(module, inputs=inputs)
        for seed in range(3):
            prove(graph, module, inputs, Random(seed))
        return Seen(graph)

    return build


def prove(graph: ls.Graph, module: Small, inputs: dict[str, Tensor], random: Random) -> None:
    """Cuts some structures of all exact groups at once; a removed expert is one that the router cannot choose."""
    assert graph.inference is not None
    whole = dict(module.state_dict())
    zeroed = {name: tensor.clone() for name, tensor in whole.items()}
    groups = [g for g in graph if g.exactness is Exactness.EXACT and g.size > g.minimum]
    removed = {g.name: random.sample(range(g.size), random.randint(1, g.size - g.minimum)) for g in groups}
    for group in groups:
        for member in group.members:
            if group.kind is not Kind.EXPERTS:
                zeroed[member.parameter].index_fill_(member.dim, member.rows[removed[group.name]].flatten(), 0.0)
    masked = graph.keep_leaves({g.name: removed[g.name] for g in groups if g.kind is Kind.EXPERTS})
    (uncut,) = Replay(graph.inference).run(whole, inputs)
    with torch.no_grad():
        torch.testing.assert_close(uncut, module(**inputs))
    (expected,) = Replay(graph.inference, masked=masked).run(zeroed, inputs)
    (out,) = Replay(graph.inference, graph.keep_leaves(removed)).run(whole, inputs)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
