"""What a parameter budget is spent by: the structures of each group in their order, and the blocks that they go in."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from lorashear.errors import PlanError
from lorashear.graph.groups import Graph, Kind, NodeGroup


@dataclass(frozen=True)
class Order:
    """Structures of a group, least salient first."""

    indices: Tensor
    loss: Tensor
    """`loss[k]`: summed score of the first k structures, `(structures + 1,)` float64."""
    taken: int
    """How many of the first have to go."""


@dataclass(frozen=True)
class Budget:
    """How many parameters are to go, and from where."""

    graph: Graph
    groups: tuple[NodeGroup, ...]
    """The groups that may lose structures."""
    orders: Mapping[str, Order]
    """Group -> its structures, least salient first."""
    fixed: Mapping[str, Sequence[int]]
    """Groups that lose these structures and no others."""
    target: int
    """Parameters to remove."""
    whole: int
    """Parameters that the ratio is a share of."""
    round_to: int
    """FFN widths left are multiples of this."""

    def widths(self, group: NodeGroup) -> list[int]:
        """Numbers of structures that may be left of a group, from all of them downwards."""
        step = min(self.round_to, group.size) if group.kind is Kind.CHANNELS else 1
        return [group.size, *range(group.size - 1 - (group.size - 1) % step, group.minimum - 1, -step)]

    def missing(self, counts: Mapping[str, int]) -> int:
        """Parameters still to remove once each group has lost that many structures; below 0 where it is too many."""
        chosen = {**self.fixed, **{name: tuple(range(count)) for name, count in counts.items()}}
        return self.target - (self.graph.num_parameters - self.graph.kept_parameters(chosen))

    def unreachable(self, furthest: int, shape: str) -> PlanError:
        """The error for a budget of which only `furthest` parameters, or no combination near it, can be had."""
        asked = f"a ratio of {self.target / self.whole:.1%}"
        found = f"the prunable groups give at most {furthest / self.whole:.1%} in the {shape} shape"
        if furthest >= self.target:  # only whole heads to choose from
            return PlanError(
                f"{asked} cannot be met within half a point: {found}, in steps that are too coarse; ask for another ratio, "
                "lower round_to, or try the other shape"
            )
        return PlanError(
            f"{asked} cannot be reached: {found} (every layer keeps at least one head, one block of channels, and as many "
            "experts as a token is sent to); ask for less, lower round_to, or try the other shape"
        )


@dataclass(frozen=True, order=True)
class Block:
    """The next structures that a role (uniform) or a group (per-layer) would lose."""

    price: float
    """Score lost per parameter saved."""
    step: int
    name: str
    kept: int
    loss: float
    parameters: int

    @property
    def required(self) -> bool:
        """Whether it holds structures that were taken before: it comes first then, whatever is left of it costs."""
        return self.price == float("-inf")
