"""Structure gates: one factor per structure where it enters its consumer (design: gate 1 is the model, gate 0 the cut
one).

Two abilities, independent of each other. *Metering* gathers statistics of d loss / d gate at gate 1: the derivative is
the sum over a structure's features of activation times gradient, so it costs one reduction and no gradient of frozen
weights. *Gating* multiplies the consumer's input; while all gates are 1 the forward pass is untouched.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from lorashear.errors import ModelError
from lorashear.evaluation.inference import input_gradients, run_back
from lorashear.graph.groups import Consumer, Graph, Member, NodeGroup


@dataclass(frozen=True)
class GateStatistics:
    """Sums over samples (windows) of the derivative g of a sample's mean loss by the gates, `(structures,)` float32."""

    first: Tensor
    """Sum of g."""
    second: Tensor
    """Sum of g squared."""
    samples: float
    """How many; a fraction where earlier ones were made to count less."""


class StructureGates:
    """Gates of the prunable groups of one model, put on with forward pre-hooks; `remove` takes them off.

    The loss is taken to be the mean over the tokens of a micro-batch, divided by `accumulation`; statistics do not
    depend on either.
    """

    def __init__(self, model: nn.Module, groups: Iterable[NodeGroup]) -> None:
        self.model = model
        self.groups = {group.name: group for group in groups}
        device = next(model.parameters()).device
        self.values = {name: torch.ones(group.size, device=device) for name, group in self.groups.items()}
        """Group -> gates `(structures,)`, float32; change them through `set_`."""
        self.metering = False
        self.accumulation = 1
        self._statistics = {name: _empty(group.size, device) for name, group in self.groups.items()}
        self._entries = _entries(self.groups.values(), device)
        self._factors: dict[str, Tensor] = {}
        self._samples = 1
        """Windows in the pass that is running: some models flatten batch and positions before a layer."""
        self._hooks = [model.get_submodule(path).register_forward_pre_hook(self._hook(path)) for path in self._entries]
        self._hooks.append(model.register_forward_pre_hook(self._begin, with_kwargs=True))

    def set_(self, group: str, structures: Tensor, value: float | Tensor) -> None:
        """Sets gates of some structures, and with them what their consumers' inputs are multiplied by."""
        self.values[group][structures] = value
        for path in {consumer.module for consumer in self.groups[group].consumers}:
            self._factors.pop(path, None)
            factor = self._factor(path, self.values)
            if bool((factor != 1.0).any()):
                self._factors[path] = factor

    def follow(self, gates: Mapping[str, Tensor]) -> None:
        """The next forward pass has these gates, and its backward pass reaches what they were computed from.

        `gates`: every group -> `(structures,)`. To be called before each forward pass; `values` stay as they are.
        """
        for path in self._entries:
            self._factors[path] = self._factor(path, gates)

    def _factor(self, path: str, gates: Mapping[str, Tensor]) -> Tensor:
        """What a consumer's input is multiplied by, `(features,)`."""
        factor = ones = self._entries[path][0].ones
        for entry in self._entries[path]:
            repeated = gates[entry.group].repeat_interleave(entry.rows.shape[1])
            factor = factor * ones.index_copy(0, entry.rows.flatten(), repeated)
        return factor

    def statistics(self) -> dict[str, GateStatistics]:
        """What was metered since the last reset."""
        return {
            name: replace(each, first=each.first.clone(), second=each.second.clone())
            for name, each in self._statistics.items()
        }

    def set_statistics(self, statistics: Mapping[str, GateStatistics], *, share: float = 1.0) -> None:
        """Goes on metering from these sums, times `share`: what was metered earlier counts less than what comes."""
        for name, each in statistics.items():
            device = self.values[name].device
            first, second = each.first.to(device) * share, each.second.to(device) * share
            self._statistics[name] = GateStatistics(first, second, each.samples * share)

    @contextmanager
    def metered(self) -> Iterator[None]:
        """Meters inside."""
        before, self.metering = self.metering, True
        try:
            yield
        finally:
            self.metering = before

    def remove(self) -> None:
        """Takes the hooks off; the model is as if it never had gates."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def _begin(self, _module: nn.Module, args: tuple[Any, ...], options: dict[str, Any]) -> None:
        given = (options.get("input_ids"), options.get("inputs_embeds"), *args)
        self._samples = next((len(each) for each in given if isinstance(each, Tensor)), 1)

    def _hook(self, path: str) -> Any:
        def enter(_module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
            features: Tensor = args[0]
            factor = self._factors.get(path)
            metered = self.metering and features.requires_grad
            if factor is not None:
                features = features * factor.to(features.dtype)
            elif metered:
                # other modules may take the same tensor in, and a hook on it would see their gradients too
                features = features.view_as(features)
            if metered:
                # what the consumer keeps for its own backward pass, so nothing is held that would not be; and a hook that
                # held the tensor it sits on would be a cycle, freed late
                held = features.detach()
                features.register_hook(  # type: ignore[no-untyped-call]  # torch is untyped here
                    lambda gradient: self._meter(path, held, gradient)
                )
            return (features, *args[1:]) if metered or factor is not None else None

        return enter

    @torch.no_grad()
    def _meter(self, path: str, features: Tensor, gradient: Tensor) -> None:
        """Adds a micro-batch: `features` and `gradient` are `(batch, seq, features)` or `(batch * seq, features)`.

        Both are of the gated input, so with gates below 1 this is gate times d loss / d gate: what is left to lose. A
        structure with several consumers adds up the squares of each.
        """
        samples = self._samples
        by_sample = (samples, -1, features.shape[-1])
        # sample by sample: the temporary stays small, and an einsum would become thousands of tiny products
        pairs = zip(features.reshape(by_sample), gradient.reshape(by_sample), strict=True)
        sums = [(x.float() * g.float()).sum(0) for x, g in pairs]
        products = torch.stack(sums) * (samples * self.accumulation)  # (batch, features)
        for entry in self._entries[path]:
            per_structure = products[:, entry.rows].sum(-1)  # (batch, structures)
            each = self._statistics[entry.group]
            each.first.add_(per_structure.sum(0))
            each.second.add_(per_structure.square().sum(0))
            if entry.counts:
                self._statistics[entry.group] = replace(each, samples=each.samples + samples)


@dataclass(frozen=True)
class _Entry:
    """A group's way into one consumer."""

    group: str
    rows: Tensor
    """`(structures, repeats)` positions among the consumer's input features."""
    ones: Tensor
    """`(features,)`."""
    counts: bool
    """Whether samples are counted here: once a group, however many consumers it has."""


