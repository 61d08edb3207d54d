"""Operators that read or write by index.

Experts meet their router through values: an index tensor knows which axis its values point to (`inference.points_to`,
set by `topk` and the like), and whatever is indexed with it has that axis there.
"""

from __future__ import annotations

from itertools import zip_longest

import torch

from lorashear.graph.axes import Axis, unify
from lorashear.graph.inference import Inference, Rule
from lorashear.graph.rules.pieces import piece
from lorashear.graph.trace import Node, Ref


def embedding(inference: Inference, node: Node) -> None:
    """A table's rows are read by index; its columns become the last dimension."""
    table, indices = node.args[:2]
    rows, *width = inference.axes(table)
    _point(inference, rows, indices, node)
    if table.number in inference.origin and indices.number not in inference.points_to:
        rows.tag("vocabulary", node.where)
        for axis in width:
            axis.tag("embedding", node.where)
    inference.assign(node.outs[0], [*inference.axes(indices), *width], node.where)


def _point(inference: Inference, axis: Axis, indices: Ref, node: Node) -> None:
    """States that `indices` holds positions along `axis`; without knowing what they point to, the axis stays."""
    target = inference.points_to.get(indices.number)
    if target is None:
        axis.tag("pin", f"read by index in {node.where}")
    else:
        unify(axis, target, node.where)


def index(inference: Inference, node: Node) -> None:
    """`x[i, :, j]`: the broadcast of the index tensors stands in place of the first one (at the front when apart)."""
    axes = inference.axes(node.args[0])
    indices: list[Ref | None] = list(node.args[1])
    used = [dim for dim, ref in enumerate(indices) if ref is not None]
    consumed: set[int] = set()
    at = 0
    new: list[Axis] | None = None
    first = len(axes)
    for _dim, ref in enumerate(indices):
        if ref is None:
            at += 1
            continue
        first = min(first, at)
        width = _mask_rank(inference, ref)
        consumed.update(range(at, at + width))
        new = _indexed(inference, ref, axes[at : at + width], new, node)
        at += width
    apart = used != list(range(used[0], used[-1] + 1))
    rest = [axis for at, axis in enumerate(axes) if at not in consumed]
    place = 0 if apart else first
    out = [*rest[:place], *(new or []), *rest[place:]]
    shape = inference.shape(node.outs[0])
    if [axis.size for axis in out] != list(shape):
        raise ValueError(f"index gave {[axis.size for axis in out]}, expected {list(shape)}")
    inference.assign(node.outs[0], out, node.where)


def _mask_rank(inference: Inference, ref: Ref) -> int:
    """A boolean mask takes as many dimensions as it has."""
    shape = inference.shape(ref.number)
    is_mask = inference.trace.dtypes[ref.number] is torch.bool
    return len(shape) if is_mask else 1


def _indexed(inference: Inference, ref: Ref, axes: list[Axis], others: list[Axis] | None, node: Node) -> list[Axis]:
    value = inference.trace.values.get(ref.number)
    shape = inference.shape(ref.number)
    is_mask = inference.trace.dtypes[ref.number] is torch.bool
    if is_mask:
        for axis in (*axes, *inference.axes(ref)):
            axis.tag("pin", f"entries are picked by a mask in {node.where}")
        size = inference.shape(node.outs[0])[0] if value is None else int(value.sum())
        mine = [Axis(size)]
        mine[0].tag("pin", f"entries are picked by a mask in {node.where}")
    elif ref.number not in inference.points_to and value is not None and _is_run(value):
        start = int(value[0])
        mine = [piece(axes[0], start % axes[0].size, len(value), node.where)]
        if start % axes[0].size == 0 and len(value) == axes[0].size:
            mine = [axes[0]]
    else:
        _point(inference, axes[0], ref, node)
        mine = list(inference.axes(ref))
    if others is None:
        return mine
    merged: list[Axis] = []
    for back in range(max(len(mine), len(others)), 0, -1):
        pair = [side[-back] for side in (others, mine) if back <= len(side)]
        pair = [axis for axis in pair if axis.size != 1] or pair[:1]
        if len(pair) == 2:
            unify(pair[0], pair[1], node.where)
        merged.append(pair[0])
    return merged if shape is not None else mine


def _is_run(value: torch.Tensor) -> bool:
    """Consecutive positions, ascending, from one end: an index that is a slice."""
    ascending = value.dim() == 1 and len(value) > 0 and bool((value.diff() == 1).all())
    return ascending and not bool(value[0] < 0 <= value[-1])


def gather(inference: Inference, node: Node) -> None:
    """`out[.., i, ..] = x[.., index[.., i, ..], ..]`: the shape of the index."""
    axes = inference.axes(node.args[0])
    dim, indices = node.args[1] % max(len(axes), 1), node.args[2]
    _point(inference, axes[dim], indices, node)
    others = inference.axes(indices)
    for at, (axis, other) in enumerate(zip(axes, others, strict=True)):
        if at != dim and axis.size == other.size:
            unify(axis, other, node.where)
        elif at != dim:
            axis.tag("pin", f"a part of it is read in {node.where}")
    inference.assign(node.outs[0], others, node.where)


def scatter(inference: Inference, node: Node) -> None:
    """Writes at positions along a dimension of the first operand: `scatter`, `index_add`, `index_copy`, `index_fill`."""
    axes = inference.axes(node.args[0])
    dim, indices = node.args[1] % max(len(axes), 1), node.args[2]
    _point(inference, axes[dim], indices, node)
    written = [ref for ref in node.args[3:] if isinstance(ref, Ref)]
    for ref in [*([indices] if node.name.startswith("scatter") else []), *written]:
        for at, (axis, other) in enumerate(zip(axes, inference.axes(ref), strict=False)):
            if at != dim and axis.size == other.size:
                unify(axis, other, node.where)
            elif at != dim:
                for part in (axis, other):
                    part.tag("pin", f"a part of it is written in {node.where}")
    inference.assign(node.outs[0], axes, node.where)


def index_select(inference: Inference, node: Node) -> None:
    """Some entries along one dimension, in the order of the index."""
    axes = list(inference.axes(node.args[0]))
    dim, indices = node.args[1] % max(len(axes), 1), node.args[2]
    _point(inference, axes[dim], indices, node)
    axes[dim] = inference.axes(indices)[0]
    inference.assign(node.outs[0], axes, node.where)


def index_put(inference: Inference, node: Node) -> None:
    """Writes `x[i, :, j] = values`: the indexed dimensions stay, the others go on."""
    axes = inference.axes(node.args[0])
    for axis, ref in zip(axes, node.args[1], strict=False):
        if ref is not None:
            _point(inference, axis, ref, node)
            axis.tag("pin", f"written by index in {node.where}")
    free = [axis for axis, ref in zip_longest(axes, node.args[1]) if ref is None]
    values = inference.axes(node.args[2])
    for axis, other in zip_longest(reversed(free), reversed(values)):
        if axis is not None and other is not None and axis.size == other.size and len(free) < len(axes):
            unify(axis, other, node.where)
        elif other is not None:
            other.tag("pin", f"written by index in {node.where}")
    inference.assign(node.outs[0], axes, node.where)


RULES: dict[str, Rule] = {
    "embedding": embedding,
    "index": index,
    "gather": gather,
    **dict.fromkeys(["scatter", "scatter_add", "index_add", "index_copy", "index_fill"], scatter),
    "index_select": index_select,
    **dict.fromkeys(["index_put", "_index_put_impl"], index_put),
}
