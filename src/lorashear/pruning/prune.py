"""The pruning stage: pick structures, walk them to zero, cut them out."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from time import perf_counter
from typing import Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lorashear.analysis.saliency import score
from lorashear.config import CompressSettings, PrunableKind, PruneSettings
from lorashear.data.packing import TokenData
from lorashear.devices import USABLE, available_bytes
from lorashear.errors import PlanError, SettingsError, TrainingError
from lorashear.graph.discover import discover
from lorashear.graph.groups import Graph
from lorashear.plan import Plan
from lorashear.pruning.gates import StructureGates, gate_statistics
from lorashear.pruning.lhspg import LHSPG, WalkSchedule, trainable
from lorashear.pruning.methods import STAGE, Method, Scoring, TrainingRun, method_kinds, method_of, with_preset
from lorashear.pruning.planner import plan
from lorashear.pruning.residual import ResidualCut, choose_residual_cut, residual_widths
from lorashear.recovery.mixture import MixtureDataset, proportional_weights
from lorashear.surgery.compensate import compensate_
from lorashear.surgery.cut import cut_
from lorashear.surgery.refit import refit_
from lorashear.surgery.rotate import rotate_
from lorashear.training import (
    Teacher,
    TrainJob,
    attach_lora,
    constant_with_warmup,
    default_learning_rate,
    full_precision_weights,
    merge_lora,
    resolve_micro_batch,
    resolve_train,
    train,
)

logger = logging.getLogger(__name__)

TOLERANCE = 0.005
"""Share of the parameters by which a ratio may be missed."""
_COARSE = 0.01
"""Share of the parameters by which a ratio may be missed without a word."""
LEAST_STEPS = 12
"""Optimizer steps below which walking and recovering makes no sense."""
REFIT_WINDOWS = 3
"""Times the calibration windows that a refit looks at, forward only: least squares over many features want many tokens."""
REFIT_TOKENS = 2**17
"""And tokens, at most: a refit holds the streams of all its windows in memory."""
REFIT_STREAMS = 6
"""Vectors of the hidden size that it holds a token: as they enter and leave a layer and what was written, full model and cut."""
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
    teacher: Teacher | None = None,
    unprunable: Collection[str] = (),
    resume: bool = False,
    checkpoint_every: int | None = None,
    progress: bool = True,
) -> PruneResult:
    """Removes `settings.prune.ratio` of the parameters (paper: LHSPG, and other methods beside it).

    Args:
        model: without adapters; changed in place.
        data: text to train on, and for the statistics of one-shot methods.
        settings: all stages'; `prune`, `saliency`, `lora`, `batch`, `seed` are used.
        steps: optimizer steps of warm-up and walk together, or of learning; one-shot methods take none.
        out: run folder, for metrics and checkpoints.
        dtype: autocast of training.
        teacher: the full model, to learn from beside the text.
        unprunable: names of groups to leave whole (per-layer shape).
        resume: go on from the newest checkpoint.
        checkpoint_every: steps between checkpoints.
        progress: show bars.

    Raises:
        PlanError: when the ratio cannot be reached.
        TrainingError: when the loss is no longer finite.
    """
    start = perf_counter()
    settings = with_preset(settings)
    graph = discover(model)
    run = TrainingRun(data, settings, steps, out, dtype, teacher, unprunable, resume, checkpoint_every, progress)
    narrows, trains = "residual" in method_kinds(settings.prune), method_of(settings.prune).trains
    scores = {}
    if narrows or not trains:
        scores = calibration_scores(model, graph, data, settings=settings, dtype=dtype)
    found = _choose_residual(model, graph, scores, run) if narrows else None
    fixed = dict(found.fixed) if found else {}
    if found:
        rotate_(model, found.basis, found.rotation)
    if trains:
        model, removed, used = _trained(model, graph, fixed, run)
    else:
        removed, used = budget_plan(graph, settings.prune, scores=scores, unprunable=unprunable, fixed=fixed).removed, 0
        _cut_at_once(model, graph, removed, run)
    lost = graph.num_parameters - graph.kept_parameters(removed)
    net = lost / _whole(settings.prune, graph)
    if abs(net - settings.prune.ratio) > _COARSE:
        logger.warning(
            "%.1f%% of the parameters are gone instead of %.1f%%: what %s removes comes in coarse steps (widths: "
            "prune.round_to = %d)",
            100 * net,
            100 * settings.prune.ratio,
            settings.prune.method,
            settings.prune.round_to,
        )
    plan_made = Plan(removed=removed, shape=settings.prune.shape)
    tokens = used * settings.batch * data.window
    return PruneResult(model, plan_made, net, tokens, perf_counter() - start)


def _trained(
    model: PreTrainedModel, graph: Graph, fixed: Mapping[str, Sequence[int]], run: TrainingRun
) -> tuple[PreTrainedModel, dict[str, tuple[int, ...]], int]:
    """Narrows the stream at once, walks or learns the rest; returns the cut model, what is gone, and the steps taken."""
    removed = {name: tuple(rows) for name, rows in fixed.items()}
    if removed:
        _cut_at_once(model, graph, removed, run)
    rest = _rest(run.settings.prune, graph, removed)
    if rest is None:
        return model, removed, 0
    run = replace(run, settings=run.settings.model_copy(update={"prune": rest}), narrowed=bool(removed))
    if method_of(rest).walks:
        model, chosen = _walk(model, run)
    else:
        chosen = _learnt(model, run)
    cut_(model, discover(model), chosen)
    return model, removed | chosen.removed, run.steps


def _cut_at_once(
    model: PreTrainedModel, graph: Graph, removed: Mapping[str, tuple[int, ...]], run: TrainingRun
) -> None:
    settings, chosen = run.settings, Plan(removed=dict(removed))
    if settings.prune.compensate is not False:
        windows = _refit_windows(model, run.data, settings)
        batch = _micro_batch(model, settings, run.data.window)
        refit_(model, graph, chosen, windows, batch=batch, dtype=run.dtype, progress=run.progress)
    cut_(model, graph, chosen)


def _refit_windows(model: PreTrainedModel, data: TokenData, settings: CompressSettings) -> Tensor:
    weight = next(model.parameters())
    token = REFIT_STREAMS * int(model.get_input_embeddings().weight.shape[1]) * weight.element_size()
    most = min(REFIT_TOKENS, int(USABLE * available_bytes(weight.device)) // token)
    wanted = min(REFIT_WINDOWS * settings.data.calibration_windows, max(1, most // data.window))
    return data.calibration(min(wanted, sum(len(source.train) for source in data.sources if source.weight)))


def _choose_residual(
    model: PreTrainedModel, graph: Graph, scores: Mapping[str, Tensor], run: TrainingRun
) -> ResidualCut | None:
    """How much of the residual stream goes; None where it is all kept."""
    settings, data = run.settings, run.data
    prune = settings.prune
    windows = data.calibration(settings.data.calibration_windows)

    def plan_of(fixed: Mapping[str, Sequence[int]]) -> Plan:
        return budget_plan(graph, prune, scores=scores, unprunable=run.unprunable, fixed=fixed)

    batch = _micro_batch(model, settings, data.window)
    return choose_residual_cut(
        model, graph, windows, plan_of, round_to=prune.round_to, batch=batch,
        sensitivity=not method_of(prune).by_variance, dtype=run.dtype, progress=run.progress,
    )  # fmt: skip


def _rest(prune: PruneSettings, graph: Graph, removed: Mapping[str, Sequence[int]]) -> PruneSettings | None:
    """What of the budget is left to the other kinds, as a share of the model as it is cut so far; None for nothing."""
    if not removed:
        return prune
    kept = graph.kept_parameters(removed)
    whole = _whole(prune, graph)
    missing = prune.ratio * whole - (graph.num_parameters - kept)
    kinds = tuple(kind for kind in method_kinds(prune) if kind != "residual")
    if missing < TOLERANCE * whole or not kinds:
        return None
    return prune.model_copy(update={"ratio": missing / kept, "ratio_of": "model", "kinds": kinds})


def _whole(prune: PruneSettings, graph: Graph) -> int:
    return graph.num_parameters if prune.ratio_of == "model" else graph.num_decoder_parameters


def _walk(model: PreTrainedModel, run: TrainingRun) -> tuple[PreTrainedModel, Plan]:
    """LHSPG on adapters or on all weights; returns the plain model with its redundant structures exactly zero."""
    settings, data, steps = run.settings, run.data, run.steps
    prune = settings.prune
    choice = resolve_train(prune.train, model, available_bytes(model.device), window=data.window)
    logger.info("pruning: %s", choice.explanation)
    hands_over = _hands_over(prune, choice.train)
    micro_batch = _micro_batch(model, settings, data.window)
    walked: nn.Module = attach_lora(model, settings.lora, seed=settings.seed) if choice.train == "adapters" else model
    graph = discover(walked)
    with full_precision_weights(walked):
        gates = StructureGates(walked, graph.gated)
        windows = data.calibration(settings.data.calibration_windows)
        gates.set_statistics(gate_statistics(walked, graph.gated, windows, batch=micro_batch, dtype=run.dtype))
        gates.accumulation = settings.batch // micro_batch
        gates.metering = True
        optimizer = _optimizer(walked, graph, gates, settings, steps, choice.train, run.unprunable)
        if hands_over:
            optimizer.handover = _handover(walked, graph, windows, micro_batch, run)
        mixture = MixtureDataset(
            data.sources, proportional_weights(data.sources), num_samples=steps * settings.batch, seed=settings.seed
        )
        job = TrainJob(
            name=STAGE,
            steps=steps,
            batch=settings.batch,
            micro_batch=micro_batch,
            seed=settings.seed,
            out=run.out,
            dtype=run.dtype,
            checkpoint_every=run.checkpoint_every,
            checkpoint_frozen=run.narrowed or prune.shrink == "slices" or hands_over,
            resume=run.resume,
            progress=run.progress,
        )
        scheduler = constant_with_warmup(optimizer, warmup_steps=LR_WARMUP)
        try:
            train(walked, mixture, optimizer=optimizer, scheduler=scheduler, job=job, teacher=run.teacher)
        finally:
            gates.remove()
        removed = {name: tuple(rows.tolist()) for name, rows in optimizer.redundant.items()}
    plain = merge_lora(walked) if choice.train == "adapters" else model
    return plain, Plan(removed=removed, shape=prune.shape)


def _hands_over(prune: PruneSettings, learns: Literal["adapters", "all"]) -> bool:
    """Whether what stays takes over at the start of a period (`prune.compensate`)."""
    if prune.compensate is not None:
        return prune.compensate
    return learns == "all" and prune.shrink == "gates" and prune.epsilon == 0.0


def _learnt(model: PreTrainedModel, run: TrainingRun) -> Plan:
    """What a method's own training picks."""
    settings = run.settings
    learn = method_of(settings.prune).learn
    assert learn is not None
    if settings.prune.compensate:
        logger.warning("prune.compensate is not applied: %s scales what stays instead", settings.prune.method)
    scoring = _scoring(
        model, discover(model), run.data, settings=settings, dtype=run.dtype, kinds=method_kinds(settings.prune)
    )

    def plan_of(scores: Mapping[str, Tensor]) -> Plan:
        return budget_plan(scoring.graph, settings.prune, scores=scores, unprunable=run.unprunable)

    return learn(scoring, run, plan_of)