def _entries(groups: Iterable[NodeGroup], device: torch.device) -> dict[str, list[_Entry]]:
    found: dict[str, list[_Entry]] = {}
    for group in groups:
        if not group.consumers:
            raise ModelError(f"{group.name} has no consumer that a gate could sit on; leave it out of the gated groups")
        for place, consumer in enumerate(group.consumers):
            found.setdefault(consumer.module, []).append(_entry(group, consumer, device, counts=place == 0))
    return found


def _entry(group: NodeGroup, consumer: Consumer, device: torch.device, *, counts: bool) -> _Entry:
    ones = torch.ones(consumer.features, device=device)
    return _Entry(group.name, consumer.rows.to(device), ones, counts)


def _empty(size: int, device: torch.device) -> GateStatistics:
    return GateStatistics(torch.zeros(size, device=device), torch.zeros(size, device=device), 0)


@torch.no_grad()
def fold_gates_(model: nn.Module, graph: Graph, gates: Mapping[str, Tensor]) -> None:
    """Multiplies the weights that read gated features by the gates: the model by itself gives what it gave with them on.

    Args:
        model: the model that `graph` was discovered on, without adapters; changed in place.
        graph: its node groups.
        gates: group -> gates, `(structures,)`; groups that are left out keep theirs at 1.
    """
    named = dict(model.named_parameters())
    for name, values in gates.items():
        for consumer in graph[name].consumers:
            axes = graph.parameters[consumer.parameter].axes
            dim = next(at for at, axis in enumerate(axes) if axis.root() is consumer.axis.root())
            features_first = named[consumer.parameter].movedim(dim, 0)
            rows = consumer.rows.to(features_first.device)
            factor = values.to(features_first).repeat_interleave(rows.shape[1])
            features_first[rows.flatten()] *= factor.view(-1, *[1] * (features_first.dim() - 1))


def gate_statistics(
    model: nn.Module,
    groups: Iterable[NodeGroup],
    windows: Tensor,
    *,
    batch: int,
    dtype: torch.dtype | None = None,
    writers: Mapping[str, Member] | None = None,
) -> dict[str, GateStatistics]:
    """Statistics of the gates' derivatives over `windows`, `(samples, window)` token ids; nothing of the model
    changes.

    With `writers` (of `expert_writers`) the gates of these experts are metered too, which takes one window at a time.
    """
    from lorashear.pruning.expert_gates import metered_experts

    gates = StructureGates(model, groups)
    try:
        with gates.metered(), input_gradients(model), metered_experts(model, writers or {}) as of_experts:
            run_back(model, windows, batch=1 if writers else batch, description="Saliency", dtype=dtype)
        return gates.statistics() | of_experts
    finally:
        gates.remove()
