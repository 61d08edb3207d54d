"""What a method is, and what it may look at."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lorashear.config import CompressSettings, PrunableKind, SaliencySettings
from lorashear.data.packing import TokenData
from lorashear.graph.groups import Graph, NodeGroup
from lorashear.plan import Plan
from lorashear.training import Teacher

STAGE = "prune"
"""Names the pruning stage's checkpoints and its lines in the metrics, whatever the method."""
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
class TrainingRun:
    """What a method that trains is given beside the model: the pruning stage's part of the token budget."""

    data: TokenData
    settings: CompressSettings
    steps: int
    """Optimizer steps, of `settings.batch` windows each."""
    out: Path
    """Run folder, for metrics and checkpoints."""
    dtype: torch.dtype | None
    """Autocast."""
    teacher: Teacher | None
    unprunable: Collection[str]
    """Names of groups to leave whole (per-layer shape)."""
    resume: bool
    checkpoint_every: int | None
    progress: bool
    narrowed: bool = False
    """Whether the residual stream was turned and cut before: that is then part of a checkpoint, since it might come out
    otherwise on another machine."""


PlanOf = Callable[[Mapping[str, Tensor]], Plan]
"""Scores, group -> `(structures,)` -> what the planner removes by them: ratio, shape, rounding and kinds are set."""

Learn = Callable[[Scoring, TrainingRun, PlanOf], Plan]
"""Trains on the steps of the run, and returns what is to be cut. It may write to the weights of structures that stay."""


@dataclass(frozen=True)
class Method:
    """Picks structures by a score, and takes them out in one of three ways: at once; `walks`: they shrink to zero while
    the rest learns; `learn`: by a training of its own, which starts from the score."""

    name: str
    reference: str
    """Where it was published."""
    score: Callable[[Scoring], Mapping[str, Tensor]]
    """Saliency of the structures of every group that it may cut, `(structures,)`, at least 0, higher is kept; sums over
    structures are compared per parameter saved."""
    kinds: tuple[PrunableKind, ...] = IN_LAYERS
    also: tuple[PrunableKind, ...] = ()
    """Kinds that it can score, too, and that go only where the settings name them."""
    by_variance: bool = False
    """Channels of the residual stream go by their variance alone; else what the loss would notice counts as much."""
    walks: bool = False
    learn: Learn | None = None
    adjust: Callable[[Graph, Mapping[str, Tensor]], dict[str, Tensor]] | None = None
    """What a walk does to the mix of criteria before the planner sees it."""
    prune: Mapping[str, Any] = field(default_factory=dict)
    """Settings of `prune` that the method wants otherwise than their defaults; what a user has changed stays."""
    saliency: SaliencySettings | None = None
    """Its mix of criteria, in place of the default one; what a user has changed stays."""

    @property
    def trains(self) -> bool:
        """Whether it spends a share of the token budget; else all of it is left to recovery."""
        return self.walks or self.learn is not None


def per_structure(graph: Graph, scores: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Scores that compare structure by structure, whatever each saves: times the parameters, which the planner divides by."""
    whole = graph.num_parameters
    return {name: score * (whole - graph.kept_parameters({name: (0,)})) for name, score in scores.items()}
