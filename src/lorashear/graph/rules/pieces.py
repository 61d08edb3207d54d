"""Operators that take a dimension apart or put one together."""

from __future__ import annotations

from collections.abc import Sequence

from lorashear.graph.axes import Axis, product, total, unify
from lorashear.graph.inference import Inference, Rule
from lorashear.graph.trace import Node, Ref


def piece(axis: Axis, before: int, size: int, where: str) -> Axis:
    """`size` indices of an axis after the first `before`. A piece of a pinned axis is a pinned atom of its own."""
    if axis.size == size:
        return axis
    part = Axis(size)
    if axis.pinned:
        part.tag("pin", axis.leaves()[0].tags["pin"])
        return part
    unify(axis, total([Axis(before), part, Axis(axis.size - before - size)]), where)
    return part


def slice_(inference: Inference, node: Node) -> None:
    """Some consecutive indices of an axis, or every n-th."""
    axes = list(inference.axes(node.args[0]))
    dim = node.argument(1, "dim", 0) % len(axes)
    start, step = node.argument(2, "start") or 0, node.argument(4, "step", 1)
    size = inference.shape(node.outs[0])[dim]
    if step == 1:
        if start < 0:
            start += axes[dim].size
        axes[dim] = piece(axes[dim], min(max(start, 0), axes[dim].size), size, node.where)
    elif axes[dim].size % step == 0 and size * step == axes[dim].size:
        rows, phase = Axis(size), Axis(step)
        unify(axes[dim], product([rows, phase]), node.where)
        phase.tag("pin", f"its positions are told apart by {node.where}")
        axes[dim] = rows
    else:
        axes[dim].tag("pin", f"a step of {step} in {node.where}")
        axes[dim] = pinned(size, f"a step of {step} in {node.where}")
    inference.assign(node.outs[0], axes, node.where)


def pinned(size: int, why: str) -> Axis:
    """A new axis that stays as it is."""
    axis = Axis(size)
    axis.tag("pin", why)
    return axis


def select(inference: Inference, node: Node) -> None:
    """One index of an axis; the others carry on."""
    axes = list(inference.axes(node.args[0]))
    dim, index = node.args[1] % len(axes), node.args[2]
    axis = axes.pop(dim)
    piece(axis, index % axis.size if axis.size else 0, min(axis.size, 1), node.where)
    inference.assign(node.outs[0], axes, node.where)


def split(inference: Inference, node: Node) -> None:
    """`split`, `split_with_sizes`, `chunk`: consecutive pieces; `unbind` drops the dimension besides."""
    axes = inference.axes(node.args[0])
    dim = node.argument(1 if node.name == "unbind" else 2, "dim", 0) % len(axes)
    axis = axes[dim]
    sizes = [1] * len(node.outs) if node.name == "unbind" else [inference.shape(out)[dim] for out in node.outs]
    if axis.pinned or len(sizes) == 1:
        pieces = [piece(axis, 0, size, node.where) for size in sizes]
    else:
        pieces = [Axis(size) for size in sizes]
        unify(axis, total(pieces), node.where)
    for out, part in zip(node.outs, pieces, strict=True):
        middle = [] if node.name == "unbind" else [part]
        inference.assign(out, [*axes[:dim], *middle, *axes[dim + 1 :]], node.where)


def cat(inference: Inference, node: Node) -> None:
    """The joined dimension is the sum of the parts'; the others are equal."""
    parts = [inference.axes(ref) for ref in refs(node.args[0])]
    parts = [axes for axes in parts if not (len(axes) == 1 and axes[0].size == 0)]  # legacy empty operand
    if not parts:
        inference.assign(node.outs[0], [Axis(size) for size in inference.shape(node.outs[0])], node.where)
        return
    dim = node.argument(1, "dim", 0) % len(parts[0])
    for axes in parts[1:]:
        for at, axis in enumerate(axes):
            if at != dim:
                unify(parts[0][at], axis, node.where)
    joined = total([axes[dim] for axes in parts])
    outside = next((axes[dim] for axes in parts if axes[dim].pinned), None)
    if outside is not None:
        joined.tag("pin", outside.leaves()[0].tags["pin"])
    inference.assign(node.outs[0], [*parts[0][:dim], joined, *parts[0][dim + 1 :]], node.where)


def stack(inference: Inference, node: Node) -> None:
    """Operands side by side in a new dimension, in which they are told apart."""
    parts = [inference.axes(ref) for ref in refs(node.args[0])]
    dim = node.argument(1, "dim", 0) % (len(parts[0]) + 1)
    for axes in parts[1:]:
        for first, axis in zip(parts[0], axes, strict=True):
            unify(first, axis, node.where)
    new = pinned(len(parts), f"operands are told apart by {node.where}")
    inference.assign(node.outs[0], [*parts[0][:dim], new, *parts[0][dim:]], node.where)


def pad(inference: Inference, node: Node) -> None:
    """New indices before and after; a negative width takes some away."""
    axes = list(inference.axes(node.args[0]))
    widths = node.args[1]
    for at in range(len(widths) // 2):
        left, right = widths[2 * at : 2 * at + 2]
        axis = axes[-1 - at]
        inner = piece(axis, max(-left, 0), axis.size + min(left, 0) + min(right, 0), node.where)
        if max(left, 0) + max(right, 0) == 0:
            axes[-1 - at] = inner
        elif inner.pinned:
            axes[-1 - at] = pinned(inner.size + max(left, 0) + max(right, 0), inner.leaves()[0].tags["pin"])
        else:
            why = f"padding of {node.where}"
            axes[-1 - at] = total([pinned(max(left, 0), why), inner, pinned(max(right, 0), why)])
    inference.assign(node.outs[0], axes, node.where)


def order(inference: Inference, node: Node) -> None:
    """`flip`, `roll`, `unfold`, `tril`, `triu`: the positions of these dimensions mean something."""
    axes = list(inference.axes(node.args[0]))
    named = {"flip": node.args[1:2], "unfold": node.args[1:2], "roll": node.args[2:3]}.get(node.name, ([-1, -2],))
    dims = named[0] if named else list(range(len(axes)))
    for dim in dims if isinstance(dims, (list, tuple)) else [dims]:
        axes[dim].tag("pin", f"positions along it are told apart by {node.where}")
    shape = inference.shape(node.outs[0])
    out = [
        axes[at] if at < len(axes) and axes[at].size == size else pinned(size, f"positions of {node.where}")
        for at, size in enumerate(shape)
    ]
    inference.assign(node.outs[0], out, node.where)


def refs(values: Sequence[object]) -> list[Ref]:
    """The tensors among these arguments."""
    return [value for value in values if isinstance(value, Ref)]


RULES: dict[str, Rule] = {
    "slice": slice_,
    "select": select,
    **dict.fromkeys(["split", "split_with_sizes", "unbind"], split),
    "cat": cat,
    "stack": stack,
    "constant_pad_nd": pad,
    **dict.fromkeys(["flip", "roll", "unfold", "tril", "triu"], order),
}
