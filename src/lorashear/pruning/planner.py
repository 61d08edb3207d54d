"""`plan`: spends a parameter budget on the least salient structures, in the shape that was asked for."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor

from lorashear.config import RatioOf, Shape
from lorashear.errors import PlanError, SettingsError
from lorashear.graph.groups import Graph, Kind, NodeGroup
from lorashear.plan import Plan
from lorashear.pruning.budget import Budget, Order
from lorashear.pruning.per_layer import layer_counts
from lorashear.pruning.residual import residual_widths
from lorashear.pruning.uniform import uniform_counts


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
            chooses within each layer; "per-layer" lets the widths follow the scores over all layers.
        round_to: FFN widths left are multiples of this.
        unprunable: names of groups to leave whole (per-layer shape; from the knowledge profile).
        kinds: which kinds of groups may lose structures; None for all that carry structure gates. "experts" takes whole
            experts too; "layers", which goes by itself, takes out whole layers, as many of the least salient as come
            nearest to the ratio.
        taken: structures that have to be among the removed ones.
        fixed: groups that lose these structures and no others (residual channels); they need no scores. Where the residual
            stream is the only kind, its width has to be the one that comes nearest to the ratio.

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
    if kinds is not None and {*kinds} == {Kind.RESIDUAL}:
        _has_to_be_nearest(graph, given, target, whole, round_to)
        return Plan(removed=given, shape=shape)
    spared = {*(unprunable if shape == "per-layer" else ()), *given}
    able = [g for g in graph.candidates(kinds or ()) if shape == "per-layer" or g.plain]
    groups = tuple(g for g in able if g.name not in spared and (kinds is None or g.kind in kinds))
    scores = scores or {group.name: _even_scores(graph, group) for group in groups}
    orders = {group.name: _ascending(group, scores, taken or {}) for group in groups}
    budget = Budget(graph, groups, orders, given, target=target, whole=whole, round_to=round_to)
    counts = uniform_counts(budget) if shape == "uniform" else layer_counts(budget)
    removed = {name: tuple(orders[name].indices[:count].tolist()) for name, count in counts.items()}
    return Plan(removed={**given, **removed}, shape=shape)


def _ascending(group: NodeGroup, scores: Mapping[str, Tensor], taken: Mapping[str, Tensor]) -> Order:
    if group.name not in scores:
        raise PlanError(f"scores of {group.name}: none were given, expected {group.size} numbers")
    score = scores[group.name].detach().double().cpu().clone()
    if score.shape != (group.size,) or not bool(torch.isfinite(score).all()):
        raise PlanError(f"scores of {group.name}: expected {group.size} finite numbers, got {tuple(score.shape)}")
    gone = torch.unique(taken[group.name].cpu()) if group.name in taken else torch.empty(0, dtype=torch.long)
    score[gone] = float("-inf")
    order = torch.sort(score, stable=True)
    values = order.values.clamp(min=0.0)  # a structure that is gone already costs nothing more
    return Order(order.indices, torch.cat([torch.zeros(1, dtype=torch.float64), values.cumsum(0)]), len(gone))


def _even_scores(graph: Graph, group: NodeGroup) -> Tensor:
    """Each further structure of a group costs more per parameter, so that every kind loses about the same share."""
    parameters = graph.num_parameters - graph.kept_parameters({group.name: (0,)})
    return parameters * torch.arange(1, group.size + 1, dtype=torch.float64) / group.size


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
    count = _nearest(
        lost, target, whole, step="one layer, and a layer", all_of_them="whole layers give", stays="one layer"
    )
    return {group.name: tuple(order[:count])}


def _has_to_be_nearest(
    graph: Graph, given: Mapping[str, Sequence[int]], target: int, whole: int, round_to: int
) -> None:
    """Raises where the residual stream alone is to meet the target, and another width comes nearer to it."""
    narrower = residual_widths(graph, round_to)
    if not narrower:
        raise PlanError(
            "the residual stream cannot lose channels: the configuration takes no other width; prune other kinds"
        )
    lost = [0, *(graph.num_parameters - graph.kept_parameters(each) for each in narrower)]
    step, stream = "the first step of the residual stream, which", "the residual stream alone gives"
    nearest = _nearest(lost, target, whole, step=step, all_of_them=stream, stays="half of it")
    asked = f"a ratio of {target / whole:.1%}"
    if not given:
        raise PlanError(
            f"{asked} has to come from the residual stream alone, and all of it is in use or no other basis of it goes "
            "unnoticed; prune other kinds"
        )
    if given != narrower[nearest - 1]:
        raise PlanError(
            f"{asked} needs another width of the residual stream: {lost[nearest] / whole:.1%} is the nearest"
        )


def _nearest(lost: Sequence[int], target: int, whole: int, *, step: str, all_of_them: str, stays: str) -> int:
    """How many steps come nearest to the target, of which `lost[k]` is what k of them save; at least one."""
    count = min(range(len(lost)), key=lambda each: abs(lost[each] - target))
    asked = f"a ratio of {target / whole:.1%}"
    if not count:
        raise PlanError(
            f"{asked} is less than half of {step} is {lost[1] / whole:.1%}; ask for more, or prune other kinds"
        )
    if target - lost[-1] > (lost[-1] - lost[-2]) / 2:
        raise PlanError(
            f"{asked} cannot be reached: {all_of_them} at most {lost[-1] / whole:.1%} ({stays} stays); ask for less, or prune "
            "other kinds"
        )
    return count
