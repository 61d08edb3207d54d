"""The equations that each ATen operator states about its operands' axes, one function a family of operators."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

from lorashear.graph.axes import Axis, product, total, unify
from lorashear.graph.inference import Inference, Rule
from lorashear.graph.trace import Node, Ref

ELEMENTWISE = [
    "add",
    "sub",
    "rsub",
    "mul",
    "div",
    "pow",
    "neg",
    "abs",
    "exp",
    "expm1",
    "log",
    "log1p",
    "sqrt",
    "rsqrt",
    "reciprocal",
    "sin",
    "cos",
    "tanh",
    "sigmoid",
    "silu",
    "gelu",
    "relu",
    "softplus",
    "log_sigmoid_forward",
    "erf",
    "erfinv",
    "clamp",
    "clamp_min",
    "clamp_max",
    "minimum",
    "maximum",
    "where",
    "masked_fill",
    "eq",
    "ne",
    "lt",
    "le",
    "gt",
    "ge",
    "bitwise_and",
    "bitwise_or",
    "bitwise_not",
    "logical_and",
    "logical_or",
    "logical_not",
    "floor",
    "floor_divide",
    "remainder",
    "round",
    "sign",
    "leaky_relu",
    "elu",
    "hardtanh",
    "hardswish",
    "mish",
    "threshold",
    "isnan",
    "isinf",
    "addcmul",
    "addcdiv",
    "copy",
    "_to_copy",
    "clone",
    "detach",
    "alias",
    "lift_fresh",
    "lift",
    "contiguous",
    "to",
    "native_dropout",
    "dropout",
    "polar",
]
VIEWS = ["view", "_unsafe_view", "reshape", "unsqueeze", "squeeze", "flatten", "unflatten", "_reshape_alias"]
FACTORIES = [
    "zeros",
    "ones",
    "full",
    "empty",
    "scalar_tensor",
    "new_zeros",
    "new_ones",
    "new_full",
    "new_empty",
    "zeros_like",
    "ones_like",
    "full_like",
    "empty_like",
]
INDEX_VALUES = ["arange", "linspace", "eye"]
"""Factories whose values depend on the index: what is computed from them cannot be cut along that axis."""


def _outs(node: Node) -> int:
    return node.outs[0]


def _refs(values: Sequence[Any]) -> list[Ref]:
    return [value for value in values if isinstance(value, Ref)]


def elementwise(inference: Inference, node: Node) -> None:
    """Operands align from the right; equal sizes are equal axes, size 1 broadcasts."""
    refs = [Ref(number) for number in node.inputs()]
    for out in node.outs:
        shape = inference.shape(out)
        axes: list[Axis | None] = [None] * len(shape)
        for ref in refs:
            operand = inference.axes(ref)
            for back in range(1, min(len(operand), len(shape)) + 1):
                axis = operand[-back]
                if axis.size != shape[-back]:
                    continue
                known = axes[-back]
                if known is None:
                    axes[-back] = axis
                else:
                    unify(known, axis, node.where)
        inference.assign(out, [axis or Axis(size) for axis, size in zip(axes, shape, strict=True)], node.where)
    if (
        len(refs) == 1
        and refs[0].number in inference.origin
        and inference.shape(refs[0].number) == inference.shape(_outs(node))
    ):
        inference.origin[_outs(node)] = inference.origin[refs[0].number]


def contraction(inference: Inference, node: Node) -> None:
    """`mm (n,k)(k,m)`, `bmm (b,n,k)(b,k,m)`, and the same with an added first operand."""
    with_bias = node.name in ("addmm", "baddbmm", "addmv")
    left, right = node.args[1:3] if with_bias else node.args[:2]
    a, b = inference.axes(left), inference.axes(right)
    unify(a[-1], b[-2] if len(b) > 1 else b[-1], node.where)
    inference.site("contract", node, (left, a[-1]), (right, b[-2] if len(b) > 1 else b[-1]))
    if len(a) == 3:
        unify(a[0], b[0], node.where)
    out = [*a[:-1], *b[-1:]] if len(b) > 1 else a[:-1]
    inference.assign(_outs(node), out, node.where)
    if with_bias:
        bias = inference.axes(node.args[0])
        for back in range(1, len(bias) + 1):
            unify(bias[-back], out[-back], node.where)


def view(inference: Inference, node: Node) -> None:
    """Groups of dimensions with equal running products are the same index space, split or merged."""
    ref = node.args[0]
    before = [axis for axis in inference.axes(ref) if axis.size != 1]
    shape = inference.shape(_outs(node))
    fresh = [Axis(size) for size in shape]
    after = [axis for axis in fresh if axis.size != 1]
    if prod(shape) != 0:
        _match_groups(before, after, node.where)
    inference.assign(_outs(node), fresh, node.where)
    if ref.number in inference.origin:
        inference.origin[_outs(node)] = inference.origin[ref.number]


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
    inference.assign(_outs(node), [axes[dim] for dim in order], node.where)
    if ref.number in inference.origin:
        inference.origin[_outs(node)] = inference.origin[ref.number]


def expand(inference: Inference, node: Node) -> None:
    """A dimension that grows from 1 is a new atom: the repeat of grouped-query attention."""
    axes = inference.axes(node.args[0])
    shape = inference.shape(_outs(node))
    out: list[Axis] = []
    for back in range(len(shape), 0, -1):
        known = axes[-back] if back <= len(axes) else None
        if known is not None and known.size == shape[-back]:
            out.append(known)
        else:
            axis = Axis(shape[-back])
            axis.tag("repeat", node.where)
            out.append(axis)
    inference.assign(_outs(node), out, node.where)


def _piece(axis: Axis, before: int, size: int, where: str) -> Axis:
    """`size` indices of an axis after the first `before`. A piece of a pinned axis is a pinned atom of its own."""
    if axis.size == size:
        return axis
    piece = Axis(size)
    if axis.pinned:
        piece.tag("pin", axis.leaves()[0].tags["pin"])
        return piece
    unify(axis, total([Axis(before), piece, Axis(axis.size - before - size)]), where)
    return piece


def slice_(inference: Inference, node: Node) -> None:
    """Some consecutive indices of an axis, or every n-th."""
    axes = list(inference.axes(node.args[0]))
    dim = node.argument(1, "dim", 0) % len(axes)
    start, step = node.argument(2, "start") or 0, node.argument(4, "step", 1)
    size = inference.shape(_outs(node))[dim]
    if step == 1:
        if start < 0:
            start += axes[dim].size
        axes[dim] = _piece(axes[dim], min(start, axes[dim].size), size, node.where)
    elif axes[dim].size % step == 0 and size * step == axes[dim].size:
        rows, phase = Axis(size), Axis(step)
        unify(axes[dim], product([rows, phase]), node.where)
        phase.tag("pin", f"its positions are told apart by {node.where}")
        axes[dim] = rows
    else:
        axes[dim].tag("pin", f"a step of {step} in {node.where}")
        axes[dim] = Axis(size)
        axes[dim].tag("pin", f"a step of {step} in {node.where}")
    inference.assign(_outs(node), axes, node.where)


def select(inference: Inference, node: Node) -> None:
    """One index of an axis; the others carry on."""
    axes = list(inference.axes(node.args[0]))
    dim, index = node.args[1] % len(axes), node.args[2]
    axis = axes.pop(dim)
    _piece(axis, index % axis.size if axis.size else 0, min(axis.size, 1), node.where)
    inference.assign(_outs(node), axes, node.where)


def split(inference: Inference, node: Node) -> None:
    """`split`, `split_with_sizes`, `chunk`: consecutive pieces; `unbind` drops the dimension besides."""
    axes = inference.axes(node.args[0])
    dim = node.argument(1 if node.name == "unbind" else 2, "dim", 0) % len(axes)
    axis = axes[dim]
    sizes = [1] * len(node.outs) if node.name == "unbind" else [inference.shape(out)[dim] for out in node.outs]
    if axis.pinned or len(sizes) == 1:
        pieces = [_piece(axis, 0, size, node.where) for size in sizes]
    else:
        pieces = [Axis(size) for size in sizes]
        unify(axis, total(pieces), node.where)
    for out, piece in zip(node.outs, pieces, strict=True):
        middle = [] if node.name == "unbind" else [piece]
        inference.assign(out, [*axes[:dim], *middle, *axes[dim + 1 :]], node.where)


def cat(inference: Inference, node: Node) -> None:
    """The joined dimension is the sum of the parts'; the others are equal."""
    parts = [inference.axes(ref) for ref in _refs(node.args[0])]
    parts = [axes for axes in parts if not (len(axes) == 1 and axes[0].size == 0)]  # legacy empty operand
    dim = node.argument(1, "dim", 0) % len(parts[0])
    for axes in parts[1:]:
        for at, axis in enumerate(axes):
            if at != dim:
                unify(parts[0][at], axis, node.where)
    joined = total([axes[dim] for axes in parts])
    if any(axes[dim].pinned for axes in parts):
        joined.tag("pin", next(a[dim].leaves()[0].tags["pin"] for a in parts if a[dim].pinned))
    inference.assign(_outs(node), [*parts[0][:dim], joined, *parts[0][dim + 1 :]], node.where)


