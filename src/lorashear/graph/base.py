"""The model inside a wrapper."""

from __future__ import annotations

from typing import Any

from torch import nn


def base_model(model: nn.Module) -> Any:
    """The model that peft's wrapper holds; any other model is its own."""
    unwrap = getattr(model, "get_base_model", None)
    return unwrap() if callable(unwrap) else model
