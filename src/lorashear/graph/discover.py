"""`discover`: from a model to its node groups, through one traced run."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from lorashear.errors import ModelError
from lorashear.graph.axes import Axis
from lorashear.graph.base import base_model
from lorashear.graph.depth import depth_group
from lorashear.graph.flow import follow, inexact_reasons
from lorashear.graph.geometry import Geometry, probe_geometry
from lorashear.graph.groups import Consumer, Exactness, Graph, Kind, Member, NodeGroup, ParameterInfo
from lorashear.graph.inference import Inference, infer
from lorashear.graph.inputs import example_inputs
from lorashear.graph.labels import kind_of
from lorashear.graph.names import Names, common_path
from lorashear.graph.trace import record

OWN_SHAPE = "no value of the configuration sets this width: such a model loads with lorashear.load"


def discover(model: nn.Module, *, inputs: Mapping[str, Tensor] | None = None, realisable: bool = True) -> Graph:
    """Finds the node groups of a model, with or without stock peft adapters. No weight is read, none is changed.

    Args:
        model: a `PreTrainedModel` or `PeftModel` (decoder, encoder, vision model: whatever runs on made-up inputs), its
            weights real or on the meta device; or any module, with `inputs`.
        inputs: what to run it on, by argument name, small and on the CPU; None makes up token ids or pixels.
        realisable: also find out what the model's own code can be built with (most of the time goes there); without it no
            group is prunable.

    Returns:
        All node groups, the prunable ones and those that are pinned with the reason (paper: dependency graph and
        minimal removal structures).

    Raises:
        ModelError: when the model does not run on such inputs.
    """
    names = Names.of(model)
    with torch.device("cpu"):  # whatever device the caller builds models on, masks and made-up inputs are ours
        graph = _graph(model, names, example_inputs(model) if inputs is None else inputs)
        if not realisable:
            return graph
        geometry = probe_geometry(
            base_model(model),
            lambda shallow: _graph(shallow, Names.of(shallow), example_inputs(shallow) if inputs is None else inputs),
            layers_path=names.layers_path,
            num_layers=names.num_layers,
        )
        return replace(graph, geometry=geometry, groups=tuple(_realisable(graph, geometry)))


def _graph(model: nn.Module, names: Names, inputs: Mapping[str, Tensor]) -> Graph:
    """Node groups without knowing what the model's own code can be built with."""
    try:
        trace = record(model, inputs)
    except Exception as error:
        raise ModelError(
            f"{type(model).__name__} does not run on made-up {', '.join(inputs)} alone ({type(error).__name__}: {error}); "
            "give discover(model, inputs=...) what it takes, or load the text model of a multimodal checkpoint"
        ) from error
    inference = infer(trace)
    parameters = {
        name: ParameterInfo(
            name=name,
            axes=tuple(inference.dims[number]),
            adapter=names.adapter(name),
            decoder=names.layer(name) is not None,
        )
        for number, name in trace.parameters.items()
    }
    groups = _judged(_found(inference, names), inference, names)
    depth = depth_group(model, trace, names)
    return Graph(
        groups=(*groups, *([depth] if depth else [])),
        parameters=parameters,
        aliases=names.aliases,
        layers_path=names.layers_path,
        num_layers=names.num_layers,
        canonical={name: names.canonical(name) for name in parameters},
        inference=inference,
    )


def _found(inference: Inference, names: Names) -> dict[Axis, list[Member]]:
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