def stack(inference: Inference, node: Node) -> None:
    """Operands side by side in a new dimension, in which they are told apart."""
    parts = [inference.axes(ref) for ref in _refs(node.args[0])]
    dim = node.argument(1, "dim", 0) % (len(parts[0]) + 1)
    for axes in parts[1:]:
        for first, axis in zip(parts[0], axes, strict=True):
            unify(first, axis, node.where)
    new = Axis(len(parts))
    new.tag("pin", f"operands are told apart by {node.where}")
    inference.assign(_outs(node), [*parts[0][:dim], new, *parts[0][dim:]], node.where)


def softmax(inference: Inference, node: Node) -> None:
    """The reduced dimension couples all its entries; where it is outside (the sequence), the others ride along."""
    axes = inference.axes(node.args[0])
    dim = node.args[1] % len(axes)
    inference.site(node.name, node, (node.args[0], axes[dim]))
    if any("outside" in leaf.tags for leaf in axes[dim].leaves()):
        for at, axis in enumerate(axes):
            if at != dim:
                axis.tag("attention", node.where)
    for out in node.outs:
        inference.assign(out, axes, node.where)


def scan(inference: Inference, node: Node) -> None:
    """Entries are summed up along an axis, each with those before it."""
    axes = inference.axes(node.args[0])
    inference.site(node.name, node, (node.args[0], axes[node.args[1] % len(axes)]))
    inference.assign(_outs(node), axes, node.where)


