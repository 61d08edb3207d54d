"""What a leaf axis is called, read off the tags that the trace left on it and off its neighbours."""

from __future__ import annotations

from collections.abc import Sequence

from lorashear.graph.axes import Axis
from lorashear.graph.groups import Consumer, Kind, Member


def kind_of(leaf: Axis, members: Sequence[Member], consumers: Sequence[Consumer]) -> Kind:
    """The kind of the group of an axis."""
    if all(member.adapter for member in members):
        return Kind.RANK
    neighbours = {other for member in members for other in member.axis.leaves() if other is not leaf}
    if "attention" in leaf.tags:
        shared = any("attention" in other.tags for other in neighbours)
        return Kind.QUERY_SLOTS if "repeat" in leaf.tags and shared else Kind.HEADS
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
