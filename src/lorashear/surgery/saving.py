"""Write a small model and read it back: safetensors and config.json, nothing else."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from lorashear.errors import ModelError
from lorashear.graph.geometry import set_value
from lorashear.surgery.changes import LORASHEAR_KEY


def save(model: PreTrainedModel, tokenizer: Any, folder: str | Path) -> None:
    """Saves model, tokenizer, chat template and generation settings as transformers does.

    A model whose layers are equal loads with stock `AutoModelForCausalLM.from_pretrained`; one whose layers differ with
    `lorashear.load` (stock code refuses it because of its sizes).
    """
    model.save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)


def load(folder: str | Path, *, dtype: torch.dtype | str = "auto", **options: Any) -> PreTrainedModel:
    """Loads a model that lorashear saved, of either shape, from its safetensors and config.json.

    Args:
        folder: e.g. `runs/x/model`.
        dtype: that of the weights; "auto" takes the one they were saved in.
        **options: handed to `from_pretrained` (`device_map`, ...).

    Raises:
        ModelError: for a folder that is missing or holds no config.json.
    """
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise ModelError(f"{folder}: no config.json in it; give the folder of a saved model, e.g. RUN/model")
    note = json.loads(path.read_text(encoding="utf-8")).get(LORASHEAR_KEY)
    if note is None:
        return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, use_safetensors=True, **options)
    return load_per_layer(folder, dtype=dtype, **options)


def load_per_layer(folder: str | Path, *, dtype: torch.dtype | str = "auto", **options: Any) -> PreTrainedModel:
    """Loads a model whose layers have widths of their own."""
    config = AutoConfig.from_pretrained(folder)
    model_class = per_layer_class(config)
    return model_class.from_pretrained(folder, config=config, dtype=dtype, use_safetensors=True, **options)


def per_layer_class(config: Any) -> Any:
    """The class of a model whose configuration notes its layers' own widths; builds it without weights on meta."""
    note = getattr(config, LORASHEAR_KEY)
    if type(config) not in AutoModelForCausalLM._model_mapping:
        raise ModelError(
            f"transformers' Auto classes know no causal language model for {type(config).__name__}; build its class "
            "yourself, cut it again with the saved plan, and load the weights into it"
        )
    stock = AutoModelForCausalLM._model_mapping[type(config)]
    return _with_own_layers(stock, note)


def _with_own_layers(stock: Any, note: dict[str, Any]) -> Any:
    """The stock class, except that some layers are built from a configuration of their own, and that some parameters and
    attributes have sizes that no configuration can tell.

    `from_pretrained` of the result does all the rest: shards, dtypes, devices, ties, buffers.
    """

    def init(self: Any, config: Any, *args: Any, **kwargs: Any) -> None:
        stock.__init__(self, config, *args, **kwargs)
        if note["per_layer"]:
            _build_layers_(self, stock, config, note["layers_path"], note["per_layer"])
        for name, shape in note.get("sizes", {}).items():
            _resize_(self, name, shape)
        for path, numbers in note.get("attributes", {}).items():
            for name, value in numbers.items():
                setattr(self.get_submodule(path), name, value)
        tied = getattr(self, "all_tied_weights_keys", None) or {}
        if set(note.get("sizes", {})) & {*tied, *tied.values()}:
            self.tie_weights()

    return type(stock.__name__, (stock,), {"__init__": init, "__module__": stock.__module__})


def _build_layers_(model: Any, stock: Any, config: Any, layers_path: str, per_layer: dict[str, dict[str, Any]]) -> None:
    layers = model.get_submodule(layers_path)
    assert isinstance(layers, nn.ModuleList)
    variants: dict[str, Any] = {}
    for layer, overrides in per_layer.items():
        key = json.dumps(overrides, sort_keys=True)
        if key not in variants:
            own = copy.deepcopy(config)
            for name, value in overrides.items():
                set_value(own, name, value)
            variants[key] = own
        old = layers[int(layer)]
        layers[int(layer)] = stock(variants[key]).get_submodule(f"{layers_path}.{layer}")
        for path, module in layers[
            int(layer)
        ].named_modules():  # one configuration object for all, as stock code has it
            if hasattr(module, "config"):
                module.config = old.get_submodule(path).config


def _resize_(model: nn.Module, name: str, shape: list[int]) -> None:
    path, _, last = name.rpartition(".")
    module = model.get_submodule(path)
    old = getattr(module, last)
    if isinstance(old, nn.Parameter):
        setattr(module, last, nn.Parameter(torch.empty(shape, dtype=old.dtype, device=old.device), old.requires_grad))
    else:
        setattr(module, last, old.new_empty(shape))
