"""The pruning stage: pick structures, walk them to zero, cut them out."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lorashear.analysis.saliency import random_scores, score
from lorashear.config import CompressSettings, PruneSettings, SaliencySettings
from lorashear.data.packing import TokenData
from lorashear.errors import SettingsError
from lorashear.graph.discover import discover
from lorashear.graph.groups import Graph
from lorashear.plan import Plan
from lorashear.pruning.gates import GateStatistics, StructureGates, gate_statistics
from lorashear.pruning.lhspg import LHSPG, WalkSchedule, trainable
from lorashear.pruning.planner import plan
from lorashear.recovery.mixture import MixtureDataset, proportional_weights
from lorashear.surgery.cut import cut_
from lorashear.training import (
    TrainJob,
    attach_lora,
    available_bytes,
    constant_with_warmup,
    default_learning_rate,
    discard_checkpoints,
    full_precision_weights,
    merge_lora,
    resolve_micro_batch,
    resolve_train,
    train,
)

logger = logging.getLogger(__name__)

STAGE = "prune"
"""Names the stage's checkpoints and its lines in the metrics."""
LEAST_STEPS = 12
"""Optimizer steps below which walking and recovering makes no sense."""
LR_WARMUP = 10
"""Optimizer steps over which the learning rate rises."""


@dataclass(frozen=True)
class PruneResult:
    """A cut model, and how it came about."""

    model: PreTrainedModel
    """The model handed in, cut in place; plain, without adapters."""
    plan: Plan
    net: float
    """Share of the parameters removed, of what `prune.ratio_of` names."""
    tokens: int
    """Training tokens used."""
    seconds: float


def prune_model(
    model: PreTrainedModel,
    data: TokenData,
    *,
    settings: CompressSettings,
    steps: int,
    out: Path,
    dtype: torch.dtype | None = None,
    unprunable: Collection[str] = (),
    resume: bool = False,
    checkpoint_every: int | None = None,
    progress: bool = True,
) -> PruneResult:
    """Removes `settings.prune.ratio` of the parameters (paper: LHSPG, and one-shot baselines beside it).

    Args:
        model: without adapters; changed in place.
        data: text to train on, and for the statistics of one-shot methods.
        settings: all stages'; `prune`, `saliency`, `lora`, `batch`, `seed` are used.
        steps: optimizer steps of warm-up and walk together; one-shot methods take none.
        out: run folder, for metrics and checkpoints.
        dtype: autocast of the walk.
        unprunable: names of groups to leave whole (per-layer shape).
        resume: go on from the newest checkpoint.
        checkpoint_every: steps between checkpoints.
        progress: show bars.

    Raises:
        PlanError: when the ratio cannot be reached.
        TrainingError: when the loss is no longer finite.
    """
    start = perf_counter()
    if settings.prune.method == "lhspg":
        model, chosen = _walk(model, data, settings, steps, out, dtype, unprunable, resume, checkpoint_every, progress)
    else:
        steps = 0
        chosen = one_shot_plan(model, data, settings=settings, dtype=dtype, unprunable=unprunable)
    graph = discover(model)
    cut_(model, graph, chosen)
    discard_checkpoints(out, STAGE)
    lost = graph.num_parameters - graph.kept_parameters(chosen.removed)
    whole = graph.num_parameters if settings.prune.ratio_of == "model" else graph.num_decoder_parameters
    return PruneResult(model, chosen, lost / whole, steps * settings.batch * data.window, perf_counter() - start)


