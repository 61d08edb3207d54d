"""The second trace: what a model built or cut to other widths does, operator by operator, beside what it should do."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from lorashear.graph.inference import Inference
from lorashear.graph.replay import Replay
from lorashear.graph.scales import Differences
from lorashear.graph.trace import Node, Ref, Trace


class MismatchError(Exception):
    """The cut model's own code does something else than the cut trace; the message names the operator."""


def compare(inference: Inference, replay: Replay, cut: Trace, left_out: Iterable[range] = ()) -> Differences:
    """Compares the trace of a cut model with the whole model's trace as `replay` cuts it.

    Operators that depend on weights are compared one by one; what does not depend on them (masks, positions, buffers) is
    compared by value where it meets them.

    Args:
        inference: of the whole model.
        replay: which of it stays.
        cut: the trace of the cut model, on the same inputs.
        left_out: ranges of nodes of the whole trace that lie in removed layers.

    Returns:
        The numbers that differ though everything else is equal (an attention scale, say): `scales.rescaling` makes up
        for them.

    Raises:
        MismatchError: when operators, shapes, positions or values differ.
    """
    gone = {at for each in left_out for at in each}
    trace = inference.trace
    expected = [(at, n) for at, n in enumerate(trace.nodes) if at not in gone and n.outs[0] in trace.learnt]
    actual = [node for node in cut.nodes if node.outs[0] in cut.learnt]
    numbers: dict[int, list[tuple[float, float]]] = {}
    factors: dict[int, float] = {}
    for (at, node), other in _pairs(expected, actual):
        shapes = [tuple(replay.shape(number)) for number in node.outs]
        others = [cut.shapes[number] for number in other.outs]
        if shapes != others:
            raise MismatchError(f"{node.where} gives {others[0]} in the cut model, {shapes[0]} was expected")
        changed = _changed_numbers(node, other, replay)
        if changed:
            numbers[at] = changed
        for mine, its in zip(node.inputs(), other.inputs(), strict=True):
            if mine in trace.constants and mine not in trace.learnt and its in cut.constants:
                factor = _factor(replay.cut(mine, trace.constants[mine]), cut.constants[its], node)
                if factor != 1.0:
                    factors[mine] = factor
    return Differences(numbers, factors)


def _factor(expected: Tensor, actual: Tensor, node: Node) -> float:
    """What a constant is multiplied with in the cut model."""
    if expected.shape != actual.shape:
        raise MismatchError(
            f"{node.where} takes a constant of shape {tuple(actual.shape)}, not {tuple(expected.shape)}"
        )
    if torch.equal(expected, actual):
        return 1.0
    here = expected != 0
    if not expected.is_floating_point() or not torch.equal(here, actual != 0):
        raise MismatchError(f"{node.where} takes other constants in the cut model")
    ratio = actual[here].double() / expected[here].double()
    ratio = ratio[torch.isfinite(ratio)]
    if not len(ratio) or float(ratio[0]) <= 0 or float((ratio / ratio[0] - 1).abs().max()) > 1e-5:
        raise MismatchError(f"{node.where} takes other constants in the cut model")
    return 1.0 if abs(float(ratio[0]) - 1) < 1e-6 else float(ratio[0])


def _pairs(expected: list[tuple[int, Node]], actual: list[Node]) -> Iterator[tuple[tuple[int, Node], Node]]:
    """Nodes side by side. Code that branches on a size (one key/value head is not repeated) leaves views out, no more."""
    if [node.name for _, node in expected] != [node.name for node in actual]:
        expected = [pair for pair in expected if pair[1].name not in VIEWS_ONLY]
        actual = [node for node in actual if node.name not in VIEWS_ONLY]
    places = [_place(node) for _, node in expected]
    others = [_place(node) for node in actual]
    if places != others:
        odd = next((i for i, (one, two) in enumerate(zip(places, others, strict=False)) if one != two), -1)
        where = expected[odd][1].where if expected else "the model"
        raise MismatchError(f"the cut model runs other operators than the whole one, from {where} on")
    yield from zip(expected, actual, strict=True)


def _place(node: Node) -> str:
    """Operator and module, whatever the layer's number: layers move up when others are gone."""
    return re.sub(r"\.\d+(?=\.|$)", ".*", node.module) + " " + node.name


VIEWS_ONLY = frozenset(
    "view _unsafe_view reshape expand clone unsqueeze squeeze alias detach slice select permute t transpose".split()
)


def _changed_numbers(node: Node, other: Node, replay: Replay) -> list[tuple[float, float]]:
    if node.name in FREE:
        return []
    expected, actual = _numbers(replay.arguments(node)), _numbers((other.args, other.kwargs))
    if len(expected) != len(actual):
        raise MismatchError(f"{node.where} is called in another way in the cut model")
    changed = []
    for before, after in zip(expected, actual, strict=True):
        if before == after or abs(before - after) <= 1e-12 * abs(before):
            continue
        if isinstance(before, int) and isinstance(after, int) and node.name not in FACTORS:
            raise MismatchError(f"{node.where} works with {after} in the cut model, {before} was expected")
        changed.append((float(before), float(after)))
    return changed


FREE = frozenset(
    """
    view _unsafe_view reshape _reshape_alias expand slice zeros ones empty full arange new_zeros new_ones
    new_empty split split_with_sizes index new_full scalar_tensor
""".split()
)
"""Operators whose shapes say all: their numbers are sizes, written in several ways (-1, the largest integer)."""
FACTORS = frozenset(["mul", "div", "add", "sub", "rsub", "pow"])


def _numbers(arguments: Sequence[Any]) -> list[int | float]:
    leaves = pytree.tree_leaves(arguments, is_leaf=lambda leaf: isinstance(leaf, Ref))
    return [leaf for leaf in leaves if type(leaf) in (int, float)]
