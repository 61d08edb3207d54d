"""Takes whole layers out of a model."""

from __future__ import annotations

import re
from typing import Any

from torch import nn

from lorashear.errors import PlanError
from lorashear.graph.base import base_model
from lorashear.graph.geometry import Geometry, get_value, set_value
from lorashear.graph.groups import Graph
from lorashear.plan import Plan
from lorashear.surgery.changes import LORASHEAR_KEY


def dropped(graph: Graph, plan: Plan) -> list[str]:
    """Paths of the layers that a plan removes, in the traced model."""
    return [group.layers[index].module for group in graph if group.layers for index in plan.removed.get(group.name, ())]


def drop_layers_(model: nn.Module, graph: Graph, plan: Plan) -> None:
    """Removes the plan's layers from the list of layers, renumbers the others, and shortens the configuration."""
    for group in graph:
        gone = set(plan.removed.get(group.name, ())) if group.layers else set()
        if not gone:
            continue
        base = base_model(model)
        layers = base.get_submodule(graph.layers_path)
        kept = [index for index in range(len(layers)) if index not in gone]
        names = _index_names(layers)
        for new, old in enumerate(kept):
            for module in layers[old].modules():
                for name in names:
                    if vars(module).get(name) == old:
                        setattr(module, name, new)
        parent, _, last = graph.layers_path.rpartition(".")
        setattr(base.get_submodule(parent) if parent else base, last, nn.ModuleList(layers[index] for index in kept))
        _shorten(base.config, graph, len(layers), kept)
        note = getattr(base.config, LORASHEAR_KEY, None)
        if note is not None:
            setattr(base.config, LORASHEAR_KEY, _renumbered(note, graph.layers_path, kept))


def _renumbered(note: dict[str, Any], layers_path: str, kept: list[int]) -> dict[str, Any]:
    """The note of a model whose layers differ, for the layers that are left."""
    places = {str(old): str(new) for new, old in enumerate(kept)}
    result = dict(note, per_layer={places[old]: own for old, own in note["per_layer"].items() if old in places})
    for key in ("sizes", "attributes"):
        entries = {}
        for name, value in note.get(key, {}).items():
            match = re.match(rf"{re.escape(layers_path)}\.(\d+)(?=\.|$)", name)
            if match is None:
                entries[name] = value
            elif match.group(1) in places:
                entries[f"{layers_path}.{places[match.group(1)]}{name[match.end() :]}"] = value
        if key in note:
            result[key] = entries
    return result


def _index_names(layers: Any) -> set[str]:
    """Attributes that every layer has and that hold its index in each: what is renumbered."""
    found: dict[str, set[int]] = {}
    other: set[str] = set()
    for index, layer in enumerate(layers):
        for module in layer.modules():
            for name, value in vars(module).items():
                if type(value) is int:
                    found.setdefault(name, set()).add(index)
                    if value != index:
                        other.add(name)
    return {name for name, where in found.items() if len(where) == len(layers) and name not in other}


def _shorten(config: Any, graph: Graph, count: int, kept: list[int]) -> None:
    """The number of layers, every list that says something of each of them, and what names layers by their numbers."""
    geometry = graph.geometry
    if geometry is None or not geometry.depth_key:
        raise PlanError("no value of the model's configuration sets the number of layers; zero_ them instead")
    moved = _layer_numbers(geometry, graph.layers_path, count, kept)
    for key, value in {**_lists(config, geometry.depth_key, count, kept), **moved}.items():
        set_value(config, key, value)
    set_value(config, geometry.depth_key, len(kept))


def _lists(config: Any, depth_key: str, count: int, kept: list[int]) -> dict[str, Any]:
    """The lists with an entry a layer, without those of the layers that go."""
    values = _beside(config, depth_key).items()
    lists = {key: value for key, value in values if isinstance(value, (list, tuple)) and len(value) == count}
    return {key: [value[index] for index in kept] for key, value in lists.items()}


def _beside(config: Any, depth_key: str) -> dict[str, Any]:
    """The part of a configuration that holds the number of layers, by dotted keys."""
    prefix, dot, _ = depth_key.rpartition(".")
    owner = get_value(config, prefix) if prefix else config
    return {f"{prefix}{dot}{key}": value for key, value in owner.to_dict().items()}


def _layer_numbers(geometry: Geometry, layers_path: str, count: int, kept: list[int]) -> dict[str, Any]:
    """Values that name layers (which of them are dense, from which on) and have to follow, so that the configuration
    builds each layer that stays as what it was; nothing where it does so anyway."""
    values = _beside(geometry.config, geometry.depth_key)
    shorter = _lists(geometry.config, geometry.depth_key, count, kept) | {geometry.depth_key: len(kept)}
    whole = geometry.build({}).get_submodule(layers_path)
    wanted = [_modules(whole[index]) for index in kept]  # type: ignore[index]
    changes = [{key: _followed(values[key], count, kept)} for key in values.keys() - shorter.keys()]
    for change in [{}, *sorted((each for each in changes if None not in each.values()), key=str)]:
        try:
            built = geometry.build(shorter | change).get_submodule(layers_path)
        except Exception:  # a value that the class cannot be built with was none that names layers
            continue
        if [_modules(layer) for layer in built.children()] == wanted:
            return change
    raise PlanError(
        f"without layers {', '.join(str(i) for i in range(count) if i not in kept)} the configuration would build others "
        "than those that stay; zero_ them instead"
    )


def _followed(value: Any, count: int, kept: list[int]) -> Any:
    """A list of layer numbers, or the number of a layer or of the first layers, once others are gone; None for else."""
    if isinstance(value, list) and value and all(type(each) is int and 0 <= each < count for each in value):
        return [kept.index(each) for each in value if each in kept]
    if type(value) is int and 0 < value <= count:
        return sum(index < value for index in kept)
    return None


def _modules(layer: nn.Module) -> dict[str, type[nn.Module]]:
    """What a layer is made of."""
    return {path: type(module) for path, module in layer.named_modules()}