def _walk(
    model: PreTrainedModel,
    data: TokenData,
    settings: CompressSettings,
    steps: int,
    out: Path,
    dtype: torch.dtype | None,
    unprunable: Collection[str],
    resume: bool,
    checkpoint_every: int | None,
    progress: bool,
) -> tuple[PreTrainedModel, Plan]:
    """LHSPG on adapters or on all weights; returns the plain model with its redundant structures exactly zero."""
    prune = settings.prune
    choice = resolve_train(prune.train, model, available_bytes(model.device), window=data.window)
    logger.info("pruning: %s", choice.explanation)
    micro_batch = _micro_batch(model, settings, data.window)
    walked: nn.Module = attach_lora(model, settings.lora, seed=settings.seed) if choice.train == "adapters" else model
    graph = discover(walked)
    with full_precision_weights(walked):
        gates = StructureGates(walked, graph.gated)
        gates.set_statistics(_statistics(walked, graph, data, settings, dtype))
        gates.accumulation = settings.batch // micro_batch
        gates.metering = True
        optimizer = _optimizer(walked, graph, gates, settings, steps, choice.train, unprunable)
        mixture = MixtureDataset(
            data.sources, proportional_weights(data.sources), num_samples=steps * settings.batch, seed=settings.seed
        )
        job = TrainJob(
            name=STAGE,
            steps=steps,
            batch=settings.batch,
            micro_batch=micro_batch,
            seed=settings.seed,
            out=out,
            dtype=dtype,
            checkpoint_every=checkpoint_every,
            checkpoint_frozen=prune.shrink == "slices",
            resume=resume,
            progress=progress,
        )
        scheduler = constant_with_warmup(optimizer, warmup_steps=LR_WARMUP)
        try:
            train(walked, mixture, optimizer=optimizer, scheduler=scheduler, job=job)
        finally:
            gates.remove()
        removed = {name: tuple(rows.tolist()) for name, rows in optimizer.redundant.items()}
    plain = merge_lora(walked) if choice.train == "adapters" else model
    return plain, Plan(removed=removed, shape=prune.shape)


def _optimizer(
    model: nn.Module,
    graph: Graph,
    gates: StructureGates,
    settings: CompressSettings,
    steps: int,
    learns: Literal["adapters", "all"],
    unprunable: Collection[str],
) -> LHSPG:
    prune = settings.prune
    parameters = list(trainable(model))
    rate = prune.learning_rate or default_learning_rate(learns, graph.num_parameters)
    schedule = _schedule(prune, steps)
    return LHSPG(
        torch.optim.AdamW(parameters, lr=rate, weight_decay=0.0),
        model=model,
        graph=graph,
        schedule=schedule,
        choose=PeriodChooser(model, graph, gates, settings, unprunable, periods=schedule.periods),
        gates=gates,
        shrink=prune.shrink,
        epsilon=prune.epsilon,
    )


