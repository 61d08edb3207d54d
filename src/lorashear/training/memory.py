"""What fits: whether all weights can be trained, and how many windows go through the model at once.

Both estimates are deliberately coarse: weights are counted, activations are read off the linear layers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from lorashear.config import Train
from lorashear.devices import USABLE

_STATE_BYTES = 16  # a trained parameter: float32 weight, gradient, and AdamW's two moments
_GIB = 2**30


@dataclass(frozen=True)
class TrainChoice:
    """What learns, and why."""

    train: Literal["adapters", "all"]
    explanation: str
    """One sentence for the user: what is trained, and why."""


def activation_bytes(model: nn.Module) -> int:
    """Estimated bytes that one token occupies between forward and backward, in float32, without recomputation.

    Each linear layer keeps its input, and norms, activation functions and residual sums keep about as much again as it
    puts out. The output head's logits exist three times: as they are, as log-probabilities, and as a gradient.
    Attention scores are left out, since fused kernels do not keep them.
    """
    linears = [module for module in model.modules() if isinstance(module, nn.Linear | Conv1D)]
    features = sum(sum(module.weight.shape) for module in linears)
    head = model.get_output_embeddings() if isinstance(model, PreTrainedModel) else None
    logits = 2 * int(head.weight.shape[0]) if isinstance(head, nn.Linear) else 0
    return 4 * (features + logits)


def state_bytes(model: PreTrainedModel, *, train: Literal["adapters", "all"], autocast: bool) -> int:
    """Estimated bytes that training takes beside weights that are in memory, and beside activations.

    Where all weights train, gradients and AdamW's moments (and float32 weights). Under autocast the casts of float32 weights
    are kept for the backward pass.
    """
    loaded = sum(p.numel() * p.element_size() for p in model.parameters())
    casts = 2 * model.num_parameters() if autocast and (train == "all" or model.dtype == torch.float32) else 0
    return casts + (model.num_parameters() * _STATE_BYTES - loaded if train == "all" else 0)


def resolve_train(train: Train, model: PreTrainedModel, available_bytes: int, *, window: int = 256) -> TrainChoice:
    """Turns "auto" into "all" where the optimizer's state and one window's activations fit, else into "adapters".

    16 bytes are counted for each parameter (float32 weight, gradient, AdamW's moments), less the weights that are
    already in memory, and planned into 70 % of `available_bytes`.
    """
    if train != "auto":
        return TrainChoice(train, f"training {_name(train)}")
    loaded = sum(p.numel() * p.element_size() for p in model.parameters())
    wanted = model.num_parameters() * _STATE_BYTES - loaded + window * activation_bytes(model)
    usable = int(USABLE * available_bytes)
    choice: Literal["adapters", "all"] = "all" if wanted <= usable else "adapters"
    return TrainChoice(
        choice,
        f"training {_name(choice)}: all weights would take about {wanted / _GIB:.1f} GiB more, "
        f"and {usable / _GIB:.1f} GiB can be used (70 % of what is free)",
    )


def resolve_teacher(
    teacher: Literal["auto", "on", "off"],
    model: PreTrainedModel,
    available_bytes: int,
    *,
    train: Literal["adapters", "all"],
    item_bytes: int,
    window: int = 256,
) -> bool:
    """Whether a frozen copy of the model, of `item_bytes` a weight, is kept to learn from: "auto" goes by memory.

    What training itself takes is counted by `state_bytes`; a teacher in half precision means autocast.
    """
    if teacher != "auto":
        return teacher == "on"
    wanted = (
        state_bytes(model, train=train, autocast=item_bytes < torch.float32.itemsize)
        + model.num_parameters() * item_bytes
        + 2 * window * activation_bytes(model)
    )
    return bool(wanted <= int(USABLE * available_bytes))


def _name(train: Literal["adapters", "all"]) -> str:
    return "all weights" if train == "all" else "adapters"


def resolve_micro_batch(
    micro_batch: int | None, model: nn.Module, available_bytes: int, *, batch: int, window: int
) -> int:
    """Windows in one forward pass: as set, else the largest divisor of `batch` whose activations fit.

    Half of `available_bytes` is planned with, since gradients and the optimizer's state are not there yet when this is
    asked. At least 1, whatever the memory.
    """
    if micro_batch is not None:
        return micro_batch
    fitting = int(available_bytes * 0.5) // (window * activation_bytes(model))
    return max(size for size in range(1, batch + 1) if batch % size == 0 and size <= max(1, fitting))
