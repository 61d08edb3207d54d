"""`discover`: from a model to its node groups, through one traced run."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from lorashear.errors import ModelError
from lorashear.graph.axes import Axis
from lorashear.graph.base import base_model
from lorashear.graph.flow import inexact_reasons
from lorashear.graph.geometry import probe_geometry
from lorashear.graph.groups import Consumer, Graph, Kind, Member, NodeGroup, ParameterInfo
from lorashear.graph.inference import Inference, infer
from lorashear.graph.trace import record

TOKENS = 13
"""Length of the traced run; a prime that meets no width of a real model by accident."""


def discover(model: nn.Module) -> Graph:
    """Finds the node groups of a model, with or without stock peft adapters. No weight is read, none is changed.

    Args:
        model: a causal language model (`PreTrainedModel` or `PeftModel`), its weights real or on the meta device.

    Returns:
        All node groups, the prunable ones and those that are pinned with the reason (paper: dependency graph and
        minimal removal structures).

    Raises:
        ModelError: when the model does not run on token ids alone.
    """
    names = _Names.of(model)
    vocabulary = int(getattr(getattr(model, "config", None), "vocab_size", TOKENS + 1))
    tokens = torch.arange(TOKENS).remainder(vocabulary).unsqueeze(0)
    try:
        trace = record(model, {"input_ids": tokens})
    except Exception as error:
        raise ModelError(
            f"{type(model).__name__} does not run on token ids alone ({type(error).__name__}: {error}); lorashear traces "
            "decoders through model(input_ids=...), so load the text model of a multimodal checkpoint"
        ) from error
    inference = infer(trace)
    base = base_model(model)
    parameters = _parameters(inference, names)
    groups = _judged(_found(inference, names), inference, names)
    graph = Graph(
        groups=tuple(groups),
        parameters=parameters,
        aliases=names.aliases,
        layers_path=names.layers_path,
        num_layers=names.num_layers,
        geometry=probe_geometry(base, layers_path=names.layers_path, num_layers=names.num_layers),
        canonical={name: names.canonical(name) for name in parameters},
    )
    return replace(graph, groups=tuple(_realisable(graph)))


@dataclass(frozen=True)
class _Names:
    """How the traced model's module and parameter names relate to those of the model without adapters."""

    prefix: str
    wrappers: frozenset[str]
    """Paths of peft layers."""
    layers_path: str
    num_layers: int
    aliases: Mapping[str, str]

    @classmethod
    def of(cls, model: nn.Module) -> _Names:
        base = base_model(model)
        prefix = next((name + "." for name, module in model.named_modules() if module is base and name), "")
        wrappers = frozenset(name for name, module in model.named_modules() if isinstance(module, BaseTunerLayer))
        lists = [(n, m) for n, m in base.named_modules() if isinstance(m, nn.ModuleList) and len(m)]
        path, layers = max(lists, key=lambda item: sum(p.numel() for p in item[1].parameters()), default=("", None))
        first: dict[int, str] = {}
        aliases: dict[str, str] = {}
        for name, parameter in model.named_parameters(remove_duplicate=False):
            kept = first.setdefault(id(parameter), name)
            if kept != name:
                aliases[name] = kept
        return cls(prefix, wrappers, path, 0 if layers is None else len(layers), aliases)

    def canonical(self, name: str) -> str:
        """The name in the model without adapters."""
        return name.removeprefix(self.prefix).replace(".base_layer", "")

    def adapter(self, name: str) -> bool:
        parts = name.split(".")
        owners = [".".join(parts[:end]) for end in range(1, len(parts))]
        return any(owner in self.wrappers and not name.startswith(owner + ".base_layer.") for owner in owners)

    def layer(self, name: str) -> int | None:
        match = re.match(re.escape(self.layers_path) + r"\.(\d+)\.", self.canonical(name))
        return int(match.group(1)) if match and self.layers_path else None


def _parameters(inference: Inference, names: _Names) -> dict[str, ParameterInfo]:
    return {
        name: ParameterInfo(
            name=name,
            axes=tuple(inference.dims[number]),
            adapter=names.adapter(name),
            decoder=names.layer(name) is not None,
        )
        for number, name in inference.trace.parameters.items()
    }


def _found(inference: Inference, names: _Names) -> dict[Axis, list[Member]]:
    """Every leaf that owns parameter dimensions, with its members; buffers join the leaves that parameters own."""
    used = {number for node in inference.trace.nodes for number in node.inputs()}
    found: dict[Axis, list[Member]] = defaultdict(list)
    trace = inference.trace
    for table, buffer in ((trace.parameters, False), (trace.buffers, True)):
        for number, name in table.items():
            if number not in used:
                continue
            for dim, axis in enumerate(inference.dims.get(number, ())):
                for leaf in axis.leaves():
                    if not buffer or leaf in found:
                        found[leaf].append(Member(name, dim, names.adapter(name), buffer, axis, leaf))
    return found


