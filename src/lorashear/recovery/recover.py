"""The recovery stage: fine-tune back what was lost, most where most is missing (paper: dynamic knowledge recovery).

Two stages, general text and then instructions, each in rounds. Before a round the loss of every source is compared with
the full model's; the round draws its windows in proportion to what is missing, above a floor for all sources. One
learning rate schedule spans both stages.
"""

# ruff: noqa: ARG002 -- callbacks take what Trainer hands them
from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from lorashear.config import CompressSettings, RecoverSettings
from lorashear.data.packing import TokenData, TokenSource
from lorashear.devices import available_bytes
from lorashear.errors import SettingsError
from lorashear.evaluation.perplexity import source_losses
from lorashear.recovery.mixture import MixtureDataset, deviation_weights, proportional_weights
from lorashear.training import (
    Teacher,
    TrainJob,
    TrainResult,
    attach_lora,
    cosine_to,
    default_learning_rate,
    full_precision_weights,
    merge_lora,
    resolve_micro_batch,
    resolve_train,
    train,
)

logger = logging.getLogger(__name__)

STAGE = "recover"
"""Names the stage's checkpoints and its lines in the metrics."""
_GENERAL, _INSTRUCTION = "pretraining", "instruction"
_IMPROVEMENT = 1e-3  # nats per token, mean over a stage's sources: less is taken for noise
MEASURED_WINDOWS = 8
"""Held-out windows per source that the deviation is measured on before a round."""


@dataclass(frozen=True)
class Round:
    """What was measured at the start of a round, and what followed from it."""

    stage: str
    """"pretraining" or "instruction"."""
    first_step: int
    deviation: dict[str, float]
    """Source -> loss behind the full model, nats per token."""
    weights: dict[str, float]
    """Source -> share of the round's windows."""


@dataclass(frozen=True)
class RecoverResult:
    """A recovered model, and how it came about."""

    model: PreTrainedModel
    """Plain: adapters are merged."""
    rounds: tuple[Round, ...]
    tokens: int
    """Training tokens used."""
    seconds: float

    def log(self) -> list[dict[str, Any]]:
        """The rounds as plain data."""
        return [asdict(each) for each in self.rounds]


def recover_model(
    model: PreTrainedModel,
    data: TokenData,
    *,
    target: Mapping[str, float],
    settings: CompressSettings,
    steps: int,
    out: Path,
    dtype: torch.dtype | None = None,
    teacher: Teacher | None = None,
    name: str = STAGE,
    resume: bool = False,
    checkpoint_every: int | None = None,
    progress: bool = True,
) -> RecoverResult:
    """Trains adapters or all weights of a cut model.

    Args:
        model: without adapters; changed in place.
        data: sources to draw from.
        target: the full model's loss per source on the windows that `deviation_losses` looks at, nats per token.
        settings: all stages'; `recover`, `lora`, `batch`, `seed` are used.
        steps: optimizer steps of both stages together.
        out: run folder, for metrics and checkpoints.
        dtype: autocast.
        teacher: the full model, to learn from beside the text.
        name: of the stage in metrics and checkpoints.
        resume: go on from the newest checkpoint.
        checkpoint_every: steps between checkpoints.
        progress: show bars.

    Raises:
        SettingsError: when there is not a single step.
        TrainingError: when the loss is no longer finite.
    """
    if steps < 1:
        raise SettingsError(f"{name}: no optimizer step is left for it; give more tokens or a smaller prune.share")
    start = perf_counter()
    choice = resolve_train(settings.recover.train, model, available_bytes(model.device), window=data.window)
    logger.info("%s: %s", name, choice.explanation)
    learner: nn.Module = attach_lora(model, settings.lora, seed=settings.seed) if choice.train == "adapters" else model
    parameters = sum(p.numel() for p in model.parameters())
    rate = settings.recover.learning_rate or default_learning_rate(choice.train, parameters, settings.batch)
    mixture = MixtureDataset(
        data.sources, proportional_weights(data.sources), num_samples=steps * settings.batch, seed=settings.seed + 1
    )
    rounds = Rounds(learner, data, mixture, target, settings, steps)
    result = fine_tune(
        learner, mixture, rate=rate, settings=settings, name=name, steps=steps, out=out, dtype=dtype, callbacks=[rounds],
        teacher=teacher, resume=resume, checkpoint_every=checkpoint_every, progress=progress,
    )  # fmt: skip
    plain = merge_lora(learner) if choice.train == "adapters" else model
    return RecoverResult(plain, tuple(rounds.rounds), result.tokens, perf_counter() - start)


def fine_tune(
    learner: nn.Module,
    mixture: MixtureDataset,
    *,
    rate: float,
    settings: CompressSettings,
    name: str,
    steps: int,
    out: Path,
    dtype: torch.dtype | None,
    callbacks: Sequence[TrainerCallback],
    teacher: Teacher | None = None,
    resume: bool = False,
    checkpoint_every: int | None = None,
    progress: bool = True,
) -> TrainResult:
    """AdamW without decay on whatever of `learner` is trainable, at a rate that falls from `rate` on a cosine; the rest as
    in `recover_model`."""
    with full_precision_weights(learner):
        optimizer = torch.optim.AdamW([p for p in learner.parameters() if p.requires_grad], lr=rate, weight_decay=0.0)
        free, window = available_bytes(next(learner.parameters()).device), len(mixture[0]["input_ids"])
        job = TrainJob(
            name=name,
            steps=steps,
            batch=settings.batch,
            micro_batch=resolve_micro_batch(settings.micro_batch, learner, free, batch=settings.batch, window=window),
            seed=settings.seed,
            out=out,
            dtype=dtype,
            checkpoint_every=checkpoint_every,
            resume=resume,
            progress=progress,
        )
        scheduler = cosine_to(optimizer, steps=steps)
        return train(
            learner, mixture, optimizer=optimizer, scheduler=scheduler, job=job, callbacks=callbacks, teacher=teacher
        )


