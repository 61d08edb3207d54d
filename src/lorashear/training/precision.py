"""Number formats of training: which autocast, and float32 masters for weights that are trained."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from time import perf_counter

import torch
from torch import Tensor, nn

from lorashear.config import Dtype
from lorashear.evaluation.inference import autocast, input_gradients

logger = logging.getLogger(__name__)

_TRIES = 3
_TIME_LIMIT = 2.0  # seconds for each format
_WORTHWHILE = 0.9  # share of the float32 time below which bfloat16 pays for its coarser numbers


def resolve_dtype(dtype: Dtype, model: nn.Module, sample_batch: Tensor) -> torch.dtype | None:
    """Autocast format of training: `torch.bfloat16`, or None for none.

    "auto" takes bfloat16 where the weights are held in it, and on a GPU that has it. On a CPU some are faster with it and
    others emulate it slowly, so the two are timed on `sample_batch`, `(micro_batch, window)` int64 token ids: three passes of
    each, fewer where they take longer than 2 s. The choice is logged. It depends on a measurement: a run that is to be
    repeated exactly has to record it.
    """
    if dtype == "float32":
        return None
    if dtype == "bfloat16":
        return torch.bfloat16
    weight = next(model.parameters())
    device = weight.device
    if weight.dtype == torch.bfloat16:
        logger.info("training in bfloat16, which the weights are held in")
        return torch.bfloat16
    if device.type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
        logger.info("training in %s: this GPU %s bfloat16", *(("bfloat16", "has") if fast else ("float32", "lacks")))
        return torch.bfloat16 if fast else None
    if device.type != "cpu":
        logger.info("training in float32: bfloat16 is not measured on %s", device.type)
        return None
    plain = _seconds(model, sample_batch.to(device), None)
    half = _seconds(model, sample_batch.to(device), torch.bfloat16)
    chosen = torch.bfloat16 if half < _WORTHWHILE * plain else None
    logger.info(
        "training in %s: a pass takes %.2f s in float32 and %.2f s in bfloat16 here",
        "float32" if chosen is None else "bfloat16",
        plain,
        half,
    )
    return chosen


def _seconds(model: nn.Module, input_ids: Tensor, dtype: torch.dtype | None) -> float:
    """Fastest of a few forward and backward passes; no weight gathers a gradient, which would take as much memory again."""
    best, spent = float("inf"), 0.0
    with input_gradients(model):
        for _ in range(_TRIES):
            start = perf_counter()
            with autocast("cpu", dtype):
                loss = model(input_ids=input_ids, labels=input_ids, use_cache=False).loss
            loss.backward()
            best, spent = min(best, perf_counter() - start), spent + perf_counter() - start
            if spent > _TIME_LIMIT:
                break
    return best


@contextmanager
def full_precision_weights(model: nn.Module) -> Iterator[None]:
    """Inside, trainable parameters are float32; afterwards they are what they were.

    A late step of AdamW changes a weight by about a ten-thousandth, which bfloat16 with its 8 bits rounds away.
    Parameters are converted in place, so make the optimizer inside.
    """
    before = {
        parameter: parameter.dtype
        for parameter in model.parameters()
        if parameter.requires_grad and parameter.dtype in (torch.bfloat16, torch.float16)
    }
    for parameter in before:
        parameter.data = parameter.data.float()
    try:
        yield
    finally:
        for parameter, dtype in before.items():
            parameter.grad = None
            parameter.data = parameter.data.to(dtype)
