"""Cached prefixes: a forward pass that starts at a later decoder layer.

Whatever is probed in decoder layer l leaves the layers before it as they are. `record` keeps what every layer returned
in one ordinary pass; `replayed` then lets the earlier layers return their record at once, inside the model's own
forward, so that masks, rotary tables, the final norm and the head stay the model's business and no architecture is
known here.
Cost: probing every layer takes (L + 1) / 2L of the layer calls; memory: one batch of hidden states per layer.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


@torch.no_grad()
def record(layers: Sequence[nn.Module], run: Callable[[], Tensor]) -> tuple[Tensor, list[Any] | None]:
    """Calls `run` once; returns its result and what each layer returned, a `(batch, seq, hidden)` tensor or a tuple.

    The record is None where the layers did not run once each and in order, so that no prefix can stand for them.
    """
    calls: list[tuple[int, Any]] = []

    def remember(index: int) -> Callable[..., None]:
        return lambda _module, _args, output: calls.append((index, _copy(output)))

    handles = [layer.register_forward_hook(remember(index)) for index, layer in enumerate(layers)]
    try:
        result = run()
    finally:
        for handle in handles:
            handle.remove()
    in_order = [index for index, _ in calls] == list(range(len(layers)))
    return result, [output for _, output in calls] if in_order else None


@contextmanager
def replayed(layers: Sequence[nn.Module], outputs: Sequence[Any], start: int) -> Iterator[None]:
    """Inside the context, layers before `start` return their recorded outputs instead of computing them."""
    overridden = [(layer, layer.__dict__.get("forward")) for layer in layers[:start]]

    def replay(output: Any) -> Callable[..., Any]:
        return lambda *_args, **_kwargs: _copy(output)  # a copy: the next layer may add to its input in place

    for (layer, _), output in zip(overridden, outputs, strict=False):
        layer.__dict__["forward"] = replay(output)
    try:
        yield
    finally:
        for layer, forward in overridden:
            if forward is None:
                del layer.__dict__["forward"]
            else:  # offloading hooks live there
                layer.__dict__["forward"] = forward


@torch.no_grad()
def replay_starts(layers: Sequence[nn.Module], run: Callable[[], Tensor]) -> list[int]:
    """For each layer the latest start, at most itself, from which a replay gives the same result as `run` itself.

    Layers may pass more to each other than their outputs (key/value states shared between layers, a common cache): such
    a start is found out by trying it, on a `run` that should be short, and the nearest earlier one is used instead.
    Warns once where that makes probes dearer.
    """
    expected, outputs = record(layers, run)
    if outputs is None:
        warnings.warn("cached prefixes are not used: the decoder layers do not run once each, in order", stacklevel=2)
        return [0] * len(layers)
    starts = [0]
    for start in range(1, len(layers)):
        starts.append(start if _replays(layers, outputs, start, run, expected) else starts[-1])
    if starts != list(range(len(layers))):
        warnings.warn(
            f"cached prefixes are used for layers {sorted(set(starts))} only: later layers need more of the earlier "
            "ones than their outputs",
            stacklevel=2,
        )
    return starts


def _replays(
    layers: Sequence[nn.Module], outputs: Sequence[Any], start: int, run: Callable[[], Tensor], expected: Tensor
) -> bool:
    try:
        with replayed(layers, outputs, start):
            found = run()
    except Exception:  # what a layer misses of the skipped ones shows as an error of any type; the answer is the same
        return False
    return torch.allclose(found, expected, rtol=1e-4, atol=1e-4, equal_nan=True)


def _copy(output: Any) -> Any:
    if isinstance(output, Tensor):
        return output.clone()
    if isinstance(output, tuple):
        return tuple(_copy(part) for part in output)
    return output
