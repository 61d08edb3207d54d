"""What follows a cut beside the tensors: configuration values and numbers that modules keep.

A width that a configuration value sets is realised by building the model with that value and copying what it changed.
Where layers differ, or where no value sets a width, the configuration keeps its old values and a note under
`config.lorashear` tells the layers' own; `lorashear.load` builds from it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from lorashear.errors import PlanError
from lorashear.graph.attributes import set_attributes_
from lorashear.graph.base import base_model, base_module
from lorashear.graph.geometry import Geometry, Value, set_value
from lorashear.graph.groups import Graph, NodeGroup
from lorashear.plan import Plan

LORASHEAR_KEY = "lorashear"
"""Key of `config.json` that holds the shape of a model that stock code cannot build."""


@dataclass
class Changes:
    """Found once for a plan, applied to a copy without weights and then to the model."""

    geometry: Geometry
    everywhere: dict[str, Value]
    """Configuration values of the whole model."""
    per_layer: list[dict[str, Value]] | None
    """Configuration values that each layer is built with, where they differ; None for a plain model."""
    own: list[tuple[NodeGroup, int]] = field(default_factory=list)
    """Groups that no configuration value sets, with the number of structures that stay."""
    _built: dict[str, nn.Module] = field(default_factory=dict)

    @classmethod
    def of(cls, graph: Graph, plan: Plan) -> Changes:
        """Raises `PlanError` when a plan's widths cannot be realised, or not in the shape it asks for."""
        geometry = graph.geometry
        if geometry is None:
            raise PlanError("the model has no configuration, so its modules' sizes cannot be mended; zero_ it instead")
        own = [
            (graph[name], graph[name].size - len(rows)) for name, rows in plan.removed.items() if not graph[name].plain
        ]
        everywhere = _uniform_overrides(graph, plan)
        refusal = "its layers differ in width" if everywhere is None else geometry.refusal(everywhere)
        told = None if refusal else everywhere
        if told is not None and not own:
            return cls(geometry, told, None)
        if plan.shape == "uniform":
            refusal = f"no value of the configuration sets the width of {own[0][0].role}" if own else refusal
            raise PlanError(f"a uniform plan has to give a plain model, and this one does not: {refusal}")
        if told is not None:  # the configuration tells all widths but those that no value sets
            return cls(geometry, told, [told] * max(graph.num_layers, 1), own)
        return cls(geometry, _solved(graph, plan, _spanning(graph)), layer_overrides(graph, plan), own)

    def apply_(self, model: nn.Module, graph: Graph) -> None:
        """Mends the numbers of modules and the configuration of a model whose tensors are cut."""
        base = base_model(model)
        modules = {path.replace(".base_layer", ""): m for path, m in base.named_modules() if not is_wrapper(m)}
        plain = dict(self._model({}).named_modules())
        inside = f"{graph.layers_path}."
        for path, variant in self._model(self.everywhere).named_modules():
            if path in modules and (self.per_layer is None or not path.startswith(inside)):
                _copy_numbers(plain[path], variant, modules[path])
        for layer, overrides in enumerate(self.per_layer or ()):
            for path, variant in self._model(overrides).named_modules():
                if path in modules and path.startswith(f"{inside}{layer}."):
                    _copy_numbers(plain[path], variant, modules[path])
        for group, kept in self.own:
            attributes = self.geometry.attributes_of(group.role) or ()
            set_attributes_(base, graph, group, attributes, kept)
        for key, value in self.everywhere.items():
            set_value(base.config, key, value)
        if self.per_layer is not None:
            setattr(base.config, LORASHEAR_KEY, self._note(graph, base))

    def _model(self, overrides: Mapping[str, Value]) -> nn.Module:
        """The whole model with these values, without weights; built once."""
        key = repr(sorted(overrides.items()))
        if key not in self._built:
            self._built[key] = self.geometry.build(overrides)
        return self._built[key]

    def _note(self, graph: Graph, base: nn.Module) -> dict[str, Any]:
        told = self.everywhere
        layers = [{k: v for k, v in each.items() if told.get(k) != v} for each in self.per_layer or ()]
        changed = {str(layer): values for layer, values in enumerate(layers) if values}
        note = {"shape": "per-layer", "layers_path": graph.layers_path, "per_layer": changed}
        if not self.own:
            return note
        tensors = {**dict(base.named_parameters()), **dict(base.named_buffers())}
        canonical = {name.replace(".base_layer", ""): tensor for name, tensor in tensors.items()}
        members = {graph.canonical.get(m.parameter, m.parameter) for group, _ in self.own for m in group.members}
        note["sizes"] = {name: list(canonical[name].shape) for name in sorted(members) if name in canonical}
        attributes: dict[str, dict[str, int]] = {}
        for group, _ in self.own:
            for attribute in self.geometry.attributes_of(group.role) or ():
                path = attribute.owner(graph, group)
                attributes.setdefault(path, {})[attribute.name] = getattr(base_module(base, path), attribute.name)
        note["attributes"] = attributes
        return note


