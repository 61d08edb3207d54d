"""Follows zeros through the trace: which groups are removed exactly when their parameter slices are zero.

For every tensor the set of leaves along which it is zero at a removed index. A group is exact when every place that
sums or reduces its axis meets a zero there; whether it does is decided by what flows, not by the operator's name.
"""

from __future__ import annotations

from collections.abc import Iterable

from lorashear.graph.axes import Axis
from lorashear.graph.inference import Inference, Site
from lorashear.graph.trace import Node, Ref

KEEPS_ZERO = {
    "neg",
    "abs",
    "sqrt",
    "sin",
    "tanh",
    "silu",
    "gelu",
    "relu",
    "erf",
    "expm1",
    "log1p",
    "sign",
    "round",
    "floor",
    "leaky_relu",
    "elu",
    "hardswish",
    "mish",
    "_to_copy",
    "clone",
    "detach",
    "alias",
    "lift_fresh",
    "lift",
    "contiguous",
    "to",
    "dropout",
    "native_dropout",
    "view",
    "_unsafe_view",
    "reshape",
    "unsqueeze",
    "squeeze",
    "flatten",
    "unflatten",
    "_reshape_alias",
    "permute",
    "transpose",
    "t",
    "expand",
    "slice",
    "select",
    "split",
    "split_with_sizes",
    "unbind",
    "cumsum",
    "sum",
    "mean",
}
PRODUCTS = {"mul", "mm", "bmm", "mv", "dot"}
SUMS = {"add", "sub", "rsub", "where", "maximum", "minimum", "copy"}


def zero_leaves(inference: Inference) -> dict[int, set[Axis]]:
    """Tensor number -> leaves at whose removed indices the tensor is zero."""
    zero: dict[int, set[Axis]] = {}
    for number in inference.trace.parameters:
        zero[number] = _carried(inference, number)
    for node in inference.trace.nodes:
        flowing = _flow(node, zero, inference)
        for number in node.outs:
            zero[number] = flowing & _carried(inference, number) if flowing else set()
    return zero


def _carried(inference: Inference, number: int) -> set[Axis]:
    return {leaf for axis in inference.dims.get(number, ()) for leaf in axis.leaves()}


def _flow(node: Node, zero: dict[int, set[Axis]], inference: Inference) -> set[Axis]:
    name = node.name
    inputs = node.inputs()
    if name in KEEPS_ZERO:
        return zero.get(inputs[0], set())
    if name == "embedding":  # a table whose columns are zero gives rows whose entries are
        return zero.get(inputs[0], set())
    if name in PRODUCTS:
        return set().union(*(zero.get(number, set()) for number in inputs))
    if name == "div":
        return zero.get(inputs[0], set())
    if name == "pow":
        exponent = node.argument(1, "exponent")
        keeps = isinstance(exponent, (int, float)) and exponent > 0
        return zero.get(inputs[0], set()) if keeps else set()
    if name in SUMS:
        return _all_zero(node, zero)
    if name in ("addmm", "baddbmm", "addmv"):
        bias, left, right = (ref.number for ref in node.args[:3])
        return zero.get(bias, set()) & (zero.get(left, set()) | zero.get(right, set()))
    if name in ("cat", "stack"):
        parts = [zero.get(number, set()) for number in inputs]
        lost = set().union(*(_carried(inference, n) - zero.get(n, set()) for n in inputs))
        return set().union(*parts) - lost
    return set()


def _all_zero(node: Node, zero: dict[int, set[Axis]]) -> set[Axis]:
    """A sum is zero where every operand is; a number among them is not, unless it is 0 or a factor."""
    start = 1 if node.name == "where" else 0
    operands = [arg for arg in node.args[start:3] if not isinstance(arg, bool)]
    if not all(isinstance(arg, Ref) or arg == 0 for arg in operands):
        return set()
    sets = [zero.get(arg.number, set()) for arg in operands if isinstance(arg, Ref)]
    return set.intersection(*sets) if sets else set()


def inexact_reasons(inference: Inference, leaves: Iterable[Axis]) -> dict[Axis, tuple[str, str]]:
    """Leaf -> ("fold" or "inexact", operator and module): what keeps a zeroed structure from being a removed one.

    "fold": a mean over the axis, whose divisor changes with the cut; exact only after the norm is rescaled.
    """
    zero = zero_leaves(inference)
    wanted = {leaf.root() for leaf in leaves}
    found: dict[Axis, tuple[str, str]] = {}
    for site in inference.sites:
        for leaf in site.operands[0][1].leaves():
            if leaf not in wanted or found.get(leaf, ("", ""))[0] == "inexact":
                continue
            verdict = _judge(site, leaf, zero)
            if verdict:
                found[leaf] = (verdict, site.node.where)
    return found


def _judge(site: Site, leaf: Axis, zero: dict[int, set[Axis]]) -> str:
    meets_zero = any(leaf in zero.get(number, set()) for number, _ in site.operands)
    if meets_zero and site.kind in ("contract", "sum", "linalg_vector_norm"):
        return ""
    return "fold" if meets_zero and site.kind == "mean" else "inexact"