def _judged(found: Mapping[Axis, list[Member]], inference: Inference, names: _Names) -> list[NodeGroup]:
    inexact = inexact_reasons(inference, found)
    consumers = _consumers(inference, names)
    groups = []
    taken: Counter[str] = Counter()
    for leaf, members in found.items():
        kind = _kind(leaf, members, consumers[leaf])
        base = [m.parameter for m in members if not m.adapter and not m.buffer] or [m.parameter for m in members]
        layers = {names.layer(name) for name in base}
        layer = layers.pop() if len(layers) == 1 else None
        name = f"{_common_path([names.canonical(n) for n in base])}:{kind.value}"
        taken[name] += 1
        if taken[name] > 1:
            name += f".{taken[name]}"
        reason = _reason(leaf, kind, layer, inexact.get(leaf), consumers[leaf])
        groups.append(
            NodeGroup(
                name=name,
                kind=kind,
                size=leaf.size,
                members=tuple(members),
                consumers=tuple(consumers[leaf]),
                prunable=not reason,
                reason=reason,
                layer=layer,
                role=name
                if layer is None
                else name.replace(f"{names.layers_path}.{layer}.", f"{names.layers_path}.*.", 1),
            )
        )
    return groups


def _common_path(names: Iterable[str]) -> str:
    """The innermost module that holds all these parameters; a layer index that differs ends it."""
    paths = [name.split(".")[:-1] for name in names]
    shared = []
    for parts in zip(*paths, strict=False):
        if len(set(parts)) > 1:
            break
        shared.append(parts[0])
    return ".".join(shared) or "model"


def _kind(leaf: Axis, members: list[Member], consumers: list[Consumer]) -> Kind:
    """Read off the tags that the trace left on the axis and off its neighbours in the same dimensions."""
    if all(member.adapter for member in members):
        return Kind.RANK
    if "embedding" in leaf.tags:
        return Kind.RESIDUAL
    if "vocabulary" in leaf.tags or ("pin" in leaf.tags and "output" in leaf.tags["pin"]):
        return Kind.VOCABULARY
    if "attention" in leaf.tags:
        shared = any(other is not leaf and "attention" in other.tags for m in members for other in m.axis.leaves())
        return Kind.QUERY_SLOTS if "repeat" in leaf.tags and shared else Kind.HEADS
    if any("attention" in other.tags for member in members for other in member.axis.leaves()):
        return Kind.HEAD_DIM
    return Kind.CHANNELS if consumers else Kind.OTHER


def _reason(
    leaf: Axis, kind: Kind, layer: int | None, inexact: tuple[str, str] | None, consumers: list[Consumer]
) -> str:
    if kind is Kind.RANK:
        return "the rank of an adapter, internal to it"
    if "pin" in leaf.tags:
        return leaf.tags["pin"]
    if inexact and inexact[0] == "fold":
        return f"averaged over by {inexact[1]}: exact only after the norms are rescaled, which is not done yet"
    if inexact:
        return f"not exact: {inexact[1]} couples its entries"
    if "index-value" in leaf.tags:
        return f"its values are computed from the index by {leaf.tags['index-value']}"
    if layer is None:
        return "shared between layers"
    return "" if consumers else "no module takes it in as features, so nothing can gate it"


def _consumers(inference: Inference, names: _Names) -> dict[Axis, list[Consumer]]:
    """Leaf -> modules that contract it with a base weight: there a structure enters what comes after it."""
    found: dict[Axis, dict[str, Consumer]] = defaultdict(dict)
    for site in inference.sites:
        if site.kind != "contract":
            continue
        owners = [(inference.origin.get(number), axis) for number, axis in site.operands]
        weights = [(name, axis) for name, axis in owners if name and not names.adapter(name)]
        if len(weights) != 1:
            continue
        weight, axis = weights[0]
        path = site.node.module.removesuffix(".base_layer")
        number = inference.trace.module_inputs.get(path)
        dims = inference.dims.get(number) if number is not None else None
        if not dims or dims[-1].size != axis.size:
            continue
        for leaf in axis.leaves():
            found[leaf][path] = Consumer(path, weight, axis, leaf)
    return defaultdict(list, {leaf: list(by_path.values()) for leaf, by_path in found.items()})


def _realisable(graph: Graph) -> list[NodeGroup]:
    """Pins the groups whose widths no configuration value sets: the model's own code could not be built with them."""
    geometry = graph.geometry
    if geometry is None:
        return list(graph.groups)
    verdicts: dict[str, str] = {}
    for group in graph.prunable:
        if group.role in verdicts:
            continue
        alike = [other for other in graph.prunable if other.role == group.role]
        fewer = {other.name: tuple(range(1, other.size)) for other in alike}
        realised = group.size == 1 or geometry.solve(graph.cut_forms(fewer)) is not None
        verdicts[group.role] = (
            "" if realised else "exact, but no value of the model's configuration sets this width alone"
        )
    return [
        replace(group, prunable=False, reason=verdicts[group.role]) if verdicts.get(group.role) else group
        for group in graph.groups
    ]