def _handover(
    model: nn.Module, graph: Graph, windows: Tensor, batch: int, run: TrainingRun
) -> Callable[[Mapping[str, Tensor]], None]:
    def hand_over(structures: Mapping[str, Tensor]) -> None:
        chosen = Plan(removed={name: tuple(rows.tolist()) for name, rows in structures.items()})
        if isinstance(model, PreTrainedModel):
            refit_(model, graph, chosen, windows, batch=batch, dtype=run.dtype, progress=run.progress)
        else:  # adapters lie around the layers
            compensate_(model, graph, chosen, windows, batch=batch)

    return hand_over


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
    rate = prune.learning_rate or default_learning_rate(learns, graph.num_parameters, settings.batch)
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
    warmup = min(round(settings.warmup * steps), steps - 1)
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
    method: Method | None = None,
) -> dict[str, Tensor]:
    """Saliency per group, `(structures,)`, by the criterion of a method (None: that of the settings), from calibration
    windows alone."""
    chosen = method or method_of(settings.prune)
    kinds = method.kinds if method else method_kinds(settings.prune)
    return dict(chosen.score(_scoring(model, graph, data, settings=settings, dtype=dtype, kinds=kinds)))


def _scoring(
    model: PreTrainedModel,
    graph: Graph,
    data: TokenData,
    *,
    settings: CompressSettings,
    dtype: torch.dtype | None,
    kinds: tuple[PrunableKind, ...],
) -> Scoring:
    return Scoring(
        model=model,
        graph=graph,
        windows=data.calibration(settings.data.calibration_windows),
        batch=_micro_batch(model, settings, data.window),
        dtype=dtype,
        seed=settings.seed,
        saliency=settings.saliency,
        kinds=kinds,
    )


