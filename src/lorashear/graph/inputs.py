"""What a model is run on to be traced: small made-up inputs of the kind that its `forward` takes."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from lorashear.graph.base import base_model

TOKENS = 13
"""Length of the traced run; a prime that meets no width of a real model by accident."""

IMAGE = 32
"""Side of a made-up image, in pixels, where the configuration names none."""


def example_inputs(model: nn.Module, *, batch: int = 1, length: int = TOKENS) -> dict[str, Tensor]:
    """Inputs by name: token ids `(batch, length)`, with decoder ids besides for an encoder-decoder; or pixels."""
    base = base_model(model)
    config: Any = getattr(base, "config", None)
    takes = inspect.signature(base.forward).parameters
    main = getattr(base, "main_input_name", "input_ids")
    if main == "pixel_values" and "input_ids" not in takes:
        side = getattr(config, "image_size", IMAGE)
        sides = tuple(side) if isinstance(side, (list, tuple)) else (side, side)
        return {"pixel_values": torch.zeros(batch, getattr(config, "num_channels", 3), *sides)}
    inputs = {"input_ids": _tokens(config, batch, length)}
    if getattr(config, "is_encoder_decoder", False) and "decoder_input_ids" in takes:
        inputs["decoder_input_ids"] = _tokens(config, batch, length - 2)
    return inputs


def _tokens(config: Any, batch: int, length: int) -> Tensor:
    """Ids that are no special tokens where the vocabulary has room for others."""
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    vocabulary = int(getattr(text, "vocab_size", None) or TOKENS + 1)
    first = 8 if vocabulary > length * batch + 8 else 0
    return (torch.arange(batch * length).reshape(batch, length) + first).remainder(vocabulary)
