"""Which weight gives what an expert puts out: the last one that anything of the expert is multiplied by."""

from __future__ import annotations

from collections.abc import Iterable

from lorashear.errors import PlanError
from lorashear.graph.flow import VIEWS
from lorashear.graph.groups import Graph, Member, NodeGroup
from lorashear.graph.trace import Node, Trace

MOVES = VIEWS | frozenset("index index_select gather _to_copy clone contiguous".split())
"""Operators whose result holds entries of their first argument and nothing else."""


def expert_writers(graph: Graph, groups: Iterable[NodeGroup]) -> dict[str, Member]:
    """Group of experts -> the weight, experts along one of its dimensions, in which an expert's output is linear.

    It is that of the last matrix product of the trace with a weight of the group; the router's comes before any
    expert is run.

    Raises:
        PlanError: where no matrix product has a weight of the group.
    """
    inference = graph.inference
    assert inference is not None
    trace = inference.trace
    made_by = {number: node for node in trace.nodes for number in node.outs}
    last = {
        _parameter(trace, made_by, number): at
        for at, site in enumerate(inference.sites)
        if site.kind == "contract"
        for number, _ in site.operands
    }
    found = {}
    for group in groups:
        members = [m for m in group.members if not m.adapter and not m.buffer and m.parameter in last]
        if not members:
            raise PlanError(
                f"{group.name}: no matrix product gives what its experts put out; leave experts out of the kinds"
            )
        found[group.name] = max(members, key=lambda member: last[member.parameter])
    return found


def _parameter(trace: Trace, made_by: dict[int, Node], number: int) -> str:
    """Name of the parameter whose entries a tensor holds; empty for a tensor that was computed."""
    while number not in trace.parameters:
        node = made_by.get(number)
        source = node.inputs()[0] if node is not None and node.name in MOVES and node.inputs() else number
        if source == number:
            return ""
        number = source
    return trace.parameters[number]