def budget_plan(
    graph: Graph,
    settings: PruneSettings,
    *,
    scores: Mapping[str, Tensor] | None = None,
    unprunable: Collection[str] = (),
    taken: Mapping[str, Tensor] | None = None,
    share: float = 1.0,
    fixed: Mapping[str, Sequence[int]] | None = None,
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
        kinds=method_kinds(settings),
        taken=taken,
        fixed=fixed,
    )


def even_plan(graph: Graph, settings: PruneSettings) -> Plan:
    """What the ratio leads to with every structure counting alike, before there are scores: heads and FFN channels first,
    the residual stream as far as they do not do.

    Raises:
        PlanError: when the ratio cannot be reached.
    """
    narrower = residual_widths(graph, settings.round_to) if "residual" in method_kinds(settings) else []
    last: PlanError | None = None  # with the narrowest stream: it tells how far all kinds together go
    for fixed in ({}, *narrower):
        try:
            return budget_plan(graph, settings, fixed=fixed)
        except PlanError as error:
            last = error
    assert last is not None
    raise last


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
        if not all(bool(torch.isfinite(each.second).all()) for each in statistics.values()):
            raise TrainingError(
                f"the gradients of {STAGE} are not finite before period {period + 1}; lower prune.learning_rate, or set dtype: "
                '"float32"'
            )
        scores = score(self.model, self.graph, statistics, self.settings.saliency)
        if adjust := method_of(prune).adjust:
            scores = adjust(self.graph, scores)
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
