"""What a leaf axis is called, read off the tags that the trace left on it and off its neighbours."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from lorashear.graph.axes import Axis
from lorashear.graph.groups import Consumer, Kind, Member


def kind_of(leaf: Axis, found: Mapping[Axis, Sequence[Member]], consumers: Sequence[Consumer]) -> Kind:
    """The kind of the group of an axis, among all that were found."""
    members = found[leaf]
    if all(member.adapter for member in members):
        return Kind.RANK
    neighbours = {other for member in members for other in member.axis.leaves() if other is not leaf}
    if "attention" in leaf.tags:
        heads = [other for other in neighbours if "attention" in other.tags and not _repeats(other, leaf, found)]
        return Kind.QUERY_SLOTS if "repeat" in leaf.tags and heads else Kind.HEADS
    if "embedding" in leaf.tags:
        return Kind.RESIDUAL
    if "vocabulary" in leaf.tags or "output" in leaf.tags.get("pin", ""):
        return Kind.VOCABULARY
    if any("attention" in other.tags for other in neighbours):
        return Kind.HEAD_DIM
    if "chosen" in leaf.tags:
        return Kind.EXPERTS
    if "mixed" in leaf.tags:
        return Kind.MIXER
    if "activated" in leaf.tags:
        return Kind.CHANNELS
    return Kind.LATENT if consumers else Kind.OTHER


def _repeats(other: Axis, leaf: Axis, found: Mapping[Axis, Sequence[Member]]) -> bool:
    """Whether one axis repeats the other: keys and values, say, carry the other alone.

    A bias that is expanded to all heads leaves the mark of a repeat on key/value heads as well.
    """
    mine, its = ({member.parameter for member in found.get(axis, ())} for axis in (leaf, other))
    return "repeat" in other.tags and its <= mine
