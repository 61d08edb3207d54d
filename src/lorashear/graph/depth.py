"""Whole layers: residual branches that can be left out.

A layer is a structure when it hands its input on once all its parameters are zero, and when nothing after it reads
anything of it but its output.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum

from torch import nn

from lorashear.graph.flow import ALL_ZERO, KEEPS_ZERO
from lorashear.graph.groups import Exactness, Kind, LayerStructure, NodeGroup
from lorashear.graph.names import Names
from lorashear.graph.trace import Call, Node, Ref, Trace


class _State(Enum):
    """What a tensor is while all parameters of the layer are zero."""

    ZERO = "zero"
    INPUT = "the layer's input"
    OTHER = "something else"


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
    state = dict.fromkeys(parameters, _State.ZERO)
    state[call.input] = _State.INPUT
    for node in trace.nodes[call.start : call.end]:
        result = _result(node, state)
        for number in node.outs:
            state[number] = result
    return "" if state.get(call.output) is _State.INPUT else f"{path} changes its input even with its weights at zero"  # type: ignore[arg-type]


def _result(node: Node, state: dict[int, _State]) -> _State:
    of = [state.get(number, _State.OTHER) for number in node.inputs()]
    zero = [each is _State.ZERO for each in of]
    name = node.name
    if name in ALL_ZERO:
        return _State.ZERO
    if not of:
        return _State.OTHER
    if name in ("add", "sub") and _State.INPUT in of and all(isinstance(arg, Ref) for arg in node.args[:2]):
        rest = [each for each in of if each is not _State.INPUT]
        return (
            _State.INPUT
            if (of[0] is _State.INPUT and rest == [_State.ZERO]) or (name == "add" and rest == [_State.ZERO])
            else _State.OTHER
        )
    if name in COPIES and of[0] is _State.INPUT:
        return _State.INPUT
    if name in ("mul", "mm", "bmm", "mv", "dot"):
        return _State.ZERO if any(zero) else _State.OTHER
    if name in ("addmm", "baddbmm", "addmv"):
        return _State.ZERO if zero[0] and any(zero[1:]) else _State.OTHER
    if name in ("add", "sub", "rsub") and all(isinstance(arg, Ref) or arg == 0 for arg in node.args[:2]):
        return _State.ZERO if all(zero) else _State.OTHER
    if name in ("cat", "stack", "where", "maximum", "minimum", "scatter_add", "index_add"):
        tensors = zero[1:] if name == "where" else zero[:1] + zero[2:] if "add" in name else zero
        return _State.ZERO if all(tensors) else _State.OTHER
    if name == "convolution":
        return _State.ZERO if (zero[0] or zero[1]) and all(zero[2:]) else _State.OTHER
    if name == "native_layer_norm":
        return _State.ZERO if len(zero) > 1 and all(zero[1:]) else _State.OTHER
    if name == "copy":
        return of[-1]
    if name in KEEPS_ZERO or name in ("div", "pow", "embedding", "masked_fill"):
        return _State.ZERO if zero[0] and (name != "masked_fill" or node.args[2] == 0) else _State.OTHER
    return _State.OTHER
