"""`plan`: spends a parameter budget on the least salient structures, in the shape that was asked for."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise, product
from math import prod

import torch
from torch import Tensor

from lorashear.config import RatioOf, Shape
from lorashear.errors import PlanError, SettingsError
from lorashear.graph.axes import Axis
from lorashear.graph.groups import Graph, Kind, NodeGroup
from lorashear.plan import Plan

FEW = 64
"""Roles of at most this many structures a layer (heads) are tried at every count; larger ones go by blocks."""

MOST_COMBINATIONS = 1024


def plan(
    graph: Graph,
    *,
    ratio: float,
    scores: Mapping[str, Tensor] | None = None,
    ratio_of: RatioOf = "model",
    shape: Shape = "uniform",
    round_to: int = 8,
    unprunable: Collection[str] = (),
    kinds: Collection[str] | None = None,
    taken: Mapping[str, Tensor] | None = None,
    fixed: Mapping[str, Sequence[int]] | None = None,
) -> Plan:
    """Chooses the structures to remove: those whose summed score is least for the parameters they save.

    Args:
        graph: from `discover`.
        ratio: share of the parameters to remove, counted on the cut shapes.
        scores: saliency per group, `(structures,)`, higher is kept; None thins all groups alike.
        ratio_of: what the ratio is a share of.
        shape: "uniform" gives every layer the same widths, such that the model's configuration accepts them, and
        chooses
            within each layer; "per-layer" lets the widths follow the scores over all layers.
        round_to: FFN widths left are multiples of this.
        unprunable: names of groups to leave whole (per-layer shape; from the knowledge profile).
        kinds: which kinds of groups may lose structures; None for all that carry structure gates. "experts" takes
            whole experts too, "layers", by itself,
            takes out whole layers: as many of the least salient as come nearest to the ratio.
        taken: structures that have to be among the removed ones.
        fixed: groups that lose these structures and no others (residual channels); they need no scores.

    Raises:
        SettingsError: for a ratio outside (0, 1), or for whole layers together with other kinds.
        PlanError: when the prunable groups cannot reach the ratio; says how far they can.
    """
    if not 0.0 < ratio < 1.0:
        raise SettingsError(f"ratio = {ratio}: expected a share of the parameters between 0 and 1, e.g. 0.2 for 20 %")
    whole = graph.num_parameters if ratio_of == "model" else graph.num_decoder_parameters
    target = round(ratio * whole)
    if kinds is not None and Kind.DEPTH in kinds:
        if {*kinds} != {Kind.DEPTH}:
            raise SettingsError(
                "kinds: whole layers cannot go together with other kinds; name only layers, or leave them out"
            )
        return Plan(removed=_whole_layers(graph, scores, target, whole), shape=shape)
    given = {name: tuple(rows) for name, rows in (fixed or {}).items() if len(rows)}
    spared = {*(unprunable if shape == "per-layer" else ()), *given}
    able = [g for g in graph.candidates(kinds or ()) if shape == "per-layer" or g.plain]
    groups = [g for g in able if g.name not in spared and (kinds is None or g.kind in kinds)]
    scores = scores or {group.name: _even_scores(graph, group) for group in groups}
    orders = {group.name: _ascending(group, scores, taken or {}) for group in groups}
    if shape == "uniform":
        counts = _uniform_counts(graph, groups, orders, target, whole, round_to, given)
    else:
        counts = _layer_counts(graph, groups, orders, target, whole, round_to, given)
    removed = {name: tuple(orders[name].indices[:count].tolist()) for name, count in counts.items()}
    return Plan(removed={**given, **removed}, shape=shape)


@dataclass(frozen=True)
class _Order:
    """Structures of a group, least salient first."""

    indices: Tensor
    loss: Tensor
    """`loss[k]`: summed score of the first k structures, `(structures + 1,)` float64."""
    taken: int
    """How many of the first have to go."""


def _ascending(group: NodeGroup, scores: Mapping[str, Tensor], taken: Mapping[str, Tensor]) -> _Order:
    score = scores[group.name].detach().double().cpu().clone()
    if score.shape != (group.size,) or not bool(torch.isfinite(score).all()):
        raise PlanError(f"scores of {group.name}: expected {group.size} finite numbers, got {tuple(score.shape)}")
    gone = torch.unique(taken[group.name].cpu()) if group.name in taken else torch.empty(0, dtype=torch.long)
    score[gone] = float("-inf")
    order = torch.sort(score, stable=True)
    values = order.values.clamp(min=0.0)  # a structure that is gone already costs nothing more
    return _Order(order.indices, torch.cat([torch.zeros(1, dtype=torch.float64), values.cumsum(0)]), len(gone))


def _even_scores(graph: Graph, group: NodeGroup) -> Tensor:
    """Each further structure of a group costs more per parameter, so that every kind loses about the same share."""
    parameters = graph.num_parameters - graph.kept_parameters({group.name: (0,)})
    return parameters * torch.arange(1, group.size + 1, dtype=torch.float64) / group.size


def _widths(group: NodeGroup, round_to: int) -> list[int]:
    """Numbers of structures that may be left, from all of them downwards."""
    step = min(round_to, group.size) if group.kind is Kind.CHANNELS else 1
    return [group.size, *range(group.size - 1 - (group.size - 1) % step, group.minimum - 1, -step)]


class _Roles:
    """Counts parameters of uniform shapes: every group of a role loses the same number of structures."""

    def __init__(self, graph: Graph, groups: Sequence[NodeGroup], fixed: Mapping[str, Sequence[int]]) -> None:
        self.graph = graph
        self.fixed = {graph[name].role: graph[name].size - len(rows) for name, rows in fixed.items()}
        self.members: dict[str, list[NodeGroup]] = {}
        for group in groups:
            self.members.setdefault(group.role, []).append(group)
        role_of = {group.members[0].leaf: group.role for group in (*groups, *map(graph.__getitem__, fixed))}
        terms: Counter[tuple[tuple[object, ...], ...]] = Counter()
        for info in graph.parameters.values():
            if not info.adapter:
                terms[tuple(_polynomial(axis, role_of) for axis in info.axes)] += 1
        self.terms = terms

    def kept(self, kept: Mapping[str, int]) -> int:
        """Parameters of the model when every group of role r keeps `kept[r]` structures (others keep all)."""
        sizes = {role: kept.get(role, groups[0].size) for role, groups in self.members.items()} | self.fixed
        return sum(prod(_evaluate(axis, sizes) for axis in axes) * times for axes, times in self.terms.items())

    def loss(self, orders: Mapping[str, _Order], role: str, kept: int) -> float:
        return sum(float(orders[group.name].loss[group.size - kept]) for group in self.members[role])

    def taken(self, orders: Mapping[str, _Order], role: str) -> int:
        """How many structures every group of the role loses at least."""
        return max(orders[group.name].taken for group in self.members[role])

    def accepted(self, kept: Mapping[str, int]) -> bool:
        """Whether the model's configuration class takes these widths."""
        geometry = self.graph.geometry
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


