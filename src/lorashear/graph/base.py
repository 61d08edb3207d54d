"""What lies inside peft's wrappers: the model, and its modules."""

from __future__ import annotations

from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn


def base_model(model: nn.Module) -> Any:
    """The model that peft's wrapper holds; any other model is its own."""
    unwrap = getattr(model, "get_base_model", None)
    return unwrap() if callable(unwrap) else model


def base_module(model: nn.Module, path: str) -> nn.Module:
    """The model's own module at a path, also where an adapter sits around it."""
    module = model.get_submodule(path)
    return module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
