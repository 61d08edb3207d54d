"""Which axes may be rotated without the model noticing, and what has to turn with them.

A rotation Q of an axis goes unnoticed where every operator carries the rotated vectors on, takes their length, or
contracts them with a parameter that is rotated too. Decided by a walk over the trace: every tensor that carries the axis
is a *vector* (turns with Q), the *square* of one (only its sum over the axis means anything then), or a parameter of one
dimension that has not met a vector yet. Such a parameter turns too where it is added. Where it is multiplied (the gain
of a norm) it has to go into the weights that read the product first.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field, replace
from typing import Literal

from lorashear.graph.axes import Axis
from lorashear.graph.groups import Graph, NodeGroup
from lorashear.graph.inference import Inference
from lorashear.graph.trace import Node, Ref

CARRIES = frozenset(
    """
    view _unsafe_view reshape unsqueeze squeeze flatten unflatten _reshape_alias permute transpose t expand slice select
    split split_with_sizes unbind alias detach _to_copy clone lift_fresh contiguous to dropout native_dropout neg
    repeat index_select index
""".split()
)
"""Operators that hand a vector on as it is; one that took the axis apart would leave no whole axis behind."""
CONTRACTIONS = frozenset(["mm", "bmm", "mv", "dot", "addmm", "baddbmm", "addmv"])
ADDS = frozenset(["add", "sub", "cat", "stack", "index_add", "scatter_add", "copy", "index_put"])


class NoBasisError(Exception):
    """A rotation of the axis would be noticed; the message names the operator."""


@dataclass(frozen=True)
class Place:
    """One dimension of a parameter."""

    parameter: str
    dim: int


@dataclass(frozen=True)
class Gain:
    """A parameter that vectors are multiplied with entry by entry, as `parameter + offset`."""

    parameter: str
    offset: float
    readers: tuple[Place, ...]
    """Where it can be multiplied into; empty where it cannot (a reader has another use, as a tied table has): only a
    gain that is the same for all entries goes unnoticed then."""


@dataclass(frozen=True)
class Basis:
    """How to rotate one axis."""

    group: NodeGroup
    places: tuple[Place, ...]
    """What is multiplied by Q along the axis."""
    gains: tuple[Gain, ...]
    measured: tuple[str, ...]
    """Modules whose input is a vector `(..., size)` that they take the length of: the norms."""
    writers: tuple[str, ...]
    """Modules whose output is a vector `(..., size)` made by a parameter."""
    inside: str
    """A module that measures or writes vectors inside of itself, so that no hook sees them; empty where there is none."""


@dataclass(frozen=True)
class _State:
    kind: Literal["vector", "square", "parameter"]
    gains: frozenset[int] = frozenset()
    """Tensor numbers of parameters it was multiplied with."""
    number: int = -1
    """Of a parameter, its tensor."""
    offset: float = 0.0
    """Of a parameter, what was added to every entry."""
    scaled: bool = False
    """Whether a parameter was multiplied with anything: what is added after that is no offset of the parameter."""


@dataclass
class _Walk:
    inference: Inference
    leaf: Axis
    states: dict[int, _State] = field(default_factory=dict)
    turned: set[int] = field(default_factory=set)
    reads: dict[int, set[frozenset[int]]] = field(default_factory=lambda: defaultdict(set))
    """Parameter -> the gains of the vectors it is contracted with."""
    offsets: dict[int, float] = field(default_factory=dict)
    measured: dict[str, None] = field(default_factory=dict)
    writers: dict[str, None] = field(default_factory=dict)

    def carries(self, number: int) -> bool:
        """Whether a tensor carries the axis; raises where it does so in pieces."""
        axes = self.inference.dims.get(number, ())
        whole = sum(axis.root() is self.leaf for axis in axes)
        if whole > 1 or any(axis.root() is not self.leaf and self.leaf in axis.leaves() for axis in axes):
            raise NoBasisError("the axis is taken apart")
        return whole == 1

    def turn(self, state: _State) -> None:
        """A parameter is a vector, or holds some."""
        if state.offset:
            raise NoBasisError("a number is added to every entry of a vector")
        self.turned.add(state.number)

    def inside(self) -> str:
        """The first module that does not take a vector in where it measures one, or hand out what it writes."""
        calls, dims = self.inference.trace.calls, self.inference.dims
        for path in (*self.measured, *self.writers):
            numbers = [c.input if path in self.measured else c.output for c in calls.get(path, ())]
            last = [dims[number][-1:] if number in dims else [] for number in numbers if number is not None]
            if not last or any(not axes or axes[0].root() is not self.leaf for axes in last):
                return path or "the model"
        return ""


def basis_of(graph: Graph, group: NodeGroup) -> Basis:
    """How the axis of a group can be rotated.

    Raises:
        NoBasisError: when the model would notice.
    """
    inference = graph.inference
    if inference is None or not group.members:
        raise NoBasisError(f"{group.name} has no axis that was traced")
    walk = _Walk(inference, group.members[0].leaf.root())
    trace = inference.trace
    for number in trace.parameters:
        if walk.carries(number):
            walk.states[number] = _State("parameter", number=number)
    for node in trace.nodes:
        try:
            _step(walk, node)
        except NoBasisError as error:
            raise NoBasisError(f"{node.where}: {error}") from None
    if any(walk.carries(number) for number in trace.outputs):
        raise NoBasisError("the axis reaches the model's output")
    return _basis(walk, group)


def _basis(walk: _Walk, group: NodeGroup) -> Basis:
    names = walk.inference.trace.parameters
    dims = {number: walk.inference.dims[number] for number in names if number in walk.states}
    place = {
        n: Place(names[n], next(d for d, a in enumerate(axes) if a.root() is walk.leaf)) for n, axes in dims.items()
    }
    readers: dict[int, list[Place]] = {number: [] for uses in walk.reads.values() for gains in uses for number in gains}
    loose: set[int] = set()
    for number, uses in walk.reads.items():
        if len(uses) > 1 or (number in walk.turned and uses != {frozenset()}):
            loose |= set().union(*uses)
        for gain in next(iter(uses)):
            readers[gain].append(place[number])
    if clash := readers.keys() & (walk.turned | walk.reads.keys()):
        raise NoBasisError(f"{names[min(clash)]} is both multiplied and added")
    gains = (
        Gain(names[n], walk.offsets.get(n, 0.0), () if n in loose else tuple(found)) for n, found in readers.items()
    )
    turned = sorted(walk.turned | walk.reads.keys())
    return Basis(
        group, tuple(place[n] for n in turned), tuple(gains), tuple(walk.measured), tuple(walk.writers), walk.inside()
    )


def _step(walk: _Walk, node: Node) -> None:
    carriers = [number for number in node.inputs() if number in walk.states]
    outs = [number for number in node.outs if walk.carries(number)]
    if not carriers:
        if outs and node.name not in ("zeros", "zeros_like", "new_zeros"):
            raise NoBasisError("values that do not turn enter")
        state = _State("vector")
    else:
        state = _result(walk, node, carriers, bool(outs))
    walk.states.update(dict.fromkeys(outs, state))


def _result(walk: _Walk, node: Node, carriers: list[int], goes_on: bool) -> _State:
    """State of the outputs that carry the axis, if any does."""
    states, name = walk.states, node.name
    first = states[carriers[0]]
    if name in CONTRACTIONS:
        return _contracted(walk, node, carriers, goes_on)
    if name == "embedding" and first.kind == "parameter" and goes_on:
        walk.turn(first)
        walk.writers[node.module] = None
        return _State("vector")
    if name in CARRIES and len(carriers) == 1 and goes_on:
        return replace(first, scaled=first.scaled or (name == "neg" and first.kind == "parameter"))
    if name in ADDS and goes_on:
        return _added(walk, node, carriers)
    if name in ("mul", "div") and goes_on:
        return _multiplied(walk, node, carriers)
    if (name == "square" or (name == "pow" and node.args[1:] == (2,))) and first.kind == "vector":
        return _squared(first)
    if name in ("mean", "sum") and first.kind in ("square", "vector"):
        return _reduced(walk, node, first, goes_on)
    if name == "linalg_vector_norm" and first == _State("vector") and node.argument(1, "ord", 2) == 2 and not goes_on:
        return first
    raise NoBasisError("does not commute with a rotation")


def _squared(state: _State) -> _State:
    if state.gains:
        raise NoBasisError("the length is taken after a gain")
    return _State("square")


def _reduced(walk: _Walk, node: Node, state: _State, goes_on: bool) -> _State:
    if not goes_on and state.kind == "vector":
        raise NoBasisError("the entries of a vector are summed")
    if not goes_on:
        walk.measured[node.module] = None
    return state


def _added(walk: _Walk, node: Node, carriers: list[int]) -> _State:
    """Sums of vectors; a parameter alone and a number make a gain with an offset (`1 + weight`)."""
    found = [walk.states[number] for number in carriers]
    others = [a for a in node.args[:2] if isinstance(a, (int, float)) and not isinstance(a, bool)]
    if len(found) == 1 and found[0].kind == "parameter" and node.name == "add" and len(others) == 1:
        if found[0].scaled or found[0].offset:
            raise NoBasisError("a number is added to what is no plain parameter")
        return replace(found[0], offset=float(others[0]))
    tensors = [a for a in node.inputs() if walk.inference.trace.dtypes[a].is_floating_point]
    if len(tensors) != len(carriers) or any(others) or any(state.kind == "square" for state in found):
        raise NoBasisError("something that does not turn is added")
    vectors = {state for state in found if state.kind == "vector"}
    for state in found:
        if state.kind == "parameter":
            walk.turn(state)
            vectors.add(_State("vector"))
    if len(vectors) != 1:
        raise NoBasisError("vectors with different gains are added")
    return vectors.pop()


def _multiplied(walk: _Walk, node: Node, carriers: list[int]) -> _State:
    found = [walk.states[number] for number in carriers]
    if len(found) == 1:
        numerator = node.args[0]
        if node.name == "div" and not (isinstance(numerator, Ref) and numerator.number == carriers[0]):
            raise NoBasisError("something is divided by a vector")
        return replace(found[0], scaled=found[0].kind == "parameter")
    if node.name == "mul" and len(found) == 2:
        if carriers[0] == carriers[1] and found[0].kind == "vector":
            return _squared(found[0])
        kinds = {state.kind: state for state in found}
        if kinds.keys() == {"vector", "parameter"}:
            gain = kinds["parameter"].number
            offset = kinds["parameter"].offset
            if walk.offsets.setdefault(gain, offset) != offset:
                raise NoBasisError("a gain is used in two ways")
            if len(walk.inference.shape(gain)) == 1 and gain not in kinds["vector"].gains:
                return _State("vector", kinds["vector"].gains | {gain})
    raise NoBasisError("vectors are multiplied entry by entry")


def _contracted(walk: _Walk, node: Node, carriers: list[int], goes_on: bool) -> _State:
    found = [walk.states[number] for number in carriers]
    if any(state.kind == "square" for state in found):
        raise NoBasisError("the squares of a vector are weighed")
    parameters = [state for state in found if state.kind == "parameter"]
    vectors = [state for state in found if state.kind == "vector"]
    if goes_on and not vectors:  # written by a parameter, and perhaps its bias
        for state in parameters:
            walk.turn(state)
        walk.writers[node.module] = None
        return _State("vector")
    if goes_on and len(found) == 1:  # vectors are mixed with each other
        return vectors[0]
    if not goes_on and len(found) == 2 and len(parameters) == 1 and not parameters[0].offset:
        walk.reads[parameters[0].number].add(vectors[0].gains)
        return vectors[0]
    if not goes_on and len(vectors) == 2 and not any(state.gains for state in vectors):
        return vectors[0]
    raise NoBasisError("does not commute with a rotation")
