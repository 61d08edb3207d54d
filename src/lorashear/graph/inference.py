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
    choices: set[int] = field(default_factory=set)
    """Tensors at which an expert is kept out of the router's choice (`flow.py`)."""
    points_to: dict[int, Axis] = field(default_factory=dict)
    """Integer tensor -> the axis along which its values are positions."""

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

    def outside(self, axis: Axis) -> bool:
        """Whether an axis is one of the inputs': the batch or the sequence."""
        return any("outside" in leaf.tags for leaf in axis.leaves())

    def same_parameter(self, source: int, target: int) -> None:
        """Notes that a tensor is a view or a cast of another, and so of the same parameter."""
        if source in self.origin:
            self.origin[target] = self.origin[source]

    def site(self, kind: str, node: Node, *operands: tuple[Ref, Axis]) -> None:
        """Notes that an operator sums or reduces these axes away."""
        self.sites.append(Site(kind, node, tuple((ref.number, axis) for ref, axis in operands)))


Rule = Callable[[Inference, Node], None]

KEEPS_POINTERS = frozenset(
    """
    view _unsafe_view reshape unsqueeze squeeze flatten _reshape_alias permute transpose t expand slice select
    split split_with_sizes unbind _to_copy clone detach alias lift_fresh contiguous to clamp clamp_min
    clamp_max masked_fill where repeat cat index gather index_select
""".split()
)
"""Operators that move or keep index values: what these point to stays."""


READS_POINTERS = frozenset(
    "embedding scatter scatter_add index_add index_copy index_fill index_put _index_put_impl topk copy sum all any".split()
)
"""Operators that use index values as positions, or only ask whether there are any."""


def _pin_counted(inference: Inference, node: Node) -> None:
    """Index values that are reckoned with as numbers: the positions along the axis mean something."""
    for number in node.inputs():
        target = inference.points_to.get(number)
        if target is not None:
            target.tag("pin", f"its positions are reckoned with in {node.where}")


def _pass_pointer(inference: Inference, node: Node) -> None:
    target = next((inference.points_to[n] for n in node.inputs() if n in inference.points_to), None)
    reads = node.name in ("index", "gather", "index_select")
    if target is None or (reads and node.inputs()[0] not in inference.points_to):
        return
    for out in node.outs:
        if not inference.trace.dtypes[out].is_floating_point:
            inference.points_to.setdefault(out, target)
        else:  # a cast to numbers
            target.tag("pin", f"its positions are reckoned with in {node.where}")


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
        rule = RULES.get(node.name, pin_unknown)
        try:
            rule(inference, node)
        except (
            ValueError,
            IndexError,
            TypeError,
            AttributeError,
        ):  # a call of the operator that its rule does not know
            pin_unknown(inference, node)
        if node.name in KEEPS_POINTERS:
            _pass_pointer(inference, node)
        elif node.name not in READS_POINTERS:
            _pin_counted(inference, node)
    for number in trace.outputs:
        for axis in inference.axes(Ref(number)):
            axis.tag("pin", "reaches the model's output")
    return inference
