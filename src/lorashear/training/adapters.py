"""LoRA adapters of stock peft on the decoder's linear layers: put on, and merged away."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from lorashear.config import LoraSettings
from lorashear.errors import ModelError


def adapter_targets(model: PreTrainedModel, *, layers_path: str | None = None) -> list[str]:
    """Paths of all linear layers inside the decoder layers, in order; the output head is never among them.

    The decoder layers are `layers_path` (`Graph.layers_path`) or, without it, the list of modules that holds the most
    parameters: experts and the like are lists too, but lie inside it.

    Raises:
        ModelError: where the model has no list of layers, or no linear layer in it.
    """
    path = _largest_list(model) if layers_path is None else layers_path
    layers = model.get_submodule(path)
    targets = [f"{path}.{name}" for name, module in layers.named_modules() if isinstance(module, nn.Linear | Conv1D)]
    if not targets:
        raise ModelError(
            f"no linear layer lies under {path} of {type(model).__name__}, so adapters have nothing to sit on; "
            'train all weights instead (train: "all")'
        )
    return targets


def _largest_list(model: nn.Module) -> str:
    """Path of the module list with the most parameters; of two equal ones the outer, which comes first."""
    sizes = {
        name: sum(parameter.numel() for parameter in module.parameters())
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList)
    }
    if not sizes:
        raise ModelError(
            f"{type(model).__name__} has no list of decoder layers (torch.nn.ModuleList); expected a causal language "
            "model"
        )
    return str(max(sizes, key=sizes.__getitem__))


def attach_lora(
    model: PreTrainedModel, settings: LoraSettings, targets: Sequence[str] | None = None, *, seed: int = 0
) -> PeftModel:
    """Wraps the model with LoRA on `targets` (paths; None: `adapter_targets`), initialised as stock peft does.

    B is zero, so the logits stay as they are. A, float32, is drawn from `seed`; torch's global generator is left as it
    was. Only the adapters are trainable afterwards.
    """
    targets = adapter_targets(model) if targets is None else targets
    config = LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,
        lora_dropout=0.0,
        target_modules=list(targets),
        bias="none",
        task_type="CAUSAL_LM",
    )
    with torch.random.fork_rng(), warnings.catch_warnings(), _targets_taken_literally(model):
        # peft corrects this option itself for each module, whichever value it is given
        warnings.filterwarnings("ignore", message="fan_in_fan_out is set")
        torch.manual_seed(seed)
        return get_peft_model(model, config)


@contextmanager
def _targets_taken_literally(model: PreTrainedModel) -> Iterator[None]:
    """Of some mixtures peft reads `gate_proj` and the like, wherever they lie, as the fused experts of transformers 5.

    It does so for adapters that were made with version 4, and goes by the configuration's `model_type`; ours name the
    modules as they are, and a dense layer or a shared expert is to have its own.
    """
    model.config.model_type = ""
    try:
        yield
    finally:
        del model.config.model_type  # the class has it


def merge_lora(model: PeftModel) -> PreTrainedModel:
    """Folds the adapters into the weights and returns the plain model, every parameter trainable again.

    Raises:
        ModelError: where something of peft is left, since such a model does not save as a plain checkpoint.
    """
    return _plain(model.merge_and_unload())


def drop_lora(model: PeftModel) -> PreTrainedModel:
    """Takes the adapters off, whatever they have learned, and returns the model as it was before them."""
    return _plain(model.unload())


def _plain(merged: PreTrainedModel) -> PreTrainedModel:
    left = [name for name, module in merged.named_modules() if type(module).__module__.startswith("peft.")]
    if left:
        raise ModelError(
            f"{len(left)} modules still belong to peft after merging (the first: {left[0]}); "
            "expected LoRA on linear layers only: attach adapters with lorashear.training.attach_lora"
        )
    for parameter in merged.parameters():
        parameter.requires_grad_(parameter.is_floating_point())  # a quantised base keeps integer weights
    return merged
