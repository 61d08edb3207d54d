"""What a method is, and what it may look at."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lorashear.config import PrunableKind, SaliencySettings
from lorashear.graph.groups import Graph, NodeGroup

IN_LAYERS: tuple[PrunableKind, ...] = ("heads", "query-slots", "ffn-channels")
"""What lies inside the decoder layers, where structure gates sit."""


@dataclass(frozen=True)
class Scoring:
    """The dense model and text to judge its structures by. Nothing of it is changed."""

    model: PreTrainedModel
    graph: Graph
    windows: Tensor
    """Calibration windows of token ids, `(samples, window)`."""
    batch: int
    """Windows in a forward pass."""
    dtype: torch.dtype | None
    """Autocast."""
    seed: int
    saliency: SaliencySettings
    kinds: tuple[PrunableKind, ...] = IN_LAYERS
    """What may be cut."""

    @property
    def groups(self) -> tuple[NodeGroup, ...]:
        """The groups to score: those with structure gates, and experts where they may be cut."""
        return self.graph.candidates(self.kinds)


@dataclass(frozen=True)
class Method:
    """Picks structures by a score; `walks` tells whether they shrink while the rest learns, or go at once."""

    name: str
    reference: str
    """Where it was published."""
    score: Callable[[Scoring], Mapping[str, Tensor]]
    """Saliency of the structures of every group that it may cut, `(structures,)`, at least 0, higher is kept; sums over
    structures are compared per parameter saved."""
    kinds: tuple[PrunableKind, ...] = IN_LAYERS
    also: tuple[PrunableKind, ...] = ()
    """Kinds that it can score, too, and that go only where the settings name them."""
    walks: bool = False