def _uniform_counts(
    graph: Graph,
    groups: Sequence[NodeGroup],
    orders: Mapping[str, _Order],
    target: int,
    whole: int,
    round_to: int,
    fixed: Mapping[str, Sequence[int]],
) -> dict[str, int]:
    """Tries every combination of head counts; FFN blocks, cheapest first, make up what is missing."""
    roles = _Roles(graph, groups, fixed)
    sizes = {role: members[0].size for role, members in roles.members.items()}
    if any(group.size != sizes[group.role] for group in groups):
        raise PlanError("layers of this model differ in width already; use --shape per-layer")
    few = [role for role, members in roles.members.items() if members[0].size <= FEW and not _blocks(members[0])]
    blocks = sorted(_uniform_blocks(roles, orders, [role for role in sizes if role not in few], round_to))
    least = sum(block.required for block in blocks)
    saved = torch.tensor([0, *(block.parameters for block in blocks)]).cumsum(0)
    lost = torch.tensor([0.0, *(block.loss for block in blocks)], dtype=torch.float64).cumsum(0)
    total = graph.num_parameters
    candidates: list[tuple[float, int, dict[str, int]]] = []
    furthest = 0
    for counts in _combinations(roles, few):
        if any(kept > sizes[role] - roles.taken(orders, role) for role, kept in counts.items()):
            continue
        small = total - roles.kept(counts)
        furthest = max(furthest, small + int(saved[-1]))
        at = max(least, _nearest(saved, target - small))
        if abs(small + int(saved[at]) - target) <= _tolerance(target, whole, saved):
            loss = sum(roles.loss(orders, role, kept) for role, kept in counts.items()) + float(lost[at])
            candidates.append((loss, at, counts))
    for _, at, counts in sorted(candidates, key=lambda candidate: candidate[0]):
        if roles.accepted(counts):
            kept = {**sizes, **counts}
            for block in blocks[:at]:
                kept[block.name] = min(kept[block.name], block.kept)
            return {group.name: group.size - kept[group.role] for group in groups}
    raise _unreachable(target, whole, furthest, "uniform")


