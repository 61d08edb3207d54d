"""Operators that sum over an axis of two operands."""

from __future__ import annotations

from lorashear.graph.axes import Axis, product, unify
from lorashear.graph.inference import Inference, Rule
from lorashear.graph.trace import Node


def matmul(inference: Inference, node: Node) -> None:
    """`mm (n,k)(k,m)`, `bmm (b,n,k)(b,k,m)`, `mv (n,k)(k)`, `dot (k)(k)`, and the same with an added first operand."""
    with_bias = node.name in ("addmm", "baddbmm", "addmv")
    left, right = node.args[1:3] if with_bias else node.args[:2]
    a, b = inference.axes(left), inference.axes(right)
    inner = b[-2] if len(b) > 1 else b[-1]
    unify(a[-1], inner, node.where)
    inference.site("contract", node, (left, a[-1]), (right, inner))
    if len(a) == 3:
        unify(a[0], b[0], node.where)
    if inference.outside(a[-1]):  # a sum over the sequence mixes its positions, for every index of the others
        for axis in (*a[:-1], *b):
            axis.tag("mixed", node.where)
    out = [*a[:-1], *b[-1:]] if len(b) > 1 else a[:-1]
    inference.assign(node.outs[0], out, node.where)
    if with_bias:
        bias = inference.axes(node.args[0])
        for back in range(1, len(bias) + 1):
            unify(bias[-back], out[-back], node.where)


def solve_triangular(inference: Inference, node: Node) -> None:
    """`A (..., n, n) X = B (..., n, k)`: the equations are told apart, the right-hand sides are not."""
    a, b = inference.axes(node.args[0]), inference.axes(node.args[1])
    for axis in (a[-1], a[-2], b[-2]):
        axis.tag("pin", f"equations of {node.where}")
    for left, right in zip(a[:-2], b[:-2], strict=False):
        unify(left, right, node.where)
    inference.assign(node.outs[0], b, node.where)


def convolution(inference: Inference, node: Node) -> None:
    """Input `(batch, in, *space)`, weight `(out, in / groups, *taps)`: channels contract, within each of several groups;
    depthwise keeps them."""
    given, weight = inference.axes(node.args[0]), inference.axes(node.args[1])
    groups, transposed = node.args[8], node.args[6]
    channels = weight[0]
    for axis in (*given[2:], *weight[2:]):
        axis.tag("pin", f"positions of {node.where}")
    given[1].tag("mixed", node.where)
    if groups == 1:
        into = weight[0] if transposed else weight[1]
        channels = weight[1] if transposed else weight[0]
        unify(given[1], into, node.where)
        inference.site("contract", node, (node.args[0], given[1]), (node.args[1], into))
    elif groups == weight[0].size == given[1].size and weight[1].size == 1:
        unify(given[1], weight[0], node.where)
    elif not transposed:
        group, into, out = Axis(groups), Axis(weight[1].size), Axis(weight[0].size // groups)
        unify(given[1], product([group, into]), node.where)
        unify(weight[0], product([group, out]), node.where)
        unify(weight[1], into, node.where)
        inference.site("contract", node, (node.args[0], into), (node.args[1], into))
    else:
        for axis in (given[1], *weight[:2]):
            axis.tag("pin", f"grouped channels of {node.where}")
    if node.args[2] is not None:
        unify(inference.axes(node.args[2])[0], channels, node.where)
    space = [Axis(size) for size in inference.shape(node.outs[0])[2:]]
    for axis, source in zip(space, given[2:], strict=True):
        axis.tag("pin", f"positions of {node.where}")
        if inference.outside(source):
            axis.tag("outside", node.where)
    inference.assign(node.outs[0], [given[0], channels, *space], node.where)


RULES: dict[str, Rule] = {
    **dict.fromkeys(["mm", "bmm", "addmm", "baddbmm", "mv", "addmv", "dot"], matmul),
    "linalg_solve_triangular": solve_triangular,
    "convolution": convolution,
}
