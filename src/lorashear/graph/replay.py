"""Runs a recorded trace again, with structures removed: what the cut model computes, whatever its module code says.

The trace is a program. Every leaf axis gets a mask of what stays; masks of whole dimensions follow from the axes (sums
concatenate, products multiply); parameters are cut with them, and integers in the operators' arguments (view sizes,
slice bounds, split sizes, ...) are recomputed. Every output's shape is checked against its axes, so a wrong rule is
found at the operator where it breaks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from lorashear.errors import PlanError
from lorashear.graph.axes import Axis
from lorashear.graph.inference import Inference
from lorashear.graph.rules.factories import CONSTANT, INDEX_VALUES
from lorashear.graph.rules.shapes import VIEWS
from lorashear.graph.trace import Node, Ref

Keep = Mapping[Axis, Tensor]
"""Leaf axis -> boolean mask of the indices that stay, `(leaf.size,)`; leaves that stay whole are left out."""


def keep_mask(axis: Axis, keep: Keep) -> Tensor | None:
    """Mask of a whole dimension, `(axis.size,)`; None where all of it stays."""
    axis = axis.root()
    if not axis.bound:
        return keep.get(axis)
    parts = [(part.size, keep_mask(part, keep)) for part in axis.parts]
    if all(mask is None for _, mask in parts):
        return None
    masks = [torch.ones(size, dtype=torch.bool) if mask is None else mask for size, mask in parts]
    if axis.bound == "sum":
        return torch.cat(masks)
    whole = masks[0]
    for mask in masks[1:]:
        whole = (whole[:, None] & mask[None, :]).flatten()
    return whole


class Replay:
    """A trace to be run with `keep` (and, where `masked` says so, with experts that the router cannot choose)."""

    def __init__(self, inference: Inference, keep: Keep | None = None, masked: Keep | None = None) -> None:
        self.inference = inference
        self.keep = keep or {}
        self.masked = masked or {}
        self.last_use = _last_uses(inference)
        self._masks: dict[int, Tensor | None] = {}

    def run(self, tensors: Mapping[str, Tensor], inputs: Mapping[str, Tensor]) -> list[Tensor]:
        """Outputs of the trace.

        Args:
            tensors: parameters and buffers by name, whole; they are cut here.
            inputs: the model's inputs by name, of the recorded shapes.

        Raises:
            PlanError: when an output has another shape than its axes say.
        """
        trace = self.inference.trace
        values: dict[int, Tensor] = {}
        others = {n: tensors[name] for n, name in trace.buffers.items()}
        others |= {n: inputs[name] for n, name in trace.inputs.items()}
        others |= {n: value for n, value in trace.literals.items() if n not in others}
        values |= {n: self.cut(n, tensor).clone() for n, tensor in others.items()}  # operators may write into them
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)  # models that draw numbers as they run draw the same ones each time
            for at, node in enumerate(trace.nodes):
                for number in node.inputs():
                    if number not in values and number in trace.parameters:  # one layer's at a time are in memory
                        values[number] = self.cut(number, tensors[trace.parameters[number]])
                self._step(node, values)
                for number in self.last_use.get(at, ()):
                    values.pop(number, None)
        return [values[number] for number in trace.outputs]

    def cut(self, number: int, tensor: Tensor) -> Tensor:
        """The part of a whole tensor that stays."""
        for dim, axis in enumerate(self.inference.dims.get(number, ())):
            mask = self.mask(axis)
            if mask is not None:
                tensor = tensor.index_select(dim, mask.nonzero().flatten())
        return tensor

    def mask(self, axis: Axis) -> Tensor | None:
        """What stays of a dimension; None where all of it does."""
        key = id(axis.root())
        if key not in self._masks:
            self._masks[key] = keep_mask(axis, self.keep)
        return self._masks[key]

    def size(self, axis: Axis) -> int:
        """How many indices of a dimension stay."""
        mask = self.mask(axis)
        return axis.size if mask is None else int(mask.sum())

    def before(self, axis: Axis, index: int) -> int:
        """How many of the first `index` indices stay."""
        mask = self.mask(axis)
        return index if mask is None else int(mask[:index].sum())

    def shape(self, number: int) -> list[int]:
        """Shape of a tensor of the trace once it is cut."""
        return [self.size(axis) for axis in self.inference.dims[number]]

    def arguments(self, node: Node) -> tuple[list[Any], dict[str, Any]]:
        """The operator's arguments for the cut shapes; tensors are `Ref`s still."""
        args, kwargs = list(node.args), dict(node.kwargs)
        if self.keep and node.name in RESIZE:
            RESIZE[node.name](self, node, args)
        return args, kwargs

    def _step(self, node: Node, values: dict[int, Tensor]) -> None:
        args, kwargs = self.arguments(node)

        def value(leaf: Any) -> Any:
            return values[leaf.number] if isinstance(leaf, Ref) else leaf

        args, kwargs = pytree.tree_map(value, (args, kwargs), is_leaf=lambda leaf: isinstance(leaf, Ref))
        if kwargs.get("device") is not None:
            kwargs["device"] = torch.device("cpu")
        if node.name == "view_as_complex":
            args[0] = args[0].contiguous()
        op = torch.ops.aten.split_with_sizes.default if node.name == "split" and self.keep else node.op
        out = op(*args, **kwargs)
        for number, tensor in zip(
            node.outs, (t for t in pytree.tree_leaves(out) if isinstance(t, Tensor)), strict=True
        ):
            if node.name in FACTORIES:
                tensor = self.cut(number, tensor)
            if self.keep and list(tensor.shape) != self.shape(number):
                raise PlanError(
                    f"{node.where} gives {tuple(tensor.shape)} where its axes say {tuple(self.shape(number))}: "
                    "the operator's rule does not hold here, please report it"
                )
            values[number] = self._masked(number, tensor)

    def _masked(self, number: int, tensor: Tensor) -> Tensor:
        """Experts that are out of the router's choice: their logits are -inf."""
        if not self.masked or number not in self.inference.choices:
            return tensor
        for dim, axis in enumerate(self.inference.dims[number]):
            mask = keep_mask(axis, self.masked)
            if mask is not None:
                tensor = tensor.index_fill(dim, (~mask).nonzero().flatten(), float("-inf"))
        return tensor