def deviation_losses(model: nn.Module, data: TokenData) -> dict[str, float]:
    """Loss per source, nats per token, on the few held-out windows that rounds are steered by."""
    return source_losses(model, data, MEASURED_WINDOWS)


@dataclass(frozen=True)
class _Start:
    """Where a round begins."""

    stage: str
    step: int


class Rounds(TrainerCallback):  # type: ignore[misc]
    """Measures at the start of every round and changes the mixture; its state is part of the Trainer's checkpoints."""

    def __init__(
        self,
        model: nn.Module,
        data: TokenData,
        mixture: MixtureDataset,
        target: Mapping[str, float],
        settings: CompressSettings,
        steps: int,
    ) -> None:
        self.model, self.data, self.mixture, self.target = model, data, mixture, target
        self.settings, self.batch = settings.recover, settings.batch
        self.starts = {start.step: start for start in round_starts(data, settings.recover, steps)}
        self.end = steps
        """Steps in all; fewer once a stage has stopped early."""
        self.rounds: list[Round] = []

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """The first round starts before the first step; a resumed run takes its rounds up again from the log."""
        self.rounds = [Round(**each) for each in _kept(state)]
        for each in self.rounds:
            if each.first_step not in self.starts or self.starts[each.first_step].stage != each.stage:
                self._leave(_GENERAL, each.first_step)
            self.mixture.change(self._first_sample(each.first_step), each.weights)
        if not self.rounds:
            self._begin(self.starts[0], self._deviation(), state)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Starts the round that is due, or the next stage where this one has stopped paying."""
        step = state.global_step
        due = self.starts.get(step)
        if due is not None and step < self.end:
            deviation = self._deviation()
            if self._is_stale(due.stage, deviation):
                logger.info("recovery: the %s stage ends at step %d, it no longer brings anything", due.stage, step)
                self._leave(due.stage, step)
                due = self.starts.get(step)
            if due is not None:
                self._begin(due, deviation, state)
        control.should_training_stop = control.should_training_stop or step >= self.end

    def _deviation(self) -> dict[str, float]:
        losses = deviation_losses(self.model, self.data)
        return {name: losses[name] - self.target[name] for name in losses}

    def _begin(self, start: _Start, deviation: dict[str, float], state: TrainerState) -> None:
        weights = stage_weights(self.data, deviation, start.stage, floor=self.settings.floor)
        self.mixture.change(self._first_sample(start.step), weights)
        self.rounds.append(Round(start.stage, start.step, deviation, weights))
        state.log_history.append({"round": asdict(self.rounds[-1]), "step": state.global_step})

    def _is_stale(self, stage: str, deviation: dict[str, float]) -> bool:
        """Whether a stage's last `patience` rounds brought its sources nothing; by the log, which a resume keeps."""
        own = {source.name: source.weight for source in _own(self.data, stage)}
        measured = [*(each.deviation for each in self.rounds if each.stage == stage), deviation]
        best, stale = float("inf"), 0
        for each in measured:
            mean = sum(each[name] * weight for name, weight in own.items()) / (sum(own.values()) or 1.0)
            stale = 0 if mean < best - _IMPROVEMENT else stale + 1
            best = min(best, mean)
        return 0 < self.settings.patience <= stale

    def _leave(self, stage: str, step: int) -> None:
        """A stage ends at `step`; a later one begins there and keeps its length."""
        later = [start for start in self.starts.values() if start.stage != stage and start.step > step]
        earlier = (later[0].step if later else self.end) - step
        self.starts = {start.step - earlier: replace(start, step=start.step - earlier) for start in later}
        self.end -= earlier

    def _first_sample(self, step: int) -> int:
        """When a round is measured the loader has the next step's windows already: weights count from the one after."""
        return 0 if step == 0 else (step + 1) * self.batch


def _kept(state: TrainerState) -> list[dict[str, Any]]:
    return [entry["round"] for entry in state.log_history if "round" in entry]


def round_starts(data: TokenData, settings: RecoverSettings, steps: int) -> list[_Start]:
    """First steps of all rounds: of the general stage, then of the instruction stage where there are instructions.

    A stage without sources of its kind is left out, and a round has at least one step.
    """
    instruct = round(steps * settings.instruct_share) if data.instruct and data.pretraining else 0
    instruct = steps if data.instruct and not data.pretraining else instruct
    lengths = [(_GENERAL, 0, steps - instruct), (_INSTRUCTION, steps - instruct, instruct)]
    starts = []
    for stage, first, length in lengths:
        rounds = min(settings.rounds, length)
        starts += [_Start(stage, first + length * index // rounds) for index in range(rounds)]
    return starts


def stage_weights(data: TokenData, deviation: Mapping[str, float], stage: str, *, floor: float) -> dict[str, float]:
    """Shares of the sources in a round: what is missing of the stage's own sources, times what each counts, and the floor
    for all."""
    own = _own(data, stage)
    behind = {source.name: source.weight * deviation[source.name] for source in own}
    return deviation_weights(behind, proportional_weights(data.sources), floor=floor)


def _own(data: TokenData, stage: str) -> Sequence[TokenSource]:
    return (data.pretraining if stage == _GENERAL else data.instruct) or data.sources
