"""The uniform shape: every layer loses as many structures of a role, such that the model's configuration accepts it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import pairwise, product
from math import prod

import torch
from torch import Tensor

from lorashear.errors import PlanError
from lorashear.graph.axes import Axis
from lorashear.graph.groups import Kind, NodeGroup
from lorashear.pruning.budget import Block, Budget

FEW = 64
"""Roles of at most this many structures a layer (heads) are tried at every count; larger ones go by blocks."""

MOST_COMBINATIONS = 1024


def uniform_counts(budget: Budget) -> dict[str, int]:
    """Group -> number of structures that it loses, the same for all groups of a role.

    Tries every combination of head counts; FFN blocks, cheapest first, make up what is missing.

    Raises:
        PlanError: when layers differ in width already, or the budget cannot be met.
    """
    groups = budget.groups
    roles = _Roles(budget)
    sizes = {role: members[0].size for role, members in roles.members.items()}
    if any(group.size != sizes[group.role] for group in groups):
        raise PlanError("layers of this model differ in width already; use --shape per-layer")
    few = [role for role, members in roles.members.items() if members[0].size <= FEW and not _by_blocks(members[0])]
    blocks = sorted(_blocks(roles, [role for role in sizes if role not in few]))
    least = sum(block.required for block in blocks)
    saved = torch.tensor([0, *(block.parameters for block in blocks)]).cumsum(0)
    lost = torch.tensor([0.0, *(block.loss for block in blocks)], dtype=torch.float64).cumsum(0)
    total = budget.graph.num_parameters
    candidates: list[tuple[float, int, dict[str, int]]] = []
    furthest = 0
    for counts in _combinations(roles, few):
        if any(kept > sizes[role] - roles.taken(role) for role, kept in counts.items()):
            continue
        small = total - roles.kept(counts)
        furthest = max(furthest, small + int(saved[-1]))
        at = max(least, _nearest(saved, budget.target - small))
        if abs(small + int(saved[at]) - budget.target) <= _tolerance(budget, saved):
            loss = sum(roles.loss(role, kept) for role, kept in counts.items()) + float(lost[at])
            candidates.append((loss, at, counts))
    for _, at, counts in sorted(candidates, key=lambda candidate: candidate[0]):
        if roles.accepted(counts):
            kept = {**sizes, **counts}
            for block in blocks[:at]:
                kept[block.name] = min(kept[block.name], block.kept)
            return {group.name: group.size - kept[group.role] for group in groups}
    raise budget.unreachable(furthest, "uniform")


class _Roles:
    """Counts parameters of uniform shapes: every group of a role loses the same number of structures."""

    def __init__(self, budget: Budget) -> None:
        self.budget = budget
        graph, fixed = budget.graph, budget.fixed
        self.fixed = {graph[name].role: graph[name].size - len(rows) for name, rows in fixed.items()}
        self.members: dict[str, list[NodeGroup]] = {}
        for group in budget.groups:
            self.members.setdefault(group.role, []).append(group)
        role_of = {group.members[0].leaf: group.role for group in (*budget.groups, *map(graph.__getitem__, fixed))}
        terms: Counter[tuple[tuple[object, ...], ...]] = Counter()
        for info in graph.parameters.values():
            if not info.adapter:
                terms[tuple(_polynomial(axis, role_of) for axis in info.axes)] += 1
        self.terms = terms

    def kept(self, kept: Mapping[str, int]) -> int:
        """Parameters of the model when every group of role r keeps `kept[r]` structures (others keep all)."""
        sizes = {role: kept.get(role, groups[0].size) for role, groups in self.members.items()} | self.fixed
        return sum(prod(_evaluate(axis, sizes) for axis in axes) * times for axes, times in self.terms.items())

    def loss(self, role: str, kept: int) -> float:
        """Summed score of what all groups of a role lose when each keeps `kept`."""
        orders = self.budget.orders
        return sum(float(orders[group.name].loss[group.size - kept]) for group in self.members[role])

    def taken(self, role: str) -> int:
        """How many structures every group of the role loses at least."""
        return max(self.budget.orders[group.name].taken for group in self.members[role])

    def accepted(self, kept: Mapping[str, int]) -> bool:
        """Whether the model's configuration class takes these widths."""
        geometry = self.budget.graph.geometry
        if geometry is None:
            return True
        overrides = geometry.solve({**kept, **self.fixed})
        return overrides is not None and not geometry.refusal(overrides)


def _polynomial(axis: Axis, role_of: Mapping[Axis, str]) -> tuple[object, ...]:
    """An axis as nested tuples over roles, so that equal layers are counted once."""
    axis = axis.root()
    if not axis.bound:
        return (role_of.get(axis, axis.size),)
    return (axis.bound, *(_polynomial(part, role_of) for part in axis.parts))


def _evaluate(axis: tuple[object, ...], sizes: Mapping[str, int]) -> int:
    head = axis[0]
    if head not in ("prod", "sum"):
        return sizes[head] if isinstance(head, str) else int(head)  # type: ignore[call-overload]
    parts = [_evaluate(part, sizes) for part in axis[1:]]  # type: ignore[arg-type]
    return prod(parts) if head == "prod" else sum(parts)


def _by_blocks(group: NodeGroup) -> bool:
    return group.kind is Kind.CHANNELS


def _tolerance(budget: Budget, saved: Tensor) -> float:
    """A plan counts as reaching its ratio within half a percentage point, or within one block where blocks are
    coarse."""
    largest = int(saved.diff().max()) if len(saved) > 1 else 0
    return max(0.005 * budget.whole, largest / 2, 0.05 * budget.target if len(saved) == 1 else 0.0)


def _nearest(saved: Tensor, wanted: int) -> int:
    return int((saved - wanted).abs().argmin())


def _blocks(roles: _Roles, names: Iterable[str]) -> Iterator[Block]:
    total = roles.kept({})
    for name in names:
        widths = _accepted_widths(roles, name)
        per_structure = total - roles.kept({name: widths[0] - 1})
        taken = roles.taken(name)
        for step, (before, kept) in enumerate(pairwise(widths)):
            parameters = per_structure * (before - kept)
            loss = roles.loss(name, kept) - roles.loss(name, before)
            price = float("-inf") if widths[0] - before < taken else loss / parameters
            yield Block(price, step, name, kept, loss, parameters)


def _accepted_widths(roles: _Roles, name: str) -> list[int]:
    """Widths that the configuration takes, from all of it downwards. Where it is not free to the step (GPT-NeoX-Japanese's is
    a multiple of the hidden size), sixteenths are tried, each of which may take a search."""
    size, *fewer = roles.budget.widths(roles.members[name][0])
    if fewer and not roles.accepted({name: fewer[0]}):
        sixteenths = [size * part // 16 for part in range(15, 0, -1) if size * part % 16 == 0]
        fewer = [width for width in sixteenths if roles.accepted({name: width})]
    return [size, *fewer]


def _combinations(roles: _Roles, few: Sequence[str]) -> Iterator[dict[str, int]]:
    options = [list(range(roles.members[role][0].size, roles.members[role][0].minimum - 1, -1)) for role in few]
    while prod(map(len, options)) > MOST_COMBINATIONS and len(longest := max(options, key=len)) > 2:
        longest[1:-1] = longest[2:-1:2]  # every other count between all and one
    for counts in product(*options):
        yield dict(zip(few, counts, strict=True))