def _blocks(group: NodeGroup) -> bool:
    return group.kind is Kind.CHANNELS


def _tolerance(target: int, whole: int, saved: Tensor) -> float:
    """A plan counts as reaching its ratio within half a percentage point, or within one block where blocks are
    coarse."""
    largest = int(saved.diff().max()) if len(saved) > 1 else 0
    return max(0.005 * whole, largest / 2, 0.05 * target if len(saved) == 1 else 0.0)


def _nearest(saved: Tensor, wanted: int) -> int:
    return int((saved - wanted).abs().argmin())


@dataclass(frozen=True, order=True)
class _Block:
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


def _uniform_blocks(
    roles: _Roles, orders: Mapping[str, _Order], names: Iterable[str], round_to: int
) -> Iterator[_Block]:
    total = roles.kept({})
    for name in names:
        widths = _widths(roles.members[name][0], round_to)
        per_structure = total - roles.kept({name: widths[0] - 1})
        taken = roles.taken(orders, name)
        for step, (before, kept) in enumerate(pairwise(widths)):
            parameters = per_structure * (before - kept)
            loss = roles.loss(orders, name, kept) - roles.loss(orders, name, before)
            price = float("-inf") if widths[0] - before < taken else loss / parameters
            yield _Block(price, step, name, kept, loss, parameters)


def _combinations(roles: _Roles, few: Sequence[str]) -> Iterator[dict[str, int]]:
    options = [list(range(roles.members[role][0].size, roles.members[role][0].minimum - 1, -1)) for role in few]
    while prod(map(len, options)) > MOST_COMBINATIONS:
        longest = max(options, key=len)
        longest[1:-1] = longest[2:-1:2]  # every other count between all and one
    for counts in product(*options):
        yield dict(zip(few, counts, strict=True))


