"""Teaching the full model the text before it is cut, where the text is new to it.

A small model that is recovered on text which the full one was not made for has two things to learn, and its teacher knows
only one of them. So the full model learns first, on adapters; what is cut, and what is learned from, is the model that
came out. (Known as teacher correction: Minitron, arXiv 2408.11796.)
"""

# ruff: noqa: ARG002 -- callbacks take what Trainer hands them
from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from lorashear.config import AdaptSettings, CompressSettings
from lorashear.data.packing import TokenData
from lorashear.recovery.mixture import MixtureDataset, proportional_weights
from lorashear.recovery.recover import deviation_losses, fine_tune
from lorashear.training import (
    attach_lora,
    default_learning_rate,
    drop_lora,
    merge_lora,
)

logger = logging.getLogger(__name__)

STAGE = "adapt"
"""Names the stage's checkpoints and its lines in the metrics."""
SHARE = 0.3
"""Share of the token budget where the settings leave it open and the text is new to the model."""
TRIAL = 0.025
"""Share of the token budget after which it is decided whether the text is new."""
LEAST_TRIAL = 12
"""Optimizer steps of a trial, at least: fewer are still the rise of the learning rate."""
NEW = 0.02
"""Nats per token, mean over the sources as they weigh, that a trial has to gain for the text to count as new."""


@dataclass(frozen=True)
class AdaptResult:
    """What the full model learned."""

    model: PreTrainedModel
    """Plain: adapters are merged, or dropped where they brought nothing."""
    tokens: int
    """Training tokens used."""
    gain: float | None
    """Nats per token, mean over the sources as they weigh, that the trial gained; None where there was none."""
    kept: bool
    """Whether the model is another one now."""
    seconds: float


def adapt_steps(settings: AdaptSettings, steps: int) -> int:
    """Optimizer steps, at most, that adapting takes of `steps` that the budget pays for."""
    return round(steps * (SHARE if settings.share is None else settings.share))


def adapt_model(
    model: PreTrainedModel,
    data: TokenData,
    *,
    target: Mapping[str, float],
    settings: CompressSettings,
    steps: int,
    out: Path,
    dtype: torch.dtype | None = None,
    resume: bool = False,
    checkpoint_every: int | None = None,
    progress: bool = True,
) -> AdaptResult:
    """Trains adapters on the whole model and merges them; stops early, and drops them, where the text is nothing new.

    Args:
        model: the full model, without adapters; changed in place.
        data: sources, drawn from in proportion to their sizes, times what each counts.
        target: its loss per source, as `recover_model` takes it; what follows `steps` is that function's, too.
        settings: all stages'; `adapt`, `lora`, `batch`, `seed` are used.
        steps: optimizer steps that the whole budget pays for.

    Raises:
        TrainingError: when the loss is no longer finite.
    """
    start = perf_counter()
    own = adapt_steps(settings.adapt, steps)
    trial = None if settings.adapt.share is not None else max(LEAST_TRIAL, round(TRIAL * steps))
    if own < 1 or (trial is not None and trial >= own):
        return AdaptResult(model, 0, None, False, 0.0)
    learner = attach_lora(model, settings.lora, seed=settings.seed)
    parameters = sum(p.numel() for p in model.parameters())
    rate = settings.adapt.learning_rate or default_learning_rate("adapters", parameters)
    watch = Trial(learner, data, target, trial)
    mixture = MixtureDataset(
        data.sources, proportional_weights(data.sources), num_samples=own * settings.batch, seed=settings.seed + 2
    )
    result = fine_tune(
        learner, mixture, rate=rate, settings=settings, name=STAGE, steps=own, out=out, dtype=dtype, callbacks=[watch],
        resume=resume, checkpoint_every=checkpoint_every, progress=progress,
    )  # fmt: skip
    plain = merge_lora(learner) if watch.pays else drop_lora(learner)
    return AdaptResult(plain, result.tokens, watch.gain, watch.pays, perf_counter() - start)


class Trial(TrainerCallback):  # type: ignore[misc]
    """Measures once what the first steps gained and stops a run that is not worth going on; without a step to measure at,
    every run is. What it found is part of the Trainer's checkpoints."""

    def __init__(self, model: nn.Module, data: TokenData, target: Mapping[str, float], step: int | None) -> None:
        self.model, self.data, self.target, self.step = model, data, target, step
        self.gain: float | None = None

    @property
    def pays(self) -> bool:
        """Whether the text is new to the model, as far as was measured."""
        return self.gain is None or self.gain >= NEW

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """A resumed run takes up what was found before."""
        self.gain = next((entry["gain"] for entry in state.log_history if "gain" in entry), None)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Measures at the end of the trial."""
        if state.global_step != self.step:
            return
        losses = deviation_losses(self.model, self.data)
        weights = self.data.weights
        self.gain = sum(weights[name] * (self.target[name] - losses[name]) for name in losses) / sum(weights.values())
        state.log_history.append({"gain": self.gain, "step": self.step})
        control.should_training_stop = control.should_training_stop or not self.pays
        logger.info(
            "adapt: %d steps on the full model gain %.3f nats per token, so %s",
            self.step,
            self.gain,
            "it goes on learning" if self.pays else "it knows this text, and is cut as it is",
        )
