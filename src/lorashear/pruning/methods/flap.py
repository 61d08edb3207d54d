"""FLAP: how much a consumer's input fluctuates, times the squared norm of the weights that read it, standardised layer
by layer and compared over all layers.

The published method adds to a consumer's bias what it loses in the mean; most of today's models have no biases there, and
one that is added counts against the ratio, so this is left out.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lorashear.graph.groups import NodeGroup
from lorashear.pruning.methods.activations import feature_moments, features_first
from lorashear.pruning.methods.method import Method, Scoring


def _flap(scoring: Scoring) -> dict[str, Tensor]:
    moments = feature_moments(scoring)
    standard: dict[str, Tensor] = {}
    for group in scoring.graph.gated:
        total = torch.zeros(group.size, dtype=torch.float64)
        for consumer in group.consumers:
            metric = moments[consumer.module].variance * features_first(scoring, consumer).square().sum(1)
            metric = (metric - metric.mean()) / metric.std().clamp(min=1e-12)
            total += metric[consumer.rows].mean(1)
        standard[group.name] = total
    # a threshold over all layers: the planner compares scores per parameter, and those from 0 upwards
    least = min(float(score.min()) for score in standard.values())
    return {
        group.name: ((standard[group.name] - least) * _parameters(scoring, group)).float()
        for group in scoring.graph.gated
    }


def _parameters(scoring: Scoring, group: NodeGroup) -> int:
    return scoring.graph.num_parameters - scoring.graph.kept_parameters({group.name: (0,)})


FLAP = Method("flap", "https://arxiv.org/abs/2312.11983", _flap)
