"""Operators that split, merge, reorder or repeat dimensions."""

from __future__ import annotations

from math import prod

from lorashear.graph.axes import Axis, product, unify
from lorashear.graph.inference import Inference, Rule
from lorashear.graph.trace import Node

VIEWS = ["view", "_unsafe_view", "reshape", "unsqueeze", "squeeze", "flatten", "unflatten", "_reshape_alias"]


def view(inference: Inference, node: Node) -> None:
    """Groups of dimensions with equal running products are the same index space, split or merged."""
    ref = node.args[0]
    before = [axis for axis in inference.axes(ref) if axis.size != 1]
    shape = inference.shape(node.outs[0])
    fresh = [Axis(size) for size in shape]
    after = [axis for axis in fresh if axis.size != 1]
    if prod(shape) != 0:
        _match_groups(before, after, node.where)
    inference.assign(node.outs[0], fresh, node.where)
    inference.same_parameter(ref.number, node.outs[0])


def _match_groups(before: list[Axis], after: list[Axis], where: str) -> None:
    left, right = list(before), list(after)
    while left and right:
        ins, outs = [left.pop(0)], [right.pop(0)]
        while (p := prod(a.size for a in ins)) != (q := prod(a.size for a in outs)):
            if p < q:
                ins.append(left.pop(0))
            else:
                outs.append(right.pop(0))
        unify(product(ins), product(outs), where)


def permute(inference: Inference, node: Node) -> None:
    """Dimensions change places."""
    ref = node.args[0]
    axes = inference.axes(ref)
    order = list(range(len(axes)))
    if node.name == "permute":
        order = [dim % len(axes) for dim in node.args[1]]
    elif node.name == "transpose":
        i, j = (dim % len(axes) for dim in node.args[1:3])
        order[i], order[j] = order[j], order[i]
    else:
        order.reverse()
    inference.assign(node.outs[0], [axes[dim] for dim in order], node.where)
    inference.same_parameter(ref.number, node.outs[0])


def expand(inference: Inference, node: Node) -> None:
    """A dimension that grows from 1 is a new atom: the repeat of grouped-query attention."""
    axes = inference.axes(node.args[0])
    shape = inference.shape(node.outs[0])
    out: list[Axis] = []
    for back in range(len(shape), 0, -1):
        known = axes[-back] if back <= len(axes) else None
        out.append(known if known is not None and known.size == shape[-back] else _repeats(shape[-back], node))
    inference.assign(node.outs[0], out, node.where)


def repeat(inference: Inference, node: Node) -> None:
    """Copies of a dimension side by side: the copies are the outer index."""
    axes = inference.axes(node.args[0])
    times = node.args[1]
    new = [_repeats(count, node) for count in times[: len(times) - len(axes)]]
    old = [
        product([_repeats(count, node), axis]) if count > 1 else axis
        for count, axis in zip(times[len(new) :], axes, strict=True)
    ]
    inference.assign(node.outs[0], [*new, *old], node.where)


def _repeats(size: int, node: Node) -> Axis:
    axis = Axis(size)
    axis.tag("repeat", node.where)
    return axis


def complex_parts(inference: Inference, node: Node) -> None:
    """`view_as_complex` takes the last dimension, of size 2, as one number; `view_as_real` gives it back."""
    axes = inference.axes(node.args[0])
    if node.name == "view_as_complex":
        axes[-1].tag("pin", f"real and imaginary part of {node.where}")
        inference.assign(node.outs[0], axes[:-1], node.where)
    else:
        pair = Axis(2)
        pair.tag("pin", f"real and imaginary part of {node.where}")
        inference.assign(node.outs[0], [*axes, pair], node.where)


RULES: dict[str, Rule] = {
    **dict.fromkeys(VIEWS, view),
    **dict.fromkeys(["permute", "transpose", "t", "numpy_T"], permute),
    **dict.fromkeys(["expand"], expand),
    "repeat": repeat,
    **dict.fromkeys(["view_as_complex", "view_as_real"], complex_parts),
}
