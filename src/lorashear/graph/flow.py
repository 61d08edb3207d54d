"""Follows zeros through the trace: which groups are removed exactly when their structures are zeroed.

For every tensor the set of leaves along which it is zero at a removed index. A group is exact when every place that
sums or reduces its axis meets a zero there; whether it does is decided by what flows, not by the operator's name.

Experts are not zeroed but kept out of the router's choice: at a removed index its logits are -inf ("barred" below), and
so is whatever it chooses by. Softmax makes zeros of them, and an expert that is never chosen is never read.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from lorashear.graph.axes import Axis
from lorashear.graph.inference import Inference, Site
from lorashear.graph.trace import Node, Ref

VIEWS = frozenset(
    """
    view _unsafe_view reshape unsqueeze squeeze flatten unflatten _reshape_alias permute transpose t expand
    slice select split split_with_sizes unbind alias detach view_as_real view_as_complex unfold
""".split()
)
KEEPS_ZERO = VIEWS | frozenset(
    """
    neg abs sqrt sin tanh silu gelu relu erf erfinv expm1 log1p sign round floor ceil trunc leaky_relu elu
    celu selu hardswish mish relu6 square sinh frac _to_copy clone lift_fresh lift contiguous to dropout
    native_dropout cumsum sum mean repeat flip roll tril triu index_select index gather
    nan_to_num type_as conj _conj real imag zeros_like constant_pad_nd topk sort
""".split()
)
PRODUCTS = frozenset(["mul", "mm", "bmm", "mv", "dot"])
SUMS = frozenset(["add", "sub", "rsub", "where", "maximum", "minimum", "copy", "lerp"])
ALL_ZERO = frozenset(["zeros", "new_zeros", "zeros_like", "zero"])
WILD_AT_ZERO = frozenset(["log", "log2", "log10", "reciprocal", "rsqrt", "logit"])
DIVIDES = frozenset(["div", "fmod", "remainder"])
"""Operators that are infinite, or no number, where their last operand is zero."""
CHOICES = frozenset(["topk", "argmax", "max"])
BARRED_TO_ZERO = frozenset(["_softmax", "sigmoid", "exp", "softplus", "relu"])
KEEPS_BARRED = VIEWS | frozenset(["_to_copy", "clone", "lift_fresh", "add", "_log_softmax", "log_sigmoid_forward"])
FILLS = {"full": 1, "full_like": 1, "fill": 1, "new_full": 2}
"""Operators that give every entry one value -> position of the value."""
WRITES = frozenset(["scatter", "scatter_add", "index_add"])
"""Operators that write where an index points to; it points to no removed expert."""


@dataclass
class Flow:
    """What is known of every tensor at removed indices."""

    dims: Mapping[int, Sequence[Axis]]
    """Tensor number -> its dimensions."""
    zero: dict[int, set[Axis]] = field(default_factory=dict)
    """Tensor number -> leaves at whose removed indices it is zero."""
    barred: dict[int, set[Axis]] = field(default_factory=dict)
    """Tensor number -> leaves at whose removed indices it is -inf."""
    wild: dict[int, set[Axis]] = field(default_factory=dict)
    """Tensor number -> leaves at whose removed indices it may be infinite or no number: what vanishes there times this
    is no zero."""
    choices: set[int] = field(default_factory=set)
    """Tensors that have to be -inf at a removed expert: the router's logits, and what it chooses by."""
    owners: dict[int, int] = field(default_factory=dict)
    """View -> the tensor that it is a view of."""

    def carried(self, number: int) -> set[Axis]:
        """The leaves along a tensor."""
        return {leaf for axis in self.dims.get(number, ()) for leaf in axis.leaves()}

    def along(self, number: int, dim: int) -> set[Axis]:
        """The leaves along one dimension of it."""
        axes = self.dims[number]
        return set(axes[dim % len(axes)].leaves()) if axes else set()

    def family(self, number: int) -> list[int]:
        """What shares memory with a tensor: what it is a view of, and every view of that."""
        owner = self.owners.get(number, number)
        return [owner, *(view for view, base in self.owners.items() if base == owner)]


def follow(inference: Inference) -> Flow:
    """Walks the trace once with every structure removed."""
    flow = Flow(inference.dims)
    experts = _experts(inference)
    for number in inference.trace.parameters:
        flow.zero[number] = flow.carried(number) - experts
    for node in inference.trace.nodes:
        inputs = node.inputs()
        _bar(node, inputs, flow, inference, experts)
        barred = _barred_out(node, inputs, flow)  # an operator in place changes what is known of its input
        advance(node, flow)
        for number in node.outs:
            flow.barred[number] = (barred | (experts if number in flow.choices else set())) & flow.carried(number)
        if node.op._schema.is_mutable:
            _written(node.outs[0], flow, flow.barred)
    return flow


