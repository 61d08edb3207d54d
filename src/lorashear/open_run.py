"""The open run: what the stages of one run share, from the look at everything a user can have got wrong on."""

from __future__ import annotations

import gc
import json
import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import PreTrainedModel

from lorashear.config import CompressSettings
from lorashear.data.packing import TokenData, tokenize
from lorashear.data.sources import read_sources
from lorashear.devices import available_bytes, resolve_device
from lorashear.errors import SettingsError
from lorashear.evaluation.result import ResultRow, measure
from lorashear.graph.discover import discover
from lorashear.models import LoadedModel, check_window, fitting_dtype, load_model
from lorashear.pruning.methods import method_of, with_preset
from lorashear.pruning.prune import even_plan, walk_steps
from lorashear.recovery.adapt import adapt_steps
from lorashear.reporting.runfolder import (
    RUN_FILE,
    check_output,
    check_space,
    model_fingerprint,
    note_stage,
    start_run,
    written_beside,
)
from lorashear.surgery.saving import save
from lorashear.training import (
    Teacher,
    discard_checkpoints,
    resolve_dtype,
    resolve_micro_batch,
    resolve_teacher,
    resolve_train,
    state_bytes,
)

logger = logging.getLogger(__name__)

_TIMED_WINDOWS = 4
"""At most; the formats of training are timed on them."""
WEIGHTS_STAGE = "weights"
"""Where `run.json` says what they are held in."""
CHECKPOINTS = 8
"""Checkpoints written over a training stage, for `--resume`."""


