"""Using a model without changing it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


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


def synchronize(device: torch.device) -> None:
    """Waits until the device has done what was asked of it; the CPU always has."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
