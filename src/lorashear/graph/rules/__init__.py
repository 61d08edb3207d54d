"""The equations that each ATen operator states about its operands' axes, one file a family of operators.

A rule is a function of the inference and the node. It reads the axes of the inputs (`inference.axes`), says which are
equal (`unify`), gives the outputs theirs (`inference.assign`), and notes where an axis is summed or reduced away
(`inference.site`). docs/adding-an-operator.md shows how to write one.
"""

from __future__ import annotations

from lorashear.graph.inference import Inference, Rule
from lorashear.graph.rules import contraction, factories, indexing, pieces, pointwise, reduction, shapes
from lorashear.graph.trace import Node, Ref

RULES: dict[str, Rule] = {
    **pointwise.RULES,
    **contraction.RULES,
    **shapes.RULES,
    **pieces.RULES,
    **reduction.RULES,
    **indexing.RULES,
    **factories.RULES,
}
"""Operator name without namespace and in-place mark -> rule."""


def pin_unknown(inference: Inference, node: Node) -> None:
    """No rule, no claim: every axis of every operand stays."""
    for number in (*node.inputs(), *node.outs):
        for axis in inference.axes(Ref(number)):
            axis.tag("pin", f"no rule for {node.where}")