def _layer_counts(
    graph: Graph,
    groups: Sequence[NodeGroup],
    orders: Mapping[str, _Order],
    target: int,
    whole: int,
    round_to: int,
    fixed: Mapping[str, Sequence[int]],
) -> dict[str, int]:
    """Takes blocks of all groups in one order, by score lost per parameter saved, as far as the budget goes.

    Where a coarse block (a head) would go past it, finer ones behind it make up what is missing.
    """
    blocks = sorted(_layer_blocks(graph, groups, orders, round_to, fixed))

    def prefix(length: int) -> dict[str, int]:
        result: dict[str, int] = {}
        for block in blocks[:length]:
            result[block.name] = max(result.get(block.name, 0), graph[block.name].size - block.kept)
        return result

    def missing(counts: Mapping[str, int]) -> int:
        chosen = {**fixed, **{name: tuple(range(count)) for name, count in counts.items()}}
        return target - (graph.num_parameters - graph.kept_parameters(chosen))

    out_of_reach = missing(prefix(len(blocks)))
    if out_of_reach > 0.005 * whole:
        raise _unreachable(target, whole, target - out_of_reach, "per-layer")
    low, high = sum(block.required for block in blocks), len(blocks)
    while low < high:  # longest prefix within the budget
        middle = (low + high + 1) // 2
        low, high = (middle, high) if missing(prefix(middle)) >= 0 else (low, middle - 1)
    counts = prefix(low)
    gap = missing(counts)
    next_blocks: dict[str, _Block] = {}  # a group's blocks come in their order: the first that is passed over ends it
    for block in blocks[low:]:
        if block.name in next_blocks:
            continue
        more = {**counts, block.name: graph[block.name].size - block.kept}
        if block.parameters <= gap and (rest := missing(more)) >= 0:
            counts, gap = more, rest
        else:
            next_blocks[block.name] = block
    if next_blocks and gap > 0:  # the finest of them, where going past the budget by it comes nearer
        finest = min(next_blocks.values(), key=lambda block: (block.parameters, block))
        more = {**counts, finest.name: graph[finest.name].size - finest.kept}
        counts = more if abs(missing(more)) < gap else counts
    return counts


def _layer_blocks(
    graph: Graph,
    groups: Sequence[NodeGroup],
    orders: Mapping[str, _Order],
    round_to: int,
    fixed: Mapping[str, Sequence[int]],
) -> Iterator[_Block]:
    total = graph.kept_parameters(fixed)
    for group in groups:
        per_structure = total - graph.kept_parameters({**fixed, group.name: (0,)})
        loss = orders[group.name].loss
        price = float("-inf")
        widths = _widths(group, round_to)
        for step, (before, kept) in enumerate(pairwise(widths)):
            lost = float(loss[group.size - kept] - loss[group.size - before])
            parameters = per_structure * (before - kept)
            if group.size - before >= orders[group.name].taken:
                price = max(price, lost / parameters)  # a group's blocks come in their order, whatever their lengths
            yield _Block(price, step, group.name, kept, lost, parameters)


def _whole_layers(
    graph: Graph, scores: Mapping[str, Tensor] | None, target: int, whole: int
) -> dict[str, tuple[int, ...]]:
    """The least salient layers, as many as come nearest to the target; one has to stay."""
    group = next((each for each in graph if each.kind is Kind.DEPTH), None)
    if group is None or not group.prunable:
        raise PlanError(
            f"no whole layer can be removed: {group.reason if group else 'no list of layers was found'}; prune other kinds"
        )
    order = _ascending(group, scores or {group.name: _even_scores(graph, group)}, {}).indices.tolist()
    lost = [graph.num_parameters - graph.kept_parameters({group.name: order[:count]}) for count in range(group.size)]
    count = min(range(group.size), key=lambda each: abs(lost[each] - target))
    if not count:
        raise PlanError(
            f"a ratio of {target / whole:.1%} is less than half of one layer, and a layer is {lost[1] / whole:.1%}; ask for "
            "more, or prune other kinds"
        )
    if target - lost[-1] > (lost[-1] - lost[-2]) / 2:
        raise PlanError(
            f"a ratio of {target / whole:.1%} cannot be reached: whole layers give at most {lost[-1] / whole:.1%} (one layer "
            "stays); ask for less"
        )
    return {group.name: tuple(order[:count])}


def _unreachable(target: int, whole: int, furthest: int, shape: str) -> PlanError:
    found = f"the prunable groups give at most {furthest / whole:.1%} in the {shape} shape"
    if furthest >= target:  # only whole heads to choose from
        return PlanError(
            f"a ratio of {target / whole:.1%} cannot be met within half a point: {found}, in steps that are too coarse; ask "
            "for another ratio, lower round_to, or try the other shape"
        )
    return PlanError(
        f"a ratio of {target / whole:.1%} cannot be reached: {found} (every layer keeps at least one head, one block of "
        "channels, and as many experts as a token is sent to); ask for less, lower round_to, or try the other shape"
    )
