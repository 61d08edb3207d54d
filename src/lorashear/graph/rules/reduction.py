"""Operators that reduce an axis, or couple all entries along it."""

from __future__ import annotations

from lorashear.graph.axes import Axis, unify
from lorashear.graph.inference import Inference, Rule
from lorashear.graph.rules.pieces import pinned, refs
from lorashear.graph.trace import Node

REDUCTIONS = """
    sum mean amax amin max min all any var std logsumexp linalg_vector_norm prod argmax argmin nansum
    count_nonzero
""".split()


def coupled(inference: Inference, node: Node) -> None:
    """Softmax and running sums: entries along one dimension depend on each other, the shape stays.

    Where that dimension is outside (the sequence), the others ride along: heads under a softmax, the channels of a
    layer that mixes the sequence under a running sum.
    """
    axes = inference.axes(node.args[0])
    dim = node.args[1] % len(axes)
    inference.site(node.name, node, (node.args[0], axes[dim]))
    if inference.outside(axes[dim]):
        for at, axis in enumerate(axes):
            if at != dim:
                axis.tag("attention" if "softmax" in node.name else "mixed", node.where)
    for out in node.outs:
        inference.assign(out, axes, node.where)


def reduction(inference: Inference, node: Node) -> None:
    """`sum`, `mean` and their like drop the reduced dimensions (or keep them as units)."""
    ref = node.args[0]
    axes = inference.axes(ref)
    if node.name in ("max", "min") and len(refs(node.args)) == 2:  # max of two tensors, entry by entry
        inference.assign(node.outs[0], axes, node.where)
        for left, right in zip(reversed(axes), reversed(inference.axes(node.args[1])), strict=False):
            unify(left, right, node.where)
        return
    position = 2 if node.name == "linalg_vector_norm" else 1
    named = node.argument(position, "dim")
    dims = named if isinstance(named, (list, tuple)) else [named] if isinstance(named, int) else []
    reduced = {dim % len(axes) for dim in dims} if axes else set()
    reduced = reduced or set(range(len(axes)))
    kind = node.name
    if kind == "linalg_vector_norm":
        order = node.argument(1, "ord", 2)
        kind = "sum" if 0 < order < float("inf") else kind  # of powers: zeros add nothing
    for dim in sorted(reduced):
        inference.site(kind, node, (ref, axes[dim]))
    keep = len(inference.shape(node.outs[0])) == len(axes)
    out = [Axis(1) if at in reduced else axis for at, axis in enumerate(axes) if keep or at not in reduced]
    for number in node.outs:
        inference.assign(number, out, node.where)
    if len(reduced) == 1 and node.outs and node.name in ("argmax", "argmin", "max", "min"):
        inference.points_to[node.outs[-1]] = axes[min(reduced)]


def ordered(inference: Inference, node: Node) -> None:
    """`topk` and `sort`: the values along the dimension are new, their indices point to the old axis."""
    axes = inference.axes(node.args[0])
    position = 2 if node.name == "topk" else next((i for i, v in enumerate(node.args) if type(v) is int), 1)
    dim = node.argument(position, "dim", -1) % len(axes)
    inference.site(node.name, node, (node.args[0], axes[dim]))
    largest = node.name == "topk" and node.argument(3, "largest", True)
    if largest:
        axes[dim].tag("chosen", node.where)
    else:  # what is kept out of a choice of the smallest, or of a full order, would come first or have to be counted
        axes[dim].tag("pin", f"put in order by {node.where}")
    size = inference.shape(node.outs[0])[dim]
    out = [*axes[:dim], pinned(size, f"ranks of {node.where}"), *axes[dim + 1 :]]
    for number in node.outs:
        inference.assign(number, out, node.where)
    inference.points_to[node.outs[-1]] = axes[dim]


def layer_norm(inference: Inference, node: Node) -> None:
    """Normalises over the trailing dimensions; weight and bias carry the same axes."""
    axes = inference.axes(node.args[0])
    count = len(node.args[1])
    for ref in refs(node.args[2:4]):
        for axis, norm in zip(inference.axes(ref), axes[-count:], strict=True):
            unify(axis, norm, node.where)
    kind = "mean" if "rms" in node.name else node.name
    for axis in axes[-count:]:
        inference.site(kind, node, (node.args[0], axis))
    inference.assign(node.outs[0], axes, node.where)
    for number in node.outs[1:]:
        inference.assign(number, [*axes[:-count], *(Axis(1) for _ in range(count))], node.where)


RULES: dict[str, Rule] = {
    **dict.fromkeys(["_softmax", "_log_softmax", "softmax", "cumsum", "cumprod", "cummax", "logcumsumexp"], coupled),
    **dict.fromkeys(REDUCTIONS, reduction),
    **dict.fromkeys(["topk", "sort", "argsort"], ordered),
    **dict.fromkeys(["native_layer_norm", "_fused_rms_norm"], layer_norm),
}