def advance(node: Node, flow: Flow) -> None:
    """Says of a node's results, and of what they are written into, where they are zero or wild."""
    inputs = node.inputs()
    zero = _zero_out(node, inputs, flow)
    wild = _wild_out(node, inputs, flow)
    if node.outs and zero:
        zero = zero - _twice(flow, node.outs[0]) - wild
    for number in node.outs:
        carried = flow.carried(number)
        if wild:
            flow.wild[number] = wild & carried
        flow.zero[number] = zero & carried
        if node.name in VIEWS and inputs:
            flow.owners[number] = flow.owners.get(inputs[0], inputs[0])
    if node.op._schema.is_mutable:
        _written(node.outs[0], flow, flow.zero)


def _wild_out(node: Node, inputs: tuple[int, ...], flow: Flow) -> set[Axis]:
    if node.name in ("eq", "ne", "lt", "le", "gt", "ge"):
        return set()
    wild: set[Axis] = set().union(*(flow.wild.get(number, set()) for number in inputs))
    exponent = node.argument(1, "exponent") if node.name == "pow" else 1
    divides = node.name in DIVIDES and isinstance(node.args[1], Ref)
    if node.name in WILD_AT_ZERO or divides or not (isinstance(exponent, (int, float)) and exponent >= 0):
        wild |= flow.zero.get(inputs[-1], set())
    return wild


def _written(number: int, flow: Flow, known: dict[int, set[Axis]]) -> None:
    """Writing into a view changes what it is a view of, and every other view of that."""
    lost = flow.carried(number) - known[number]
    for other in flow.family(number) if lost else ():
        known[other] = known.get(other, set()) - lost


def _twice(flow: Flow, number: int) -> set[Axis]:
    """Leaves along two dimensions of a tensor: a zero in one of them says nothing of the other."""
    seen: set[Axis] = set()
    twice: set[Axis] = set()
    for axis in flow.dims.get(number, ()):
        leaves = set(axis.leaves())
        twice |= seen & leaves
        seen |= leaves
    return twice


def _experts(inference: Inference) -> set[Axis]:
    dims = [axis for number in inference.trace.parameters for axis in inference.dims.get(number, ())]
    owned = {leaf for axis in dims for leaf in axis.leaves()}
    return {leaf for leaf in owned if "chosen" in leaf.tags and "pin" not in leaf.tags}


def _bar(node: Node, inputs: tuple[int, ...], flow: Flow, inference: Inference, experts: set[Axis]) -> None:
    """Finds the tensors that keep removed experts from being chosen."""
    if not experts:
        return
    if node.name in CHOICES and flow.carried(inputs[0]) & experts:
        flow.choices.add(inputs[0])
        flow.barred[inputs[0]] = flow.barred.get(inputs[0], set()) | (flow.carried(inputs[0]) & experts)
    if node.name in ("mm", "addmm"):
        origins = [number for number in inputs if number in inference.origin]
        if any(flow.carried(number) & experts for number in origins):
            flow.choices |= {out for out in node.outs if flow.carried(out) & experts}


def _zero_out(node: Node, inputs: tuple[int, ...], flow: Flow) -> set[Axis]:
    zero, name = flow.zero, node.name
    if name in ALL_ZERO:
        return flow.carried(node.outs[0])
    if name in BARRED_TO_ZERO and inputs[0] in flow.barred:
        return flow.barred[inputs[0]] | (zero.get(inputs[0], set()) if name == "relu" else set())
    if name in KEEPS_ZERO or name == "embedding":  # a table whose columns are zero gives rows whose entries are
        return zero.get(inputs[0], set())
    if name in PRODUCTS:
        return _product(flow, *inputs)
    if name == "div" or (name == "pow" and _positive(node.argument(1, "exponent"))):
        return zero.get(inputs[0], set())
    if name == "linalg_vector_norm":
        order = node.argument(1, "ord", 2)
        return zero.get(inputs[0], set()) if isinstance(order, (int, float)) and 0 < order < float("inf") else set()
    if name in ("clamp", "hardtanh"):
        return zero.get(inputs[0], set()) if _around_zero(node.argument(1, "min"), node.argument(2, "max")) else set()
    if name in SUMS:
        return _all_zero(node, zero)
    if name == "masked_fill":
        before, filled = zero.get(inputs[0], set()), node.args[2]
        return before if filled == 0 else before & zero.get(getattr(filled, "number", -1), set())
    if name in WRITES:
        return _kept(node, zero, flow)
    if name in ("addmm", "baddbmm", "addmv", "addcmul"):
        return zero.get(inputs[0], set()) & _product(flow, *inputs[1:3])
    if name == "convolution":
        product = _product(flow, *inputs[:2])
        return product & zero.get(inputs[2], set()) if len(inputs) > 2 else product
    if name == "native_layer_norm":
        affine = [node.argument(2, "weight"), node.argument(3, "bias")]
        parts = [zero.get(part.number, set()) for part in affine if isinstance(part, Ref)]
        return set.intersection(*parts) if affine[0] is not None else set()
    if name == "linalg_solve_triangular":
        return zero.get(inputs[1], set())
    if name in ("cat", "stack"):
        parts = [zero.get(number, set()) for number in inputs]
        lost = set().union(*(flow.carried(n) - zero.get(n, set()) for n in inputs))
        return set().union(*parts) - lost
    return set()


