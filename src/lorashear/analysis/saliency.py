"""Saliency: how much each structure matters, by several criteria, each divided by its mean and mixed."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from lorashear.config import SaliencySettings
from lorashear.errors import SettingsError
from lorashear.graph.groups import Graph, Member, NodeGroup
from lorashear.pruning.gates import GateStatistics

_TINY = 1e-12


def score(
    model: nn.Module,
    graph: Graph,
    statistics: Mapping[str, GateStatistics],
    settings: SaliencySettings,
    *,
    groups: Sequence[NodeGroup] | None = None,
) -> dict[str, Tensor]:
    """Saliency of every structure of the groups, `(structures,)` float32, higher is kept.

    Scores add over structures; what they are worth per parameter is the planner's business.

    Args:
        model: the one the graph was discovered on, with or without adapters.
        graph: its node groups.
        statistics: of the gates, for the Taylor terms; may be empty where neither has a weight.
        settings: the weights of the mix.
        groups: what to score; None for all that carry structure gates.

    Raises:
        SettingsError: when a Taylor term is wanted and no sample was metered.
    """
    groups = graph.gated if groups is None else groups
    criteria: dict[str, dict[str, Tensor]] = {}
    if settings.taylor or settings.taylor2:
        _check_samples(groups, statistics)
    if settings.taylor:
        criteria["taylor"] = {g.name: statistics[g.name].first.abs() / statistics[g.name].samples for g in groups}
    if settings.taylor2:
        criteria["taylor2"] = {g.name: statistics[g.name].second / statistics[g.name].samples for g in groups}
    if settings.magnitude or settings.mean_magnitude or settings.cosine:
        criteria |= _weight_criteria(model, groups, wants_cosine=settings.cosine > 0)
    mixed = {group.name: torch.zeros(group.size) for group in groups}
    for name, values in criteria.items():
        weight = getattr(settings, name)
        if weight:
            mean = _mean(values.values())
            for group_name, value in values.items():
                mixed[group_name] += weight * value.float().cpu() / mean
    return mixed


def random_scores(groups: Iterable[NodeGroup], seed: int) -> dict[str, Tensor]:
    """Uniform numbers, for the baseline that knows nothing."""
    generator = torch.Generator().manual_seed(seed)
    return {group.name: torch.rand(group.size, generator=generator) for group in groups}


def _check_samples(groups: Iterable[NodeGroup], statistics: Mapping[str, GateStatistics]) -> None:
    missing = [g.name for g in groups if g.name not in statistics or not statistics[g.name].samples]
    if missing:
        raise SettingsError(
            f"saliency: a Taylor term has a weight, and no sample was metered for {missing[0]}; gather gate statistics "
            "first, or use only magnitude and cosine"
        )


def _mean(values: Iterable[Tensor]) -> float:
    parts = [value.float().flatten().cpu() for value in values]
    return max(float(torch.cat(parts).mean()), _TINY) if parts else _TINY


def _weight_criteria(
    model: nn.Module, groups: Sequence[NodeGroup], *, wants_cosine: bool
) -> dict[str, dict[str, Tensor]]:
    """Magnitude of a structure's composed slices, its mean over their entries, and how far their update turns them.

    W = x + s B A is composed one weight at a time. The cosine is between W and the update s B A or, in a model without
    adapters, -d loss / d W, the step that is to come.
    """
    composed = _ComposedWeights(model)
    found: dict[str, dict[str, Tensor]] = {"magnitude": {}, "mean_magnitude": {}, "cosine": {}}
    for group in groups:
        norm, update, inner = (torch.zeros(group.size) for _ in range(3))
        entries = 0
        for member in group.members:
            if member.buffer or member.adapter:
                continue
            weight, change = composed.of(member)
            norm += _per_structure(weight.square(), member)
            entries += weight.numel() // weight.shape[member.dim] * member.rows.shape[1]
            if change is not None:
                update += _per_structure(change.square(), member)
                inner += _per_structure(weight * change, member)
        found["magnitude"][group.name] = norm.sqrt()
        found["mean_magnitude"][group.name] = (norm / max(entries, 1)).sqrt()
        found["cosine"][group.name] = 1 - inner / (norm * update).sqrt().clamp(min=_TINY)
    if not composed.moves and wants_cosine:
        warnings.warn(
            "saliency.cosine is not applied: there is neither an adapter nor a gradient to compare with", stacklevel=3
        )
    if not composed.moves:
        del found["cosine"]
    return found


def _per_structure(values: Tensor, member: Member) -> Tensor:
    """Sums all entries that belong to a structure: `(structures,)`."""
    rows = values.sum(dim=[dim for dim in range(values.dim()) if dim != member.dim]) if values.dim() > 1 else values
    return rows.float().cpu()[member.rows].sum(1)


class _ComposedWeights:
    """x + s B A of one base weight at a time, with stock peft's own product."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.parameters = dict(model.named_parameters())
        self.adapted = any(hasattr(module, "lora_A") for module in model.modules())
        self.moves = self.adapted or any(p.grad is not None for p in self.parameters.values())
        self._last: tuple[str, Tensor, Tensor | None] | None = None

    @torch.no_grad()
    def of(self, member: Member) -> tuple[Tensor, Tensor | None]:
        """Composed weight, and its update (None where it has none), in float32."""
        if self._last is None or self._last[0] != member.parameter:
            parameter = self.parameters[member.parameter]
            weight, gradient = parameter.detach().float(), parameter.grad
            if not self.adapted:
                self._last = (member.parameter, weight, None if gradient is None else -gradient.float())
            else:
                change = self._update(member.parameter)
                self._last = (member.parameter, weight if change is None else weight + change, change)
        return self._last[1], self._last[2]

    def _update(self, name: str) -> Tensor | None:
        if not name.endswith(".base_layer.weight"):
            return None
        layer = self.model.get_submodule(name.removesuffix(".base_layer.weight"))
        changes = [layer.get_delta_weight(adapter).float() for adapter in layer.active_adapters]  # type: ignore[operator, union-attr]
        return torch.stack(changes).sum(0) if changes else None
