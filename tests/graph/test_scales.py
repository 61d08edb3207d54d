"""Which parameters are multiplied so that a narrower mean gives the same."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import lorashear as ls
from lorashear.graph.groups import Exactness, Kind, NodeGroup
from lorashear.graph.replay import Replay
from lorashear.graph.scales import Differences, NoScaleError, Scale, rescaling

IDS = torch.arange(5).unsqueeze(0)


class Normed(nn.Module):
    """Two writers add to a stream, a norm averages over it, a reader takes it."""

    def __init__(self, *, offset: float = 0.0, spare: bool = True) -> None:
        super().__init__()
        self.table = nn.Embedding(11, 6)
        self.write = nn.Linear(6, 6, bias=False)
        self.weight = nn.Parameter(torch.rand(6))
        self.read = nn.Linear(6, 7)
        self.offset, self.spare = offset, spare

    def forward(self, input_ids: Tensor) -> Tensor:
        stream = self.table(input_ids)
        stream = stream + self.write(stream)
        normed = stream * torch.rsqrt(stream.pow(2).mean(-1, keepdim=True) + 1e-3)
        scaled = normed * (self.weight + self.offset) if self.spare else torch.tanh(stream + 1)
        return self.read(scaled)


def residual(graph: ls.Graph) -> NodeGroup:
    return next(group for group in graph if group.kind is Kind.RESIDUAL)


def rescaled(model: nn.Module, removed: tuple[int, ...]) -> tuple[Tensor, Tensor, dict[str, Scale]]:
    """Outputs of the zeroed and of the cut and rescaled trace."""
    graph = ls.discover(model, inputs={"input_ids": IDS})
    group = residual(graph)
    assert group.exactness is Exactness.RESCALED
    assert graph.inference is not None
    replay = Replay(graph.inference, graph.keep_leaves({group.name: removed}))
    scales = rescaling(graph.inference, replay)
    tensors = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    ls.zero_(model, graph, ls.Plan(removed={group.name: removed}))
    with torch.no_grad():
        zeroed = model(IDS)
    for name, scale in scales.items():
        tensors[name] = (tensors[name] + scale.offset) * scale.factor - scale.offset
    return zeroed, replay.run(tensors, {"input_ids": IDS})[0], scales


def test_a_norm_over_fewer_channels_is_made_up_for_with_its_epsilon_as_it_was() -> None:
    torch.manual_seed(0)
    zeroed, cut, scales = rescaled(Normed(), (1, 4))
    torch.testing.assert_close(zeroed, cut)
    assert set(scales) <= {"table.weight", "weight"}
    assert scales["table.weight"].factor < 1 < scales["weight"].factor


def test_what_the_code_adds_to_a_weight_is_part_of_it() -> None:
    torch.manual_seed(0)
    zeroed, cut, scales = rescaled(Normed(offset=1.0), (0,))
    torch.testing.assert_close(zeroed, cut)
    assert scales["weight"].offset == 1.0


class Tied(Normed):
    """The table is the reader, too."""

    def forward(self, input_ids: Tensor) -> Tensor:
        stream = self.table(input_ids)
        stream = stream + self.write(stream)
        normed = stream * torch.rsqrt(stream.pow(2).mean(-1, keepdim=True) + 1e-3)
        return (normed * self.weight) @ self.table.weight.T


def test_a_table_that_is_read_and_written_is_paid_for_by_the_norm() -> None:
    torch.manual_seed(0)
    zeroed, cut, _ = rescaled(Tied(), (2, 3))
    torch.testing.assert_close(zeroed, cut)


def test_a_factor_that_changed_goes_into_a_weight() -> None:
    """Half the attention scale is twice the queries."""
    model = Normed()
    graph = ls.discover(model, inputs={"input_ids": IDS})
    assert graph.inference is not None
    products = [at for at, node in enumerate(graph.inference.trace.nodes) if node.name == "mm"]
    scales = rescaling(graph.inference, Replay(graph.inference), Differences({products[0]: [(1.0, 0.5)]}))
    assert {name: scale.factor for name, scale in scales.items()} == {"write.weight": 2.0}


def test_nothing_to_do_is_nothing() -> None:
    graph = ls.discover(Normed(), inputs={"input_ids": IDS})
    assert graph.inference is not None
    assert rescaling(graph.inference, Replay(graph.inference)) == {}


class Stubborn(nn.Module):
    """A sigmoid sees the stream whose mean is taken: its values cannot be scaled."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(4, 6, bias=False), nn.Linear(6, 4, bias=False)

    def forward(self, hidden: Tensor) -> Tensor:
        hidden = self.up(hidden)
        hidden = torch.nn.functional.silu(hidden)
        return self.down(hidden * torch.rsqrt(hidden.pow(2).mean(-1, keepdim=True) + 1e-3))


def test_where_no_multiple_helps_the_reason_names_the_operator() -> None:
    graph = ls.discover(Stubborn(), inputs={"hidden": torch.ones(1, 3, 4)})
    group = next(g for g in graph if g.size == 6)
    assert group.exactness is Exactness.RESCALED
    assert graph.inference is not None
    with pytest.raises(NoScaleError, match="add in"):
        rescaling(graph.inference, Replay(graph.inference, graph.keep_leaves({group.name: (0,)})))
