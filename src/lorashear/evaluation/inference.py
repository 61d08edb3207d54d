"""Using a model without changing it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from lorashear.progress import track
from lorashear.training.precision import autocast


@contextmanager
def inference(model: nn.Module) -> Iterator[torch.device]:
    """Evaluation mode and no gradients inside; afterwards every module is back in the mode it was in.

    Yields:
        The device of the model's first parameter, which its inputs go to.
    """
    was_training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.inference_mode():
            yield next(model.parameters()).device
    finally:
        for module in was_training:
            module.training = True


def run_through(
    model: nn.Module,
    windows: Tensor,
    *,
    batch: int,
    description: str,
    dtype: torch.dtype | None = None,
    progress: bool = True,
) -> None:
    """Forward passes over token ids `(samples, window)`, for what hooks see of them.

    Args:
        model: left as it was.
        windows: what it reads.
        batch: windows in a pass.
        description: of the bar, which is shown when it takes long.
        dtype: autocast.
        progress: whether there is a bar at all.
    """
    parts = torch.split(windows, batch)
    with inference(model) as device, autocast(device.type, dtype):
        for part in track(parts, total=len(parts), description=description, show=progress):
            model(input_ids=part.to(device), use_cache=False)


def synchronize(device: torch.device) -> None:
    """Waits until the device has done what was asked of it; the CPU always has."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