@dataclass
class OpenRun:
    """What the stages of one run share."""

    out: Path
    settings: CompressSettings
    source: str
    trust_remote_code: bool
    loaded: LoadedModel
    data: TokenData
    info: dict[str, Any]
    dtype: torch.dtype | None
    weight_dtype: torch.dtype
    save_dtype: torch.dtype
    resume: bool
    progress: bool
    device: torch.device
    teacher_source: str | None = None
    """Where the full model is, to learn from; None where nobody knows."""
    _teacher: Teacher | None = None

    @property
    def stages(self) -> Mapping[str, Any]:
        """What every stage that is done came to."""
        return self.info["stages"]  # type: ignore[no-any-return]

    @property
    def steps(self) -> int:
        """Optimizer steps that the token budget pays for."""
        return self.settings.tokens // (self.settings.batch * self.data.window)

    @property
    def prune_steps(self) -> int:
        """Those of them that the walk takes."""
        prune = self.settings.prune
        return walk_steps(prune, self.steps) if method_of(prune).trains else 0

    @property
    def teacher(self) -> Teacher | None:
        """The full model, loaded when first asked for; None where the settings, or memory, do without."""
        distill = self.settings.distill
        if distill.teacher != "on" or not distill.weight or self.teacher_source is None:
            return None
        if self._teacher is None:
            full = load_model(
                self.teacher_source,
                dtype=self.dtype or torch.float32,
                device=self.device,
                trust_remote_code=self.trust_remote_code,
            )
            self._teacher = Teacher(full.model.requires_grad_(False), distill.weight)
        return self._teacher

    def steps_of(self, tokens: int) -> int:
        """Optimizer steps that some training tokens paid for."""
        return tokens // (self.settings.batch * self.data.window)

    def row(self, label: str) -> ResultRow:
        """Measures the model of the run once; a resumed run reads what was measured."""
        if label not in self.stages:
            width = self.save_dtype.itemsize
            row = measure(self.loaded.model, self.data, label=label, bytes_per_weight=width, progress=self.progress)
            note_stage(self.out, self.info, label, {"row": row.to_dict()})
        return ResultRow.from_dict(self.stages[label]["row"])

    def load(self, place: str | Path) -> None:
        """Another model takes the place of the one in memory; there are never two that train."""
        self.loaded = replace(self.loaded, model=None)
        gc.collect()
        self.loaded = load_model(
            place, dtype=self.weight_dtype, device=self.device, trust_remote_code=self.trust_remote_code
        )

    def save(self, model: PreTrainedModel, name: str) -> Path:
        """Saves a model and its tokenizer in the format that the checkpoint came in, which the model has from then on: read
        it back to go on with it."""
        folder = self.out / name
        with written_beside(folder) as partial:
            # a GPU may have no room for a wider format than the weights are held in
            save(model.to("cpu", self.save_dtype), self.loaded.tokenizer, partial)
        return folder

    def done(self, stage: str, outcome: Mapping[str, Any]) -> None:
        """Notes that a training stage is done and its result saved; its checkpoints go."""
        note_stage(self.out, self.info, stage, outcome)
        discard_checkpoints(self.out, stage)

    def every(self, steps: int) -> int:
        """Steps between two checkpoints of a training stage."""
        return max(1, steps // CHECKPOINTS)


def open_run(
    command: str,
    model: str | Path,
    data: str | Path,
    out: str | Path,
    settings: CompressSettings,
    resume: bool,
    trust_remote_code: bool,
    progress: bool,
    *,
    reaches: bool = True,
    teacher_source: str | None = None,
) -> OpenRun:
    """Looks at everything a user can have got wrong, then creates the run folder."""
    out, settings = Path(out), with_preset(settings)
    _check_alone()
    check_output(out, resume=resume)
    _check_budget(command, settings)
    if command == "recover" and settings.distill.teacher == "on" and teacher_source is None:
        raise SettingsError(
            f'distill.teacher = "on": the full model that {model} was cut from is not known, or is gone; give the run folder '
            "that `prune` made, or leave the setting out"
        )
    device = resolve_device(settings.device)
    sources = read_sources(data, settings.data)
    weight_dtype = _recorded_weight_dtype(out) if resume else None
    weight_dtype = weight_dtype or resolve_weight_dtype(
        settings, model, device, trains=command != "analyze", trust_remote_code=trust_remote_code
    )
    loaded = load_model(model, dtype=weight_dtype, device=device, trust_remote_code=trust_remote_code)
    check_window(loaded.model, settings.data.window)
    tokens = tokenize(sources, loaded.tokenizer, settings.data)
    graph = discover(loaded.model)
    if reaches and command != "recover":
        even_plan(graph, settings.prune)  # raises where the ratio is out of reach
    save_dtype = loaded.checkpoint_dtype
    if not resume:
        check_space(out, _needed_bytes(command, loaded, settings))
    info = start_run(
        out,
        settings=settings,
        command=command,
        model=model_fingerprint(_whole_path(model), loaded.model),
        data={"given": str(data), "sources": {source.name: source.fingerprint for source in tokens.sources}},
        resume=resume,
    )
    if WEIGHTS_STAGE not in info["stages"]:
        note_stage(out, info, WEIGHTS_STAGE, {"dtype": _name_of(weight_dtype)})
    run = OpenRun(
        out=out,
        settings=settings,
        source=str(model),
        trust_remote_code=trust_remote_code,
        loaded=loaded,
        data=tokens,
        info=info,
        dtype=None,
        weight_dtype=weight_dtype,
        save_dtype=save_dtype,
        resume=resume,
        progress=progress,
        device=device,
        teacher_source=teacher_source,
    )
    run.dtype = _dtype(run)
    run.settings = _settled(run)
    return run


def _whole_path(model: str | Path) -> str:
    """A folder or file wherever the run is gone on with, and a hub id as it is."""
    path = Path(model).expanduser()
    return str(path.resolve()) if path.exists() else str(model)


def resolve_weight_dtype(
    settings: CompressSettings,
    model: str | Path,
    device: torch.device,
    *,
    trains: bool,
    trust_remote_code: bool = False,
) -> torch.dtype:
    """What a model's weights are to be held in (`weight_dtype`); `trains`: whether a teacher may come beside them."""
    if settings.weight_dtype != "auto":
        return _named(settings.weight_dtype)
    if settings.dtype == "float32":
        return torch.float32
    return fitting_dtype(model, device, trains=trains, trust_remote_code=trust_remote_code)


def _recorded_weight_dtype(out: Path) -> torch.dtype | None:
    """That of the run which is resumed: it has to go on from the same numbers, however much memory is free now."""
    stages = json.loads((out / RUN_FILE).read_text(encoding="utf-8")).get("stages", {})
    name = stages.get(WEIGHTS_STAGE, {}).get("dtype")
    return None if name is None else _named(name)


def _name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _named(dtype: str) -> torch.dtype:
    return getattr(torch, dtype)  # type: ignore[no-any-return]


_MODELS = {"compress": 3, "prune": 2, "recover": 1}
"""Command -> models that may lie in its folder at once: the adapted, the pruned and the recovered one."""


def _needed_bytes(command: str, loaded: LoadedModel, settings: CompressSettings) -> int:
    """What a run takes on disk, at most: models, and two checkpoints (the newest replaces the one before) with float32
    weights and AdamW's moments where all weights learn, else weights as they are held."""
    if command not in _MODELS:
        return 0
    free, window = available_bytes(loaded.model.device), settings.data.window
    asked = (settings.prune.train, settings.recover.train)
    learns_all = any(resolve_train(train, loaded.model, free, window=window).train == "all" for train in asked)
    checkpoint = 12 if learns_all else loaded.model.dtype.itemsize
    return int(loaded.model.num_parameters()) * (_MODELS[command] * loaded.checkpoint_dtype.itemsize + 2 * checkpoint)


def _check_alone() -> None:
    """Raises `SettingsError` where a launcher started several processes, which would all write to one run folder."""
    processes = os.environ.get("WORLD_SIZE", "1")
    if processes != "1":
        raise SettingsError(
            f"{processes} processes were started (WORLD_SIZE), and a run is the work of one on one device; start it without "
            "a launcher"
        )


def _check_budget(command: str, settings: CompressSettings) -> None:
    """Raises `SettingsError` where the tokens do not pay for the training that is to come, or do not come out even."""
    steps = settings.tokens // (settings.batch * settings.data.window)
    prunes = command in ("compress", "prune")
    walk = walk_steps(settings.prune, steps) if prunes and method_of(settings.prune).trains else 0
    adapting = adapt_steps(settings.adapt, steps)
    if command == "compress" and steps and walk + adapting >= steps:
        raise SettingsError(
            f"tokens = {settings.tokens} pay for {steps} optimizer steps, adapting (adapt.share) may take {adapting} of them "
            f"and the walk (prune.share) {walk}, which leaves none to recovery; lower the shares"
        )
    if command in ("compress", "recover") and steps < 1:
        raise SettingsError(
            f"tokens = {settings.tokens}: a step takes {settings.batch * settings.data.window} (batch x data.window); give "
            "more tokens, or lower batch or data.window"
        )
    if settings.micro_batch is not None and settings.batch % settings.micro_batch:
        raise SettingsError(
            f"batch = {settings.batch} is not divisible by micro_batch = {settings.micro_batch}; set a micro_batch that "
            "divides it"
        )


def _settled(run: OpenRun) -> CompressSettings:
    """The settings with what memory decides filled in, once a run: a resumed one may find another amount of it free."""
    model, settings, window = run.loaded.model, run.settings, run.data.window
    if "memory" not in run.stages:
        free = available_bytes(model.device)
        walk = resolve_train(settings.prune.train, model, free, window=window)
        recovery = resolve_train(settings.recover.train, model, free, window=window)
        if "auto" in (settings.prune.train, settings.recover.train):
            logger.info("train: auto is %s", resolve_train("auto", model, free, window=window).explanation)
        trains: Literal["adapters", "all"] = "all" if "all" in (walk.train, recovery.train) else "adapters"
        item = (run.dtype or torch.float32).itemsize
        teacher = resolve_teacher(settings.distill.teacher, model, free, train=trains, item_bytes=item, window=window)
        if run.teacher_source is None:
            logger.info("distill: the full model is not known, so nothing is learnt from it")
            teacher = False
        elif settings.distill.teacher == "auto":
            logger.info(
                "distill: the full model %s kept to learn from", "is" if teacher else "does not fit, so it is not"
            )
        left = free - state_bytes(model, train=trains, autocast=run.dtype is not None)
        left -= model.num_parameters() * item if teacher else 0
        micro_batch = resolve_micro_batch(settings.micro_batch, model, left, batch=settings.batch, window=window)
        chosen = {
            "prune.train": walk.train,
            "recover.train": recovery.train,
            "micro_batch": micro_batch,
            "distill.teacher": "on" if teacher else "off",
            "full model": run.teacher_source,
        }
        note_stage(run.out, run.info, "memory", chosen)
    chosen = run.stages["memory"]
    return settings.model_copy(
        update={
            "prune": settings.prune.model_copy(update={"train": chosen["prune.train"]}),
            "recover": settings.recover.model_copy(update={"train": chosen["recover.train"]}),
            "micro_batch": chosen["micro_batch"],
            "distill": settings.distill.model_copy(update={"teacher": chosen["distill.teacher"]}),
        }
    )


def _dtype(run: OpenRun) -> torch.dtype | None:
    """Measured once a run: a resumed one has to train in the same format."""
    if "dtype" not in run.stages:
        model, window = run.loaded.model, run.data.window
        free = available_bytes(model.device)
        batch = resolve_micro_batch(run.settings.micro_batch, model, free, batch=_TIMED_WINDOWS, window=window)
        chosen = resolve_dtype(run.settings.dtype, model, run.data.sources[0].train[:batch])
        note_stage(run.out, run.info, "dtype", {"autocast": None if chosen is None else _name_of(chosen)})
    name = run.stages["dtype"]["autocast"]
    return None if name is None else _named(name)
