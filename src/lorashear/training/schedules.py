"""Learning rates: how high, and how they change over a run."""

from __future__ import annotations

from math import cbrt, cos, pi, sqrt
from typing import Literal

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

_BATCH = 8  # windows a step


def constant_with_warmup(optimizer: Optimizer, *, warmup_steps: int = 10) -> LambdaLR:
    """Rises linearly over `warmup_steps` optimizer steps, the first at 1 / warmup_steps of the rate, then stays."""
    return LambdaLR(optimizer, lambda step: _warmup(step, warmup_steps))


def cosine_to(optimizer: Optimizer, *, steps: int, warmup_steps: int = 10, final_share: float = 0.05) -> LambdaLR:
    """Rises linearly over `warmup_steps`, then falls on half a cosine; the last of `steps` has `final_share` of it.

    The warm-up is at most a tenth of a run, so that a short one does not spend itself on it. A single step has the full
    rate.
    """
    warmup_steps = max(1, min(warmup_steps, steps // 10))

    def share(step: int) -> float:
        progress = min(1.0, max(0.0, (step - warmup_steps + 1) / max(1, steps - warmup_steps)))
        return _warmup(step, warmup_steps) * (final_share + (1 - final_share) * 0.5 * (1 + cos(pi * progress)))

    return LambdaLR(optimizer, share)


def _warmup(step: int, warmup_steps: int) -> float:
    return min(1.0, (step + 1) / max(1, warmup_steps))


def default_learning_rate(train: Literal["adapters", "all"], num_parameters: int, batch: int = _BATCH) -> float:
    """Peak rate of AdamW where the settings leave it open: 1e-3 for adapters up to 50 M parameters, 5e-4 for all weights up
    to 100 M.

    Above, it falls with the cube root of the size (adapters: 3.7e-4 at 1 B, 1.9e-4 at 7 B) or its square root (all
    weights: 1.6e-4 and 6e-5), after the rates that models of those sizes are usually fine-tuned with. All weights learn more
    slowly from less than 8 windows a step, in proportion: their gradients are noisier, and a rate that a long run makes
    good again undoes more than it teaches in a short one (measured on models of 3 M and 135 M, benchmarks/RESULTS.md).
    """
    if train == "adapters":
        return 1e-3 / cbrt(max(1.0, num_parameters / 50e6))
    return 5e-4 * min(1.0, batch / _BATCH) / sqrt(max(1.0, num_parameters / 100e6))
