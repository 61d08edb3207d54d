"""Checkpoints of a running stage: found, checked, deleted; and the weights in them.

A checkpoint is what transformers' Trainer writes (optimizer, schedule, generators, its own state) with one exception:
the weights. Trainer asks peft or the model to save themselves, which loses whatever else is being changed (gates, base
weights that shrink) and writes frozen weights again and again; here one safetensors file holds what can change.
"""

from __future__ import annotations

import shutil
from json import JSONDecodeError, loads
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lorashear.errors import OutputError

_WEIGHTS = "changed.safetensors"
_STATE = "trainer_state.json"  # the last file that Trainer writes


def checkpoints_folder(out: Path, name: str) -> Path:
    """Folder of the checkpoints of the stage `name` in the run folder `out`."""
    return out / "checkpoints" / name


def discard_checkpoints(out: Path, name: str | None = None) -> None:
    """Deletes the checkpoints of one stage, or of all stages of the run; none there is no error."""
    folder = out / "checkpoints"
    if name is not None:
        shutil.rmtree(folder / name, ignore_errors=True)
    if folder.is_dir() and (name is None or not any(folder.iterdir())):
        shutil.rmtree(folder)


def last_checkpoint(out: Path, name: str) -> tuple[Path, int] | None:
    """Newest complete checkpoint of a stage and its step; None where there is none.

    A checkpoint that a kill cut short is passed over and deleted.
    """
    found: dict[int, Path] = {}
    for folder in checkpoints_folder(out, name).glob("checkpoint-*"):
        step = _saved_step(folder)
        if step is None:
            shutil.rmtree(folder)
        else:
            found[step] = folder
    return (found[max(found)], max(found)) if found else None


def _saved_step(folder: Path) -> int | None:
    try:
        step: int = loads((folder / _STATE).read_text(encoding="utf-8"))["global_step"]
    except (FileNotFoundError, JSONDecodeError):
        return None
    return step


def _changing(model: nn.Module, frozen_too: bool) -> dict[str, Tensor]:
    """Parameters (tied ones once) and saved buffers by name; frozen parameters only where asked."""
    saved = model.state_dict(keep_vars=True)
    changing = {name: p.data for name, p in model.named_parameters() if p.requires_grad or frozen_too}
    changing.update((name, buffer) for name, buffer in model.named_buffers() if name in saved)
    return changing


def save_changing(model: nn.Module, folder: Path, *, frozen_too: bool) -> None:
    """Writes trainable parameters and buffers, with `frozen_too` all parameters, into a checkpoint."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: value.contiguous() for name, value in _changing(model, frozen_too).items()}, folder / _WEIGHTS)


@torch.no_grad()
def load_changing(model: nn.Module, folder: Path, *, frozen_too: bool) -> None:
    """Copies the weights of a checkpoint into the model, in place.

    Raises:
        OutputError: where the checkpoint was written by a run with other parameters.
    """
    saved, changing = load_file(folder / _WEIGHTS), _changing(model, frozen_too)
    differing = [
        name
        for name in sorted(saved.keys() | changing.keys())
        if name not in saved or name not in changing or saved[name].shape != changing[name].shape
    ]
    if differing:
        raise OutputError(
            f"{folder}: the checkpoint does not fit this run, {len(differing)} parameters differ (the first: "
            f"{differing[0]}); resume with the model and the settings it was started with, or start in a new folder"
        )
    for name, value in saved.items():
        changing[name].copy_(value)
