"""Whole layers: residual branches that can be left out.

A layer is a structure when it hands its input on once all its parameters are zero, and when nothing after it reads
anything of it but its output.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from lorashear.graph.axes import Axis
from lorashear.graph.flow import Flow, advance
from lorashear.graph.groups import Exactness, Kind, LayerStructure, NodeGroup
from lorashear.graph.names import Names
from lorashear.graph.trace import Call, Node, Ref, Trace

LAYER = Axis(1)
"""What the walk of `flow.py` follows here: not an index of an axis, but all that a layer's parameters make zero."""


class _LayerFlow(Flow):
    """Every tensor is zero as a whole, or is not."""

    def carried(self, number: int) -> set[Axis]:  # noqa: ARG002
        return {LAYER}

    def along(self, number: int, dim: int) -> set[Axis]:  # noqa: ARG002
        return set()


COPIES = frozenset(
    """
    _to_copy clone detach alias contiguous to dropout native_dropout lift_fresh view _unsafe_view reshape
    unsqueeze squeeze _reshape_alias
""".split()
)
"""Operators that keep every entry in its order."""


def depth_group(model: nn.Module, trace: Trace, names: Names) -> NodeGroup | None:
    """The group of whole layers; None for a model without a list of layers."""
    if names.num_layers < 2:
        return None
    parameters = [name for name, _ in model.named_parameters()]
    structures, reason = [], ""
    owned = {name: number for number, name in trace.parameters.items()}
    last_use = {number: at for at, node in enumerate(trace.nodes) for number in node.inputs()}
    for layer in range(names.num_layers):
        path = f"{names.layers_path}.{layer}"
        module = names.prefix + path
        mine = tuple(name for name in parameters if name.startswith(module + "."))
        structures.append(LayerStructure(module, mine))
        reason = reason or _obstacle(trace, trace.calls.get(module, []), {owned[name] for name in mine}, path, last_use)
    shared = {kept for alias, kept in names.aliases.items() if names.layer(alias) != names.layer(kept)}
    if not reason and any(shared & set(structure.parameters) for structure in structures):
        reason = "layers share weights"
    return NodeGroup(
        name=f"{names.layers_path}:{Kind.DEPTH.value}",
        kind=Kind.DEPTH,
        size=names.num_layers,
        members=(),
        consumers=(),
        exactness=Exactness.PINNED if reason else Exactness.EXACT,
        realisable=False,
        reason=reason,
        layer=None,
        role=f"{names.layers_path}:{Kind.DEPTH.value}",
        layers=tuple(structures),
    )


def _obstacle(trace: Trace, calls: list[Call], parameters: set[int], path: str, last_use: Mapping[int, int]) -> str:
    if len(calls) != 1 or calls[0].output is None:
        return f"{path} is called {len(calls)} times" if len(calls) != 1 else f"{path} returns no tensor"
    call = calls[0]
    if trace.shapes[call.input] != trace.shapes[call.output]:  # type: ignore[index]
        return f"{path} gives another shape than it is given"
    inside = {number for node in trace.nodes[call.start : call.end] for number in node.outs}
    inside -= {call.input, call.output}
    leaked = max((last_use.get(number, 0) for number in inside), default=0)
    if leaked >= call.end:
        return f"{trace.nodes[leaked].where} reads from inside of {path}"
    return "" if _hands_on(trace, call, parameters) else f"{path} changes its input even with its weights at zero"


def _hands_on(trace: Trace, call: Call, parameters: set[int]) -> bool:
    """Whether a layer whose parameters are all zero gives what it is given."""
    flow = _LayerFlow({}, zero={number: {LAYER} for number in parameters})
    same = {call.input}
    for node in trace.nodes[call.start : call.end]:
        inputs = [number for number in node.inputs() if number in same]
        kept = bool(inputs) and _keeps(node, inputs[0], flow)
        advance(node, flow)
        if kept:
            same.update(node.outs)
        elif node.op._schema.is_mutable:
            same.difference_update(flow.family(node.outs[0]))
    return call.output in same


def _keeps(node: Node, given: int, flow: Flow) -> bool:
    """Whether a node that reads the layer's input (or a copy of it) gives just that."""
    if node.name in COPIES:
        return node.inputs()[0] == given
    first, second, *_ = (*node.args, None, None)
    if node.name not in ("add", "sub") or not (isinstance(first, Ref) and isinstance(second, Ref)):
        return False
    other = second.number if first.number == given else first.number
    return bool(flow.zero.get(other)) and (node.name == "add" or first.number == given)
