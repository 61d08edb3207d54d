"""Moments of what enters the consumers of structures, feature by feature."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lorashear.evaluation.inference import run_through
from lorashear.graph.groups import Consumer
from lorashear.pruning.methods.method import Scoring


@dataclass
class Moments:
    """Sums over tokens of a module's input features, `(features,)` float64."""

    first: Tensor
    second: Tensor
    tokens: int = 0

    @property
    def mean_square(self) -> Tensor:
        """E[x^2]."""
        return self.second / max(self.tokens, 1)

    @property
    def variance(self) -> Tensor:
        """E[x^2] - E[x]^2."""
        return (self.mean_square - (self.first / max(self.tokens, 1)).square()).clamp(min=0.0)


def feature_moments(scoring: Scoring) -> dict[str, Moments]:
    """Consumer's module path -> moments of its input over the calibration windows."""
    consumers = {c.module: c for group in scoring.graph.gated for c in group.consumers}
    found = {path: Moments(_zeros(consumer), _zeros(consumer)) for path, consumer in consumers.items()}

    def gather(path: str) -> Any:
        def hook(_module: nn.Module, args: tuple[Any, ...]) -> None:
            features = args[0].detach().flatten(0, -2).double()
            found[path].first += features.sum(0).cpu()
            found[path].second += features.square().sum(0).cpu()
            found[path].tokens += len(features)

        return hook

    hooks = [scoring.model.get_submodule(path).register_forward_pre_hook(gather(path)) for path in found]
    try:
        run_through(scoring.model, scoring.windows, batch=scoring.batch, description="Saliency", dtype=scoring.dtype)
    finally:
        for hook in hooks:
            hook.remove()
    return found


def _zeros(consumer: Consumer) -> Tensor:
    return torch.zeros(consumer.features, dtype=torch.float64)


def features_first(scoring: Scoring, consumer: Consumer) -> Tensor:
    """The consumer's weight with its input features first, `(features, outputs)` float64."""
    name = consumer.parameter
    weight: Tensor = dict(scoring.model.named_parameters())[name].detach().double().cpu()
    axes = scoring.graph.parameters[name].axes
    dim = next(at for at, axis in enumerate(axes) if axis.root() is consumer.axis.root())
    return weight.movedim(dim, 0).flatten(1)
