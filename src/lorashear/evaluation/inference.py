"""Using a model without changing it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lorashear.progress import track


@contextmanager
def evaluation(model: nn.Module) -> Iterator[torch.device]:
    """Evaluation mode inside; afterwards every module is back in the mode it was in.

    Yields:
        The device of the model's first parameter, which its inputs go to.
    """
    was_training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield next(model.parameters()).device
    finally:
        for module in was_training:
            module.training = True


@contextmanager
def inference(model: nn.Module) -> Iterator[torch.device]:
    """As `evaluation`, and without gradients."""
    with evaluation(model) as device, torch.inference_mode():
        yield device


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


def run_back(
    model: nn.Module,
    windows: Tensor,
    *,
    batch: int,
    description: str,
    dtype: torch.dtype | None = None,
    progress: bool = True,
) -> None:
    """Forward and backward passes of the language-model loss, for what hooks see of activations and their gradients.

    Takes what `run_through` takes; inside `input_gradients` no weight gathers one.
    """
    parts = torch.split(windows, batch)
    with evaluation(model) as device, torch.enable_grad():
        for part in track(parts, total=len(parts), description=description, show=progress):
            input_ids = part.to(device)
            with autocast(device.type, dtype):
                loss = model(input_ids=input_ids, labels=input_ids, use_cache=False).loss
            loss.backward()


@contextmanager
def autocast(device_type: str, dtype: torch.dtype | None, *, keeps_casts: bool = True) -> Iterator[None]:
    """`torch.autocast` in `dtype`; does nothing for None. Where weights change inside, casts of them must not be kept."""
    with torch.autocast(device_type, dtype=dtype, enabled=dtype is not None, cache_enabled=keeps_casts):
        yield


@contextmanager
def input_gradients(model: nn.Module) -> Iterator[None]:
    """Gradients flow through the model from its embeddings on, while no weight gathers any."""
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    embeddings = model.get_input_embeddings()  # type: ignore[operator]

    def require(_module: nn.Module, _args: Any, output: Tensor) -> Tensor:
        return output.detach().requires_grad_().clone()  # which the model may change in place

    hook = embeddings.register_forward_hook(require)
    try:
        for parameter, _ in flags:
            parameter.requires_grad_(False)
        yield
    finally:
        hook.remove()
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


def synchronize(device: torch.device) -> None:
    """Waits until the device has done what was asked of it; the CPU always has."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
