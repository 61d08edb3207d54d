"""Baselines that look at no text: the size of the weights, and chance."""

from __future__ import annotations

from torch import Tensor

from lorashear.analysis.saliency import random_scores, score
from lorashear.config import SaliencySettings
from lorashear.pruning.methods.method import Method, Scoring


def _magnitude(scoring: Scoring) -> dict[str, Tensor]:
    """Norm of all weights of a structure."""
    return score(scoring.model, scoring.graph, {}, SaliencySettings(taylor2=0.0, magnitude=1.0), groups=scoring.groups)


def _random(scoring: Scoring) -> dict[str, Tensor]:
    return random_scores(scoring.groups, scoring.seed)


MAGNITUDE = Method("magnitude", "https://arxiv.org/abs/1608.08710", _magnitude, also=("experts",))
RANDOM = Method("random", "https://arxiv.org/abs/1801.10447", _random, also=("experts",))
