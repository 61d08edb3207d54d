"""Zero or cut out what a plan removes, in place."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from lorashear.errors import PlanError
from lorashear.graph.base import base_model
from lorashear.graph.geometry import Geometry
from lorashear.graph.groups import Graph
from lorashear.plan import Plan

LORASHEAR_KEY = "lorashear"
"""Key of `config.json` that holds the shape of a model whose layers differ."""


def zero_(model: nn.Module, graph: Graph, plan: Plan) -> None:
    """Sets every parameter slice of the plan's structures to zero, in the adapters too.

    Args:
        model: the model that `graph` was discovered on.
        graph: its node groups.
        plan: what to zero.

    Raises:
        PlanError: when plan, graph and model do not belong together.
    """
    plan.check(graph)
    tensors = _tensors(model)
    with torch.no_grad():
        for name, structures in plan.removed.items():
            for member in graph[name].members:
                if not member.buffer:
                    rows = member.rows[list(structures)].flatten()
                    tensor = _tensor(tensors, member.parameter)
                    tensor.index_fill_(member.dim, rows.to(tensor.device), 0)


def cut_(model: nn.Module, graph: Graph, plan: Plan) -> None:
    """Removes every parameter slice of the plan's structures and mends sizes, attributes and configuration.

    Gives the same logits as `zero_`. A plan that leaves all layers equal becomes a plain model whose configuration
    tells
    its true sizes; any other keeps the old configuration and notes the layers' own values under `config.lorashear`.

    Raises:
        PlanError: when plan, graph and model do not belong together, or when a uniform plan gives widths that the
        model's
            configuration class refuses. The model is untouched then.
    """
    plan.check(graph)
    tensors = _tensors(model)
    masks = list(graph.keep_masks(plan.removed))
    for name, dim, mask in masks:
        if _tensor(tensors, name).shape[dim] != mask.numel():
            raise PlanError(
                f"{name} has {tensors[name].shape[dim]} entries along dimension {dim}, the graph says {mask.numel()}: "
                "the model was cut already; discover it again"
            )
    changes = _Changes.of(graph, plan)
    for name, dim, mask in masks:
        tensor = tensors[name]
        keep = mask.nonzero().flatten().to(tensor.device)
        tensors[name] = tensor.detach().index_select(dim, keep)
    _replace_(model, {name: tensors[name] for name, _, _ in masks})
    changes.apply_(model, graph)
    _mend_features(model)


def _replace_(model: nn.Module, smaller: dict[str, Tensor]) -> None:
    """Puts new parameters and buffers in place of the old ones, everywhere the old ones are used (ties).

    A parameter that only changed its data would keep the shape of its old gradient inside autograd.
    """
    old = _tensors(model)
    new: dict[int, Tensor] = {}
    for name, tensor in smaller.items():
        before = old[name]
        is_parameter = isinstance(before, nn.Parameter)
        new[id(before)] = nn.Parameter(tensor, requires_grad=before.requires_grad) if is_parameter else tensor
    for module in model.modules():
        for table in (module._parameters, module._buffers):
            for key, value in table.items():
                if value is not None and id(value) in new:
                    table[key] = new[id(value)]  # type: ignore[assignment]


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    named = dict(model.named_parameters(remove_duplicate=False))
    return {**named, **dict(model.named_buffers(remove_duplicate=False))}


def _tensor(tensors: dict[str, Tensor], name: str) -> Tensor:
    if name not in tensors:
        raise PlanError(
            f"the model has no parameter {name}: the graph was discovered on another model, or before adapters were "
            "added or merged; call discover on this one"
        )
    return tensors[name]


class _Changes:
    """Configuration values and module attributes that follow the cut, found by building the model with them."""

    def __init__(self, geometry: Geometry, per_layer: list[dict[str, int]], uniform: bool) -> None:
        self.geometry = geometry
        self.per_layer = per_layer
        self.uniform = uniform

    @classmethod
    def of(cls, graph: Graph, plan: Plan) -> _Changes:
        geometry = graph.geometry
        if geometry is None:
            raise PlanError("the model has no configuration, so its modules' sizes cannot be mended; zero_ it instead")
        per_layer = layer_overrides(graph, plan)
        same = all(overrides == per_layer[0] for overrides in per_layer)
        refusal = geometry.refusal(per_layer[0]) if same else "its layers differ in width"
        if plan.shape == "uniform" and refusal:
            raise PlanError(f"a uniform plan has to give a plain model, and this one does not: {refusal}")
        return cls(geometry, per_layer, uniform=not refusal)

    def apply_(self, model: nn.Module, graph: Graph) -> None:
        base = base_model(model)
        plain = dict(self.geometry.build({}).named_modules())
        modules = {path.replace(".base_layer", ""): m for path, m in base.named_modules() if not _is_wrapper(m)}
        built: dict[tuple[tuple[str, int], ...], dict[str, nn.Module]] = {}
        for layer, overrides in enumerate(self.per_layer):
            key = tuple(sorted(overrides.items()))
            if key not in built:
                built[key] = dict(self.geometry.build(overrides).named_modules())
            inside = f"{graph.layers_path}.{layer}."
            for path, variant in built[key].items():
                everywhere = self.uniform and layer == 0 and not path.startswith(graph.layers_path + ".")
                if (path.startswith(inside) or everywhere) and path in modules:
                    _copy_numbers(plain[path], variant, modules[path])
        config = base.config
        if self.uniform:
            for key_, value in self.per_layer[0].items():
                setattr(config, key_, value)
        else:
            changed = {str(layer): values for layer, values in enumerate(self.per_layer) if values}
            note = {"shape": "per-layer", "layers_path": graph.layers_path, "per_layer": changed}
            setattr(config, LORASHEAR_KEY, note)


def layer_overrides(graph: Graph, plan: Plan) -> list[dict[str, int]]:
    """Per decoder layer, the configuration values with which the model's own code builds that layer as it is cut.

    Raises:
        PlanError: when no configuration value gives a layer's widths.
    """
    geometry = graph.geometry
    assert geometry is not None
    solved: dict[tuple[tuple[str, int], ...], dict[str, int]] = {}
    result = []
    for layer in range(graph.num_layers):
        counts = {g.role: len(plan.removed.get(g.name, ())) for g in graph.prunable if g.layer == layer}
        key = tuple(sorted(counts.items()))
        if key not in solved:
            alike = {g.name: tuple(range(counts.get(g.role, 0))) for g in graph.prunable}
            overrides = geometry.solve(graph.cut_forms(alike))
            if overrides is None:
                wanted = ", ".join(f"{count} fewer of {role}" for role, count in key if count)
                raise PlanError(f"layer {layer}: no values of the model's configuration give it {wanted}")
            solved[key] = overrides
        result.append(solved[key])
    return result


def _is_wrapper(module: nn.Module) -> bool:
    return isinstance(module, BaseTunerLayer)


def _copy_numbers(before: nn.Module, after: nn.Module, target: nn.Module) -> None:
    """Numbers that building with other configuration values changed are changed in the live module too."""
    for name, value in vars(after).items():
        if isinstance(value, (int, float)) and value != vars(before).get(name) and name in vars(target):
            setattr(target, name, value)


def _mend_features(model: nn.Module) -> None:
    """`in_features` and `out_features` of adapters, which building the plain model does not show."""
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.out_features, module.in_features = module.weight.shape
    for module in _wrappers(model):
        base = module.get_base_layer()
        if isinstance(base, nn.Linear):
            module.in_features, module.out_features = base.in_features, base.out_features


def _wrappers(model: nn.Module) -> Iterable[BaseTunerLayer]:
    return (module for module in model.modules() if isinstance(module, BaseTunerLayer))