def _last_uses(inference: Inference) -> dict[int, list[int]]:
    """Node index -> tensors that nothing reads after it; parameters and views' bases are not copies, so this is safe."""
    trace = inference.trace
    last: dict[int, int] = {}
    for at, node in enumerate(trace.nodes):
        for number in (*node.inputs(), *node.outs):
            last[number] = at
    kept = set(trace.outputs)
    found: dict[int, list[int]] = {}
    for number, at in last.items():
        if number not in kept:
            found.setdefault(at, []).append(number)
    return found


def _sizes(position: int) -> Callable[[Replay, Node, list[Any]], None]:
    def resize(replay: Replay, node: Node, args: list[Any]) -> None:
        args[position] = replay.shape(node.outs[0])

    return resize


def _repeat(replay: Replay, node: Node, args: list[Any]) -> None:
    before = replay.shape(node.args[0].number)
    after = replay.shape(node.outs[0])
    before = [1] * (len(after) - len(before)) + before
    args[1] = [new // max(old, 1) for old, new in zip(before, after, strict=True)]


def _slice(replay: Replay, node: Node, args: list[Any]) -> None:
    axes = replay.inference.dims[node.args[0].number]
    dim = node.argument(1, "dim", 0) % len(axes)
    axis = axes[dim]
    step = node.argument(4, "step", 1)
    if replay.mask(axis) is None:
        return
    start, end = node.argument(2, "start") or 0, node.argument(3, "end")
    start = max(start + axis.size, 0) if start < 0 else min(start, axis.size)
    end = axis.size if end is None else max(end + axis.size, 0) if end < 0 else min(end, axis.size)
    if step == 1:
        args[1:] = [dim, replay.before(axis, start), replay.before(axis, max(end, start)), 1]
    else:
        args[1:] = [dim, start, replay.size(axis), step]


def _select(replay: Replay, node: Node, args: list[Any]) -> None:
    axes = replay.inference.dims[node.args[0].number]
    axis = axes[node.args[1] % len(axes)]
    if replay.mask(axis) is not None:
        args[2] = replay.before(axis, node.args[2] % axis.size)


def _split(replay: Replay, node: Node, args: list[Any]) -> None:
    dim = node.argument(2, "dim", 0)
    args[1:] = [[replay.shape(out)[dim] for out in node.outs], dim]


def _index(replay: Replay, node: Node, args: list[Any]) -> None:
    """Literal positions (`x[..., [-2], :]`) move with what was cut before them."""
    inference = replay.inference
    axes = inference.dims[node.args[0].number]
    indices = list(node.args[1])
    for dim, ref in enumerate(indices):
        if ref is None:
            continue
        value = inference.trace.values.get(ref.number)
        if value is None or value.dtype is torch.bool or ref.number in inference.points_to or dim >= len(axes):
            continue
        mask = replay.mask(axes[dim])
        if mask is not None:
            positions = value.remainder(axes[dim].size)
            moved = mask.cumsum(0) - 1
            indices[dim] = moved[positions[mask[positions]]]
    args[1] = indices


def _pad(replay: Replay, node: Node, args: list[Any]) -> None:
    """A negative width takes indices away: as many as stay of them."""
    axes = replay.inference.dims[node.args[0].number]
    widths = list(node.args[1])
    for at in range(len(widths) // 2):
        axis = axes[-1 - at]
        left, right = widths[2 * at : 2 * at + 2]
        if left < 0:
            widths[2 * at] = -replay.before(axis, -left)
        if right < 0:
            widths[2 * at + 1] = replay.before(axis, axis.size + right) - replay.size(axis)
    args[1] = widths


def _convolution(replay: Replay, node: Node, args: list[Any]) -> None:
    if node.args[8] > 1 and not node.args[6]:  # as many groups as have input channels left
        given, weight, *_ = node.inputs()
        args[8] = replay.shape(given)[1] // replay.shape(weight)[1]


def _layer_norm(replay: Replay, node: Node, args: list[Any]) -> None:
    args[1] = replay.shape(node.args[0].number)[-len(node.args[1]) :]


RESIZE: dict[str, Callable[[Replay, Node, list[Any]], None]] = {
    **{name: _sizes(1) for name in VIEWS if name not in ("squeeze", "unsqueeze", "flatten", "unflatten")},
    "expand": _sizes(1),
    "repeat": _repeat,
    "slice": _slice,
    "select": _select,
    **dict.fromkeys(["split", "split_with_sizes"], _split),
    "index": _index,
    "constant_pad_nd": _pad,
    "convolution": _convolution,
    "native_layer_norm": _layer_norm,
}
"""Operators whose arguments hold sizes or positions, and how these follow the cut."""

FACTORIES = frozenset(CONSTANT + INDEX_VALUES) - {"nonzero", "_local_scalar_dense"}
"""Operators whose sizes stay as they were: what they make is cut afterwards."""