def _product(flow: Flow, *numbers: int) -> set[Axis]:
    """A product is zero where any factor is, and no other is -inf there."""
    return set().union(*(flow.zero.get(n, set()) for n in numbers)) - set().union(
        *(flow.barred.get(n, set()) for n in numbers)
    )


def _barred_out(node: Node, inputs: tuple[int, ...], flow: Flow) -> set[Axis]:
    barred, name = flow.barred, node.name
    if name in FILLS:
        value = node.argument(FILLS[name], "fill_value")
        return flow.carried(node.outs[0]) if value == float("-inf") else set()
    if name in WRITES:
        return _kept(node, barred, flow)
    if name == "sub" and isinstance(node.args[0], Ref):
        return barred.get(inputs[0], set()) - set().union(*(barred.get(number, set()) for number in inputs[1:]))
    if name not in KEEPS_BARRED and not _positive_factor(node):
        return set()
    return set().union(*(barred.get(number, set()) for number in inputs))


def _positive_factor(node: Node) -> bool:
    return node.name in ("mul", "div") and _positive(node.args[1])


def _positive(value: object) -> bool:
    return isinstance(value, (int, float)) and value > 0


def _around_zero(low: object, high: object) -> bool:
    if isinstance(low, Ref) or isinstance(high, Ref):  # bounds that are only known when it runs
        return False
    return (not isinstance(low, (int, float)) or low <= 0) and (not isinstance(high, (int, float)) or high >= 0)


def _all_zero(node: Node, zero: dict[int, set[Axis]]) -> set[Axis]:
    """A sum is zero where every operand is; a number among them is not, unless it is 0 or a factor."""
    if node.name == "copy":
        return zero.get(node.args[1].number, set()) if isinstance(node.args[1], Ref) else set()
    start = 1 if node.name == "where" else 0
    operands = [arg for arg in node.args[start : start + 2] if not isinstance(arg, bool)]
    if not all(isinstance(arg, Ref) or arg == 0 for arg in operands):
        return set()
    sets = [zero.get(arg.number, set()) for arg in operands if isinstance(arg, Ref)]
    return set.intersection(*sets) if sets else set()


def _kept(node: Node, known: dict[int, set[Axis]], flow: Flow) -> set[Axis]:
    """What is known of entries that an index writes to stays true where it is true of what is written, or where the
    index never points."""
    along = flow.along(node.args[0].number, node.args[1])
    source = node.args[3] if len(node.args) > 3 else None
    elsewhere = known.get(source.number, set()) if isinstance(source, Ref) else set()
    return known.get(node.args[0].number, set()) & (along | elsewhere)


def inexact_reasons(inference: Inference, flow: Flow, leaves: Iterable[Axis]) -> dict[Axis, tuple[str, str]]:
    """Leaf -> ("fold" or "inexact", operator and module): what keeps a zeroed structure from being a removed one.

    "fold": a mean over the axis, whose divisor changes with the cut; exact once weights are rescaled (`scales.py`).
    """
    wanted = {leaf.root() for leaf in leaves}
    found: dict[Axis, tuple[str, str]] = {}
    for site in inference.sites:
        for leaf in site.operands[0][1].leaves():
            if leaf not in wanted or found.get(leaf, ("", ""))[0] == "inexact":
                continue
            verdict = _judge(site, leaf, flow)
            if verdict:
                found[leaf] = (verdict, site.node.where)
    return found


def _judge(site: Site, leaf: Axis, flow: Flow) -> str:
    numbers = [number for number, _ in site.operands]
    if any(leaf in flow.barred.get(number, set()) for number in numbers):
        return "" if site.kind in CHOICES | {"_softmax", "_log_softmax", "logsumexp", "amax"} else "inexact"
    if any(leaf in flow.wild.get(number, set()) for number in numbers):
        return "inexact"
    meets_zero = any(leaf in flow.zero.get(number, set()) for number in numbers)
    if meets_zero and site.kind in ("contract", "sum", "nansum", "any"):
        return ""
    return "fold" if meets_zero and site.kind == "mean" else "inexact"