def _uniform_overrides(graph: Graph, plan: Plan) -> dict[str, Value] | None:
    """The configuration values of the whole cut model, where every role keeps as many structures in all its layers."""
    assert graph.geometry is not None
    gone = _gone(graph, plan)
    kept: dict[str, set[int]] = {}
    for group in graph.prunable:
        if group.plain and not group.layers and group.layer not in gone:
            kept.setdefault(group.role, set()).add(group.size - len(plan.removed.get(group.name, ())))
    if any(len(counts) > 1 for counts in kept.values()):
        return None
    return graph.geometry.solve({role: counts.pop() for role, counts in kept.items()})


def _gone(graph: Graph, plan: Plan) -> set[int | None]:
    return {index for group in graph if group.layers for index in plan.removed.get(group.name, ())}


def _spanning(graph: Graph) -> list[NodeGroup]:
    return [group for group in graph.prunable if group.plain and group.layer is None and not group.layers]


def layer_overrides(graph: Graph, plan: Plan) -> list[dict[str, Value]]:
    """Per layer, the configuration values with which the model's own code builds that layer as it is cut.

    Groups that span layers count for every one of them; layers that are removed have no say.

    Raises:
        PlanError: when no configuration value gives a layer's widths.
    """
    gone = _gone(graph, plan)
    spanning = _spanning(graph)
    return [
        _solved(
            graph, plan, [g for g in graph.prunable if g.plain and g.layer == layer and layer not in gone] + spanning
        )
        for layer in range(max(graph.num_layers, 1))
    ]


def _solved(graph: Graph, plan: Plan, groups: list[NodeGroup]) -> dict[str, Value]:
    assert graph.geometry is not None
    kept = {group.role: group.size - len(plan.removed.get(group.name, ())) for group in groups}
    overrides = graph.geometry.solve(kept)
    if overrides is None:
        wanted = ", ".join(f"{len(plan.removed[g.name])} fewer of {g.role}" for g in groups if g.name in plan.removed)
        raise PlanError(f"no values of the model's configuration give it {wanted}")
    return overrides


def is_wrapper(module: nn.Module) -> bool:
    """Whether a module is peft's, around one of the model's own."""
    return isinstance(module, BaseTunerLayer)


def _copy_numbers(before: nn.Module, after: nn.Module, target: nn.Module) -> None:
    """Numbers, and buffers that are computed and not saved, are changed in the live module where building with other
    configuration values changed them."""
    for name, value in vars(after).items():
        if isinstance(value, (int, float)) and value != vars(before).get(name) and name in vars(target):
            setattr(target, name, value)
    for name in after._non_persistent_buffers_set & target._buffers.keys() & before._buffers.keys():
        new, old, live = after._buffers[name], before._buffers[name], target._buffers[name]
        if (
            new is None
            or old is None
            or live is None
            or new.is_meta
            or (new.shape == old.shape and torch.equal(new, old))
        ):
            continue
        target._buffers[name] = new.to(live)
