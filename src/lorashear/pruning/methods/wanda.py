"""Wanda-sp: Wanda's |weight| x norm of the input, averaged over outputs and summed over a structure's features
(the structured version that FLAP compares with)."""

from __future__ import annotations

import torch
from torch import Tensor

from lorashear.pruning.methods.activations import feature_moments, features_first
from lorashear.pruning.methods.method import Method, Scoring


def _wanda(scoring: Scoring) -> dict[str, Tensor]:
    moments = feature_moments(scoring)
    scores = {}
    for group in scoring.graph.gated:
        total = torch.zeros(group.size, dtype=torch.float64)
        for consumer in group.consumers:
            norm = moments[consumer.module].mean_square.sqrt()
            metric = features_first(scoring, consumer).abs().mean(1) * norm
            total += metric[consumer.rows].sum(1)
        scores[group.name] = total.float()
    return scores


WANDA_SP = Method("wanda-sp", "https://arxiv.org/abs/2306.11695", _wanda)