def reduction(inference: Inference, node: Node) -> None:
    """`sum`, `mean` and their like drop the reduced dimensions (or keep them as units)."""
    ref = node.args[0]
    axes = inference.axes(ref)
    named = node.argument(1, "dim")
    dims = named if isinstance(named, (list, tuple)) else [named] if isinstance(named, int) else list(range(len(axes)))
    reduced = {dim % len(axes) for dim in dims} if axes else set()
    for dim in sorted(reduced):
        inference.site(node.name, node, (ref, axes[dim]))
    keep = len(inference.shape(_outs(node))) == len(axes)
    out = [Axis(1) if at in reduced else axis for at, axis in enumerate(axes) if keep or at not in reduced]
    for number in node.outs:
        inference.assign(number, out, node.where)


def embedding(inference: Inference, node: Node) -> None:
    """A table's rows are read by index; its columns become the last dimension."""
    table, indices = node.args[:2]
    rows, *width = inference.axes(table)
    rows.tag("pin", f"a table read by index in {node.where}")
    if table.number in inference.origin:
        rows.tag("vocabulary", node.where)
        for axis in width:
            axis.tag("embedding", node.where)
    inference.assign(_outs(node), [*inference.axes(indices), *width], node.where)


def layer_norm(inference: Inference, node: Node) -> None:
    """Normalises over the trailing dimensions; weight and bias carry the same axes."""
    axes = inference.axes(node.args[0])
    count = len(node.args[1])
    for ref in _refs(node.args[2:4]):
        for axis, norm in zip(inference.axes(ref), axes[-count:], strict=True):
            unify(axis, norm, node.where)
    kind = "mean" if "rms" in node.name else node.name
    for axis in axes[-count:]:
        inference.site(kind, node, (node.args[0], axis))
    inference.assign(_outs(node), axes, node.where)
    for number in node.outs[1:]:
        inference.assign(number, [*axes[:-count], *(Axis(1) for _ in range(count))], node.where)


def factory(inference: Inference, node: Node) -> None:
    """New tensors have new axes; those whose values count the index are tagged."""
    axes = [Axis(size) for size in inference.shape(_outs(node))]
    if node.name in INDEX_VALUES:
        for axis in axes:
            axis.tag("index-value", node.where)
    inference.assign(_outs(node), axes, node.where)


def pin_unknown(inference: Inference, node: Node) -> None:
    """No rule, no claim: every axis of every operand stays."""
    for number in (*node.inputs(), *node.outs):
        for axis in inference.axes(Ref(number)):
            axis.tag("pin", f"no rule for {node.where}")


RULES: dict[str, Rule] = {
    **dict.fromkeys(ELEMENTWISE, elementwise),
    **dict.fromkeys(["mm", "bmm", "addmm", "baddbmm", "mv", "addmv", "dot"], contraction),
    **dict.fromkeys(VIEWS, view),
    **dict.fromkeys(["permute", "transpose", "t"], permute),
    "expand": expand,
    "slice": slice_,
    "select": select,
    **dict.fromkeys(["split", "split_with_sizes", "unbind"], split),
    "cat": cat,
    "stack": stack,
    **dict.fromkeys(["_softmax", "_log_softmax"], softmax),
    "cumsum": scan,
    **dict.fromkeys(
        [
            "sum",
            "mean",
            "amax",
            "amin",
            "max",
            "min",
            "all",
            "any",
            "var",
            "std",
            "logsumexp",
            "linalg_vector_norm",
            "prod",
        ],
        reduction,
    ),
    "embedding": embedding,
    **dict.fromkeys(["native_layer_norm", "rms_norm", "_fused_rms_norm"], layer_norm),
    **dict.fromkeys(FACTORIES + INDEX_VALUES, factory),
}
