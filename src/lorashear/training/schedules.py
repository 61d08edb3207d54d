"""Learning rates: how high, and how they change over a run."""

from __future__ import annotations

from math import cos, pi
from typing import Literal

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

_SMALL_MODEL = 50_000_000
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
    """Peak rate of AdamW where the settings leave it open: 1e-3 for adapters, 5e-4 for all weights, at 50 M parameters.

    Above, it falls with the square root of the size (all weights: 1.1e-4 at 1 B, 4e-5 at 7 B) or its cube root
    (adapters: 3.7e-4 and 1.9e-4); below, that of all weights rises with the fourth root (1e-3 at 3 M). This follows the
    rates that models of those sizes are usually fine-tuned with. All weights learn more slowly from less than 8 windows a
    step, by the root of it: their gradients are noisier (measured on a model of 135 M, benchmarks/RESULTS.md).
    """
    excess = num_parameters / _SMALL_MODEL
    if train == "adapters":
        return 1e-3 / float(max(1.0, excess) ** (1 / 3))
    noise = float(min(1.0, batch / _BATCH) ** 0.5)
    return noise * 5e-4 / float(excess ** (1 / 2) if excess > 1.0 else excess ** (1 / 4))
