"""Infers the axes of every recorded tensor: walks the trace once and lets each operator's rule state its equations."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from lorashear.graph.axes import Axis, unify
from lorashear.graph.trace import Node, Ref, Trace


@dataclass(frozen=True)
class Site:
    """A place where an axis is summed or reduced away; whether that is exact is judged once the axes are known."""

    kind: str
    """"contract", "sum", "mean", or the operator's name where nothing but equality of all entries would help."""
    node: Node
    operands: tuple[tuple[int, Axis], ...]
    """(tensor number, reduced axis) of each operand."""


@dataclass
class Inference:
    """Axes of all tensors of a trace, filled by the rules."""

    trace: Trace
    dims: dict[int, list[Axis]] = field(default_factory=dict)
    sites: list[Site] = field(default_factory=list)
    origin: dict[int, str] = field(default_factory=dict)
    """Tensor number -> parameter of which it is a view or a cast."""

    def shape(self, number: int) -> tuple[int, ...]:
        """Sizes of a tensor."""
        return self.trace.shapes[number]

    def axes(self, ref: Ref) -> list[Axis]:
        """Axes of a tensor; fresh ones where nothing produced it (parameters, inputs, constants)."""
        found = self.dims.get(ref.number)
        if found is None:
            found = [Axis(size) for size in self.shape(ref.number)]
            self.dims[ref.number] = found
        return found

    def assign(self, number: int, axes: Sequence[Axis], where: str) -> None:
        """States the axes of an output; an in-place operator's output has some already, which are then equal."""
        before = self.dims.get(number)
        if before is None:
            self.dims[number] = list(axes)
            return
        for old, new in zip(before, axes, strict=True):
            unify(old, new, where)

    def site(self, kind: str, node: Node, *operands: tuple[Ref, Axis]) -> None:
        """Notes that an operator sums or reduces these axes away."""
        self.sites.append(Site(kind, node, tuple((ref.number, axis) for ref, axis in operands)))


Rule = Callable[[Inference, Node], None]


def infer(trace: Trace) -> Inference:
    """Axes of every tensor of the trace, with what reaches the outside pinned.

    An operator without a rule pins every axis it touches, with its own name as the reason; it never raises.
    """
    from lorashear.graph.rules import RULES, pin_unknown  # the rules need the classes above

    inference = Inference(trace)
    for number, name in trace.parameters.items():
        inference.axes(Ref(number))
        inference.origin[number] = name
    for number, name in trace.inputs.items():
        for axis in inference.axes(Ref(number)):
            axis.tag("pin", f"an axis of the input {name}")
            axis.tag("outside", name)
    for node in trace.nodes:
        RULES.get(node.name, pin_unknown)(inference, node)
    for number in trace.outputs:
        for axis in inference.axes(Ref(number)):
            axis.tag("pin", "reaches the model's output")
    return inference
