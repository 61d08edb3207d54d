"""Depth pruning as in ShortGPT: whole layers go, those of least block influence first.

Block influence is 1 minus the cosine of the angle between what enters a decoder layer and what leaves it, averaged over
tokens: a layer that hardly turns the hidden states is hardly missed. All layers are judged at once, on the dense model.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from lorashear.evaluation.inference import run_through
from lorashear.pruning.methods.method import Method, Scoring
from lorashear.surgery.stepping import hidden_in, hidden_out


class _Angles:
    """Sum over tokens of the cosine between one module's input and output, `(batch, seq, hidden)` each."""

    def __init__(self, module: nn.Module) -> None:
        self.total, self.tokens = 0.0, 0
        self._entered = torch.empty(0)
        self._hooks = [
            module.register_forward_pre_hook(self._enter, with_kwargs=True),
            module.register_forward_hook(self._leave),
        ]

    @property
    def influence(self) -> float:
        """1 - mean cosine; rounding may take the cosine past 1."""
        return max(0.0, 1.0 - self.total / max(self.tokens, 1))

    def _enter(self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        # a copy, since a layer may add to its input in place
        entered = hidden_in(args, kwargs)
        assert entered is not None
        self._entered = entered.float().clone()

    def _leave(self, _module: nn.Module, _args: tuple[Any, ...], output: Any) -> None:
        cosines = functional.cosine_similarity(self._entered, hidden_out(output).float(), dim=-1)
        self.total += float(cosines.double().sum())
        self.tokens += cosines.numel()

    def remove(self) -> None:
        for hook in self._hooks:
            hook.remove()


def _block_influence(scoring: Scoring) -> dict[str, Tensor]:
    groups = [group for group in scoring.graph.prunable if group.layers]
    angles = {g.name: [_Angles(scoring.model.get_submodule(layer.module)) for layer in g.layers] for g in groups}
    try:
        run_through(
            scoring.model, scoring.windows, batch=scoring.batch, description="Block influence", dtype=scoring.dtype
        )
    finally:
        for each in (angle for layers in angles.values() for angle in layers):
            each.remove()
    return {name: torch.tensor([angle.influence for angle in layers]) for name, layers in angles.items()}


DEPTH = Method("depth", "https://arxiv.org/abs/2403.03853", _block_influence, kinds=("layers",))
