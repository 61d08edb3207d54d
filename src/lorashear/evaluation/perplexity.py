"""Perplexity per source on held-out windows."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lorashear.data.packing import TokenData
from lorashear.errors import DataError, ModelError
from lorashear.evaluation.inference import inference
from lorashear.progress import track

_LOGIT_BYTES = 2**28  # of one batch's logits, counted in float32
_CHUNK_BYTES = 2**25  # of the logits that are converted to float32 at a time
_MAX_BATCH = 16


@dataclass(frozen=True)
class Perplexity:
    """How well a model predicts held-out text; lower is better, 1 is certainty."""

    per_source: Mapping[str, float]
    """Source -> exp(mean loss over its predicted tokens)."""
    macro: float
    """exp(mean over sources of their log-perplexity): every source counts the same."""
    tokens: int
    """Tokens predicted, window - 1 a window."""
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for a JSON file."""
        return asdict(self)


def evaluate_perplexity(
    model: nn.Module,
    data: TokenData,
    *,
    batch_size: int | None = None,
    windows: int | None = None,
    progress: bool = True,
) -> Perplexity:
    """Measures the perplexity of every source on its held-out windows.

    Args:
        model: any causal language model; it runs in evaluation mode on the device it is on, and is left as it was.
        data: `TokenSource.valid` is used.
        batch_size: windows in a forward pass; None chooses by the size of the logits. It does not change the result
            beyond rounding.
        windows: only the first so many of each source.
        progress: show a bar when it takes long.

    Raises:
        ModelError: where a loss is NaN or infinite.
    """
    begin = time.perf_counter()
    losses = _losses(model, data, batch_size=batch_size, windows=windows, progress=progress)
    tokens = sum(len(source.valid[:windows]) for source in data.sources) * (data.window - 1)
    return Perplexity(
        per_source={name: _exp(loss) for name, loss in losses.items()},
        macro=_exp(sum(losses.values()) / len(losses)),
        tokens=tokens,
        seconds=time.perf_counter() - begin,
    )


def source_losses(
    model: nn.Module, data: TokenData, windows: int | None = None, *, batch_size: int | None = None
) -> dict[str, float]:
    """Mean loss in nats per predicted token, by source: what `evaluate_perplexity` takes the exponential of.

    Args:
        model: as in `evaluate_perplexity`.
        data: `TokenSource.valid` is used.
        windows: only the first so many of each source; None takes all.
        batch_size: windows in a forward pass; None chooses.

    Raises:
        ModelError: where a loss is NaN or infinite.
    """
    return _losses(model, data, batch_size=batch_size, windows=windows, progress=False)


def token_losses(logits: Tensor, input_ids: Tensor) -> Tensor:
    """Loss in nats of every predicted token, `(batch, seq - 1)` float32.

    Args:
        logits: `(batch, seq, vocabulary)`, of any float type. Chunks of them are converted to float32, since a softmax
            over a vocabulary loses digits in half precision and all of them at once can be larger than the model.
        input_ids: `(batch, seq)`.
    """
    predictions, targets = logits[:, :-1].flatten(0, 1), input_ids[:, 1:].flatten()
    rows = max(1, _CHUNK_BYTES // (4 * logits.shape[-1]))
    losses = [
        F.cross_entropy(some.float(), wanted, reduction="none")
        for some, wanted in zip(torch.split(predictions, rows), torch.split(targets, rows), strict=True)
    ]
    return torch.cat(losses).view(len(input_ids), -1)


def windows_per_pass(model: nn.Module, window: int) -> int:
    """Windows of `window` tokens that a forward pass takes: as many as bound its logits, its largest tensor, to 256 MB."""
    vocabulary = int(getattr(getattr(model, "config", None), "vocab_size", 0)) or 2**17
    return max(1, min(_MAX_BATCH, _LOGIT_BYTES // (4 * window * vocabulary)))


def _losses(
    model: nn.Module, data: TokenData, *, batch_size: int | None, windows: int | None, progress: bool
) -> dict[str, float]:
    if data.window < 2:
        raise DataError(f"a window of {data.window} tokens predicts nothing; raise data.window to 2 or more")
    held_out = {source.name: source.valid[:windows] for source in data.sources}
    size = batch_size or windows_per_pass(model, data.window)
    batches = [(name, batch) for name, valid in held_out.items() for batch in torch.split(valid, size)]
    sums = dict.fromkeys(held_out, 0.0)
    with inference(model) as device:
        for name, batch in track(batches, total=len(batches), description="Evaluating", show=progress):
            input_ids = batch.to(device)
            logits = model(input_ids=input_ids, use_cache=False).logits
            loss = token_losses(logits, input_ids).sum().item()
            if not math.isfinite(loss):
                raise ModelError(
                    f"the loss on source {name} is {loss}, expected a finite number; the weights are broken or "
                    "overflow in this dtype: load the model in float32 or bfloat16, and check what trained it last"
                )
            sums[name] += loss
    return {name: sums[name] / (len(valid) * (data.window - 1)) for name, valid in held_out.items()}


def _exp(loss: float) -> float:
    return math.exp(loss) if loss < 700 else math.inf  # a ruined model may lie beyond what a float holds