def walk_steps(settings: PruneSettings, steps: int) -> int:
    """Optimizer steps of the walk, of `steps` that the budget pays for: their share, and a few where that is next to
    none.

    Raises:
        SettingsError: when the budget is too small for a walk.
    """
    if steps < LEAST_STEPS:
        raise SettingsError(
            f"the tokens pay for {steps} optimizer steps, at least {LEAST_STEPS} are needed for walk and recovery; give more "
            "tokens, or lower batch or data.window"
        )
    return max(round(settings.share * steps), LEAST_STEPS // 2)


def _schedule(settings: PruneSettings, steps: int) -> WalkSchedule:
    warmup = round(settings.warmup * steps)
    periods = min(settings.periods, steps - warmup)
    if periods < settings.periods:
        logger.warning(
            "prune.periods = %d is not applied: a walk of %d steps has room for %d",
            settings.periods,
            steps - warmup,
            periods,
        )
    return WalkSchedule(warmup, periods, steps)


def _micro_batch(model: nn.Module, settings: CompressSettings, window: int) -> int:
    free = available_bytes(next(model.parameters()).device)
    return resolve_micro_batch(settings.micro_batch, model, free, batch=settings.batch, window=window)


def calibration_scores(
    model: PreTrainedModel,
    graph: Graph,
    data: TokenData,
    *,
    settings: CompressSettings,
    dtype: torch.dtype | None = None,
) -> dict[str, Tensor]:
    """Saliency by the settings' mix, from calibration windows alone."""
    return score(model, graph, _statistics(model, graph, data, settings, dtype), settings.saliency)


def _statistics(
    model: nn.Module, graph: Graph, data: TokenData, settings: CompressSettings, dtype: torch.dtype | None
) -> dict[str, GateStatistics]:
    windows = data.calibration(settings.data.calibration_windows)
    micro_batch = _micro_batch(model, settings, data.window)
    return gate_statistics(model, graph.gated, windows, batch=micro_batch, dtype=dtype)


def one_shot_scores(
    model: PreTrainedModel,
    graph: Graph,
    data: TokenData,
    *,
    settings: CompressSettings,
    dtype: torch.dtype | None = None,
) -> dict[str, Tensor]:
    """Saliency per group, `(structures,)`, by the method's own criterion; "taylor" is the settings' mix, scored
    once."""
    method = settings.prune.method
    if method == "random":
        return random_scores(graph.gated, settings.seed)
    if method == "magnitude":
        return score(model, graph, {}, SaliencySettings(taylor2=0.0, magnitude=1.0))
    return calibration_scores(model, graph, data, settings=settings, dtype=dtype)


def one_shot_plan(
    model: PreTrainedModel,
    data: TokenData,
    *,
    settings: CompressSettings,
    dtype: torch.dtype | None = None,
    unprunable: Collection[str] = (),
) -> Plan:
    """The plan of a one-shot method: scored once, on the dense model."""
    graph = discover(model)
    scores = one_shot_scores(model, graph, data, settings=settings, dtype=dtype)
    return budget_plan(graph, settings.prune, scores=scores, unprunable=unprunable)


def budget_plan(
    graph: Graph,
    settings: PruneSettings,
    *,
    scores: Mapping[str, Tensor] | None = None,
    unprunable: Collection[str] = (),
    taken: Mapping[str, Tensor] | None = None,
    share: float = 1.0,
) -> Plan:
    """`plan` with the ratio (times `share`), shape and rounding of the settings."""
    return plan(
        graph,
        ratio=settings.ratio * share,
        scores=scores,
        ratio_of=settings.ratio_of,
        shape=settings.shape,
        round_to=settings.round_to if share == 1.0 else 1,
        unprunable=unprunable,
        kinds=settings.kinds,
        taken=taken,
    )


class PeriodChooser:
    """Which structures turn redundant in a period: the least salient of those that are left, up to its share of the
    budget."""

    def __init__(
        self,
        model: nn.Module,
        graph: Graph,
        gates: StructureGates,
        settings: CompressSettings,
        unprunable: Collection[str],
        *,
        periods: int,
    ) -> None:
        self.model, self.graph, self.gates = model, graph, gates
        self.settings, self.unprunable, self.periods = settings, unprunable, periods

    def __call__(self, period: int, redundant: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Group -> newly redundant structures; called at the first step of the period.

        Structures are judged given what is already gone: statistics from before the last period count less.
        """
        prune = self.settings.prune
        statistics = self.gates.statistics()
        scores = score(self.model, self.graph, statistics, self.settings.saliency)
        self.gates.set_statistics(statistics, share=prune.memory)
        share = (period + 1) / self.periods
        if prune.shape == "per-layer":
            wanted = budget_plan(
                self.graph, prune, scores=scores, unprunable=self.unprunable, taken=redundant, share=share
            ).removed
        else:
            wanted = self._part_of_final(scores, redundant, share)
        return {name: _fresh(rows, redundant.get(name)) for name, rows in wanted.items()}

    def _part_of_final(
        self, scores: Mapping[str, Tensor], redundant: Mapping[str, Tensor], share: float
    ) -> dict[str, tuple[int, ...]]:
        """A uniform shape is decided once all is known of the layers; each period takes its part of every width.

        The widths are planned anew each period around what is gone, so that they follow the scores as long as they can.
        """
        final = budget_plan(self.graph, self.settings.prune, scores=scores, taken=redundant).removed
        wanted = {}
        for name, rows in final.items():
            gone = set(redundant[name].tolist()) if name in redundant else set()
            order = scores[name].argsort(stable=True).tolist()
            going = set(rows) - gone
            fresh = [index for index in order if index in going]
            wanted[name] = (*gone, *fresh[: max(0, round(share * len(rows)) - len(gone))])
        return wanted


def _fresh(rows: tuple[int, ...], gone: Tensor | None) -> Tensor:
    before = set(gone.tolist()) if gone is not None else set()
    return torch.tensor([row for row in rows if row not in before], dtype=torch.long)