def _judged(found: Mapping[Axis, list[Member]], inference: Inference, names: Names) -> list[NodeGroup]:
    flow = follow(inference)
    inference.choices = flow.choices
    inexact = inexact_reasons(inference, flow, found)
    consumers = _consumers(inference, names)
    chosen = _chosen(inference)
    groups = []
    taken: Counter[str] = Counter()
    for leaf, members in found.items():
        kind = kind_of(leaf, found, consumers[leaf])
        base = [m.parameter for m in members if not m.adapter and not m.buffer] or [m.parameter for m in members]
        layers = {names.layer(name) for name in base}
        layer = layers.pop() if len(layers) == 1 else None
        name = f"{common_path([names.canonical(n) for n in base])}:{kind.value}"
        taken[name] += 1
        if taken[name] > 1:
            name += f".{taken[name]}"
        exactness, reason = _exactness(leaf, kind, inexact.get(leaf), inference.trace.made_up_weights)
        groups.append(
            NodeGroup(
                name=name,
                kind=kind,
                size=leaf.size,
                members=tuple(members),
                consumers=tuple(consumers[leaf]),
                exactness=exactness,
                realisable=False,
                reason=reason,
                layer=layer,
                role=names.role(name, layer),
                minimum=chosen.get(leaf, 1),
            )
        )
    return groups


def _exactness(leaf: Axis, kind: Kind, inexact: tuple[str, str] | None, made_up: bool) -> tuple[Exactness, str]:
    if kind is Kind.RANK:
        return Exactness.PINNED, "the rank of an adapter, internal to it"
    if "pin" in leaf.tags:
        return Exactness.PINNED, leaf.tags["pin"]
    if kind is Kind.EXPERTS and made_up:
        return Exactness.PINNED, "the code loops over the experts that weights chose, so it was traced on made-up ones"
    if inexact and inexact[0] == "fold":
        return Exactness.RESCALED, f"averaged over by {inexact[1]}"
    if inexact:
        return Exactness.PINNED, f"not exact: {inexact[1]} couples its entries"
    return Exactness.EXACT, ""


def _chosen(inference: Inference) -> dict[Axis, int]:
    """Leaf of experts -> how many are chosen at once, at most."""
    found: dict[Axis, int] = {}
    for site in inference.sites:
        if site.kind == "topk":
            for leaf in site.operands[0][1].leaves():
                found[leaf] = max(found.get(leaf, 1), int(site.node.args[1]))
    return found


def _consumers(inference: Inference, names: Names) -> dict[Axis, list[Consumer]]:
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
        calls = inference.trace.calls.get(path)
        dims = inference.dims.get(calls[0].input) if calls else None
        if not dims or dims[-1].root() is not axis.root():
            continue
        for leaf in axis.leaves():
            found[leaf][path] = Consumer(path, weight, axis, leaf)
    return defaultdict(list, {leaf: list(by_path.values()) for leaf, by_path in found.items()})


def _realisable(graph: Graph, geometry: Geometry | None) -> Sequence[NodeGroup]:
    """Asks for every role whether the model's own code can be built with fewer structures, and how."""
    if geometry is None:
        why = "exact, but without a configuration nothing says what the model can be built with"
        return [replace(group, reason=group.reason or why) for group in graph.groups]
    result = []
    for group in graph.groups:
        if group.exactness is Exactness.RESCALED and (obstacle := geometry.unscalable(group.role)):
            why = f"{group.reason}, and no multiples of its weights make up for that: {obstacle}"
            result.append(replace(group, exactness=Exactness.PINNED, reason=why))
        elif not group.exact:
            result.append(group)
        elif where := _counted(group):
            why = f"exact, but {where} numbers them anew, so that those left would be taken for the first ones"
            result.append(replace(group, reason=group.reason or why))
        elif (settings := geometry.settings_of(group.role)) is not None:
            keys = tuple(setting.key for setting in settings)
            result.append(replace(group, realisable=True, settings=keys))
        elif geometry.attributes_of(group.role) is not None:
            result.append(replace(group, realisable=True, reason=group.reason or OWN_SHAPE))
        else:
            result.append(replace(group, reason=geometry.why_not(group.role)))
    return result


def _counted(group: NodeGroup) -> str:
    """Where the model's code computes something from the structures' numbers (the slopes of ALiBi), in every run."""
    return next((m.leaf.tags["index-value"] for m in group.members if "index-value" in m.leaf.tags), "")
