"""The stages in order: each leaves in the run folder what the next one starts from, so that a stopped run goes on.

OUT/run.json        settings, versions, seed, fingerprints of model and data, and what every stage came to
OUT/adapted/        the full model, taught the text first where the text is new to it; kept by `prune` alone, for `recover`
OUT/profile.json    knowledge distribution, and profile.png, where it decides something or was asked for
OUT/plan.json       which structures were removed
OUT/metrics.jsonl   one line a training step; tensorboard/ holds the same
OUT/results.json    the columns of the final table
OUT/model/          the small model
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from transformers import PreTrainedModel

from lorashear.analysis.profile import Profile
from lorashear.analysis.profile import analyze as measure_profile
from lorashear.config import CompressSettings
from lorashear.data.packing import TokenData, tokenize
from lorashear.data.sources import read_sources
from lorashear.devices import resolve_device
from lorashear.evaluation.result import ResultRow, measure
from lorashear.evaluation.samples import answer
from lorashear.graph.discover import discover
from lorashear.models import check_window, load_model
from lorashear.open_run import OpenRun, open_run, resolve_weight_dtype
from lorashear.plan import Plan
from lorashear.pruning.methods import STAGE as PRUNE_STAGE
from lorashear.pruning.methods import probing_method, wants_profile, with_preset
from lorashear.pruning.prune import calibration_scores, prune_model
from lorashear.recovery.adapt import STAGE as ADAPT_STAGE
from lorashear.recovery.adapt import adapt_model
from lorashear.recovery.recover import STAGE as RECOVER_STAGE
from lorashear.recovery.recover import RecoverResult, deviation_losses, recover_model
from lorashear.reporting.heatmap import draw_profile
from lorashear.reporting.runfolder import (
    RUN_FILE,
    note_stage,
    write_json,
)
from lorashear.reporting.tables import result_table
from lorashear.training import (
    discard_checkpoints,
)

logger = logging.getLogger(__name__)

DENSE, ADAPTED, REFERENCE = "dense", "dense, adapted", "dense + same fine-tuning"
PRUNED, RECOVERED = "pruned", "pruned + recovered"
ADAPTED_FOLDER = "adapted"

QUESTIONS = (
    "What is the capital of France?",
    "Explain in one sentence why the sky is blue.",
    "Give me three tips for a good night's sleep.",
    "What does a compiler do?",
)
"""Asked by `chat`; fixed, so that runs can be compared."""

DEMO_QUESTIONS = ("What does `json.dumps` do?", "What is the class `threading.Lock`?", "What does `os.path.join` do?")

DEMO_SETTINGS: dict[str, Any] = {
    "tokens": 400_000,
    "batch": 8,
    "reference": True,
    "adapt.share": 0.0,  # the demo model was trained on this very text
    "prune.ratio": 0.3,
    "prune.ratio_of": "decoder",
    "data.eval_windows": 20,
    "analysis.in_compress": True,
}
"""What `lorashear demo` does differently from `compress`: small enough for five minutes on two cores."""

ANSWER_TOKENS = 64


@dataclass(frozen=True)
class CompressResult:
    """What a run came to."""

    out: Path
    rows: tuple[ResultRow, ...]
    model_folder: Path
    plan: Plan | None = None
    tokens: int = 0
    """Training tokens used."""
    chat: tuple[tuple[str, str, str], ...] = field(default=(), repr=False)
    """(question, the full model's answer, the small model's)."""

    def table(self) -> Table:
        """The measured models side by side."""
        return result_table(self.rows)

    def answers(self) -> Table:
        """Full and small model side by side."""
        table = Table(title="The same questions to both", show_lines=True)
        for title in ("question", "full model", "small model"):
            table.add_column(title, overflow="fold")
        for row in self.chat:
            table.add_row(*(cell.replace("[", r"\[") for cell in row))
        return table


def compress(
    model: str | Path,
    *,
    data: str | Path,
    out: str | Path,
    ratio: float | None = None,
    settings: CompressSettings | None = None,
    resume: bool = False,
    chat: bool = False,
    questions: tuple[str, ...] = QUESTIONS,
    trust_remote_code: bool = False,
    progress: bool = True,
) -> CompressResult:
    """Analyses (where that decides something), prunes, cuts, recovers and evaluates; the small model lies in `out/model`.

    Args:
        model: folder, hub id or GGUF file; never changed.
        data: YAML file, folder of JSONL files, one file, or "demo".
        out: new or empty folder.
        ratio: share of the parameters to remove; wins over `settings`.
        settings: of all stages.
        resume: go on with a run that was stopped.
        chat: ask both models a few questions at the end.
        questions: what to ask.
        trust_remote_code: run Python code that the checkpoint brings along.
        progress: show bars.

    Raises:
        LorashearError: a subclass that says what was wrong with model, data, settings or output folder. Nothing is
            written before all of these were looked at.
    """
    chosen = _with_ratio(settings, ratio)
    run = open_run("compress", model, data, out, chosen, resume, trust_remote_code, progress, teacher_source=str(model))
    said = _answers(run, questions, "full") if chat else []
    first = _dense_and_pruned(run, folder="pruned", adapts=True)
    recovered = _recover(run, first.target, steps=run.steps - run.steps_of(first.tokens))
    rows = [*first.rows, run.row(RECOVERED)]
    written = _answers(run, questions, "small") if chat else []
    if run.settings.reference:
        rows.insert(-2, _reference(run, first.target))
    chats = tuple(zip(questions, said, written, strict=False))
    for folder in ("pruned", ADAPTED_FOLDER):
        shutil.rmtree(run.out / folder, ignore_errors=True)
    return _finish(run, rows, first.tokens + recovered, first.plan, chats)


def prune(
    model: str | Path,
    *,
    data: str | Path,
    out: str | Path,
    ratio: float | None = None,
    settings: CompressSettings | None = None,
    resume: bool = False,
    trust_remote_code: bool = False,
    progress: bool = True,
) -> CompressResult:
    """Analyses (where that decides something), prunes and cuts; the cut model lies in `out/model`.

    Takes what `compress` takes.
    """
    chosen = _with_ratio(settings, ratio)
    run = open_run("prune", model, data, out, chosen, resume, trust_remote_code, progress, teacher_source=str(model))
    first = _dense_and_pruned(run, folder="model", adapts=run.settings.adapt.share is not None)
    return _finish(run, [*first.rows], first.tokens, first.plan)


def recover(
    model: str | Path,
    *,
    data: str | Path,
    out: str | Path,
    settings: CompressSettings | None = None,
    resume: bool = False,
    trust_remote_code: bool = False,
    progress: bool = True,
) -> CompressResult:
    """Fine-tunes a cut model, or any; the result lies in `out/model`.

    `model` is a run folder of `prune` or a model. The rounds are steered by how far each source is behind the full
    model where the run tells, else by the losses themselves. Takes what `compress` takes.
    """
    place, info = _run_or_model(model)
    run = open_run(
        "recover",
        place,
        data,
        out,
        settings or CompressSettings(),
        resume,
        trust_remote_code,
        progress,
        teacher_source=_full_model(model, info),
    )
    rows = [run.row(PRUNED)]
    tokens = _recover(run, _yardstick(run, info), steps=run.steps)
    rows.append(run.row(RECOVERED))
    return _finish(run, rows, tokens, None)


def evaluate(
    model: str | Path,
    *,
    data: str | Path,
    settings: CompressSettings | None = None,
    trust_remote_code: bool = False,
    progress: bool = True,
) -> ResultRow:
    """Perplexity per source and macro, size, tokens per second of a model or of the model in a run folder."""
    settings = settings or CompressSettings()
    place, _ = _run_or_model(model)
    device = resolve_device(settings.device)
    sources = read_sources(data, settings.data)
    weight_dtype = resolve_weight_dtype(settings, place, device, trains=False, trust_remote_code=trust_remote_code)
    loaded = load_model(place, dtype=weight_dtype, device=device, trust_remote_code=trust_remote_code)
    check_window(loaded.model, settings.data.window)
    tokens = tokenize(sources, loaded.tokenizer, settings.data)
    item = loaded.checkpoint_dtype.itemsize
    return measure(loaded.model, tokens, label=str(model), bytes_per_weight=item, progress=progress)


def analyze_run(
    model: str | Path,
    *,
    data: str | Path,
    out: str | Path,
    settings: CompressSettings | None = None,
    trust_remote_code: bool = False,
    progress: bool = True,
) -> Profile:
    """Knowledge distribution of a model: `out/profile.json` and `out/profile.png`; the model is not pruned."""
    settings = settings or CompressSettings()
    run = open_run("analyze", model, data, out, settings, False, trust_remote_code, progress, reaches=False)
    return _profile(run, always=True) or _read_profile(run)


@dataclass(frozen=True)
class _Pruned:
    """What `compress` and `prune` begin with."""

    rows: tuple[ResultRow, ...]
    """The dense, the adapted (where the text is new to it) and the cut model, measured."""
    target: Mapping[str, float]
    """Loss per source of the full model, as it was cut."""
    plan: Plan
    tokens: int
    """Training tokens used."""


def _dense_and_pruned(run: OpenRun, *, folder: str, adapts: bool) -> _Pruned:
    """Measures, adapts, analyses, prunes and cuts; the cut model, saved in `folder`, is the model of the run then.

    A cut alone does not train the full model unasked: methods that cut at once are expected to take no training.
    """
    rows = [run.row(DENSE)]
    target, adapted = _target(run), 0
    if adapts:
        target, adapted = _adapt(run, target, rows)
    plan, walked = _prune(run, _profile(run), folder=folder)
    return _Pruned((*rows, run.row(PRUNED)), target, plan, adapted + walked)


def profile_model(
    model: PreTrainedModel,
    data: TokenData,
    *,
    settings: CompressSettings,
    dtype: torch.dtype | None = None,
    progress: bool = True,
) -> Profile:
    """Knowledge distribution by the method's own saliency (`probing_method`), from calibration windows and held-out ones.

    Args:
        model: left as it was.
        data: text for both.
        settings: all stages'; `prune.method`, `saliency`, `analysis` are used.
        dtype: autocast of both.
        progress: show bars.
    """
    settings = with_preset(settings)
    graph = discover(model)
    method = probing_method(settings.prune)
    scores = calibration_scores(model, graph, data, settings=settings, dtype=dtype, method=method)
    return measure_profile(
        model,
        graph,
        data,
        scores=scores,
        settings=settings.analysis,
        weights=data.weights,
        dtype=dtype,
        progress=progress,
    )


def _target(run: OpenRun) -> dict[str, float]:
    """The full model's losses, which recovery is steered by."""
    if "target" not in run.stages:
        note_stage(run.out, run.info, "target", {"losses": deviation_losses(run.loaded.model, run.data)})
    return dict(run.stages["target"]["losses"])


def _adapt(run: OpenRun, target: dict[str, float], rows: list[ResultRow]) -> tuple[dict[str, float], int]:
    """Teaches the full model the text, where that pays: it is then what is cut, and what is learned from.

    Adds its row; returns the losses that recovery is steered by and the training tokens used.
    """
    if ADAPT_STAGE not in run.stages:
        result = adapt_model(
            run.loaded.model,
            run.data,
            target=target,
            settings=run.settings,
            steps=run.steps,
            out=run.out,
            dtype=run.dtype,
            resume=run.resume,
            checkpoint_every=run.every(run.steps),
            progress=run.progress,
        )
        outcome: dict[str, Any] = {
            "tokens": result.tokens, "seconds": result.seconds, "gain": result.gain, "kept": result.kept,
        }  # fmt: skip
        if result.kept:
            folder = run.save(result.model, ADAPTED_FOLDER)
            del result  # or there would be two models
            run.load(folder)
            outcome["losses"] = deviation_losses(run.loaded.model, run.data)
        run.done(ADAPT_STAGE, outcome)
    stage = run.stages[ADAPT_STAGE]
    if stage["kept"]:
        folder = run.out / ADAPTED_FOLDER
        run.teacher_source = str(folder)
        if PRUNE_STAGE not in run.stages and run.loaded.source != str(folder):
            run.load(folder)
        rows.append(run.row(ADAPTED))
    return dict(stage.get("losses", target)), int(stage["tokens"])


def _profile(run: OpenRun, *, always: bool = False) -> Profile | None:
    """Knowledge distribution, where it decides something (`wants_profile`) or was asked for."""
    if not (always or wants_profile(run.settings)):
        return None
    if "profile" not in run.stages:
        found = profile_model(run.loaded.model, run.data, settings=run.settings, dtype=run.dtype, progress=run.progress)
        found.save(run.out / "profile.json")
        draw_profile(found, run.out / "profile.png")
        note_stage(run.out, run.info, "profile", {"file": "profile.json"})
    return _read_profile(run)


def _read_profile(run: OpenRun) -> Profile:
    return Profile.read(run.out / "profile.json")


def _prune(run: OpenRun, profile: Profile | None, *, folder: str) -> tuple[Plan, int]:
    """Prunes the model of the run and saves it in `folder`; returns the plan and the training tokens used.

    The model is read back afterwards, so that a resumed run goes on from the very numbers that this one does.
    """
    if PRUNE_STAGE not in run.stages:
        result = prune_model(
            run.loaded.model,
            run.data,
            settings=run.settings,
            steps=run.prune_steps,
            out=run.out,
            dtype=run.dtype,
            teacher=run.teacher,
            unprunable=profile.unprunable if profile else (),
            resume=run.resume,
            checkpoint_every=run.every(run.prune_steps),
            progress=run.progress,
        )
        result.plan.save(run.out / "plan.json")
        run.save(result.model, folder)
        run.done(PRUNE_STAGE, {"net": result.net, "tokens": result.tokens, "seconds": result.seconds})
        del result  # or there would be two models
    plan = Plan.read(run.out / "plan.json")
    if RECOVER_STAGE not in run.stages:
        run.load(run.out / folder)
    return plan, int(run.stages[PRUNE_STAGE]["tokens"])


def _recover(run: OpenRun, target: Mapping[str, float], *, steps: int) -> int:
    """Recovers the model of the run and saves it in `model`, from where it is read back; returns the tokens used."""
    if RECOVER_STAGE not in run.stages:
        result = _recovered(run, run.loaded.model, target, name=RECOVER_STAGE, steps=steps)
        run.save(result.model, "model")
        run.done(RECOVER_STAGE, {"tokens": result.tokens, "seconds": result.seconds, "rounds": result.log()})
        del result  # or there would be two models
    run.load(run.out / "model")
    return int(run.stages[RECOVER_STAGE]["tokens"])


def _recovered(
    run: OpenRun, model: PreTrainedModel, target: Mapping[str, float], *, name: str, steps: int
) -> RecoverResult:
    return recover_model(
        model,
        run.data,
        target=target,
        settings=run.settings,
        steps=steps,
        out=run.out,
        dtype=run.dtype,
        teacher=run.teacher,
        name=name,
        resume=run.resume,
        checkpoint_every=run.every(steps),
        progress=run.progress,
    )


def _reference(run: OpenRun, target: Mapping[str, float]) -> ResultRow:
    """The dense model with the same fine-tuning over the whole budget: what the data alone is worth."""
    if REFERENCE not in run.stages:
        run.load(run.source)
        tuned = _recovered(run, run.loaded.model, target, name="reference", steps=run.steps)
        run.loaded = replace(run.loaded, model=tuned.model)
    return run.row(REFERENCE)


def _answers(run: OpenRun, questions: tuple[str, ...], who: str) -> list[str]:
    key = f"answers of the {who} model"
    if key not in run.stages:
        said = answer(run.loaded.model, run.loaded.tokenizer, questions, max_new_tokens=ANSWER_TOKENS)
        note_stage(run.out, run.info, key, {"answers": said})
    return list(run.stages[key]["answers"])


def _finish(
    run: OpenRun, rows: list[ResultRow], tokens: int, plan: Plan | None, chat: tuple[tuple[str, str, str], ...] = ()
) -> CompressResult:
    write_json(run.out / "results.json", [row.to_dict() for row in rows])
    discard_checkpoints(run.out)
    return CompressResult(run.out, tuple(rows), run.out / "model", plan, tokens, chat)


def _with_ratio(settings: CompressSettings | None, ratio: float | None) -> CompressSettings:
    settings = settings or CompressSettings()
    if ratio is None:
        return settings
    values = settings.model_dump()
    values["prune"]["ratio"] = ratio
    return CompressSettings.from_mapping(values)


def _run_or_model(place: str | Path) -> tuple[str | Path, dict[str, Any]]:
    """The model to load and, where it lies in a run folder, what `run.json` tells."""
    folder = Path(place)
    if not (folder / RUN_FILE).is_file() or not (folder / "model").is_dir():
        return place, {}
    return folder / "model", dict(json.loads((folder / RUN_FILE).read_text(encoding="utf-8")))


def _full_model(place: str | Path, info: Mapping[str, Any]) -> str | None:
    """Where the model lies that a run folder's was cut from, if it is still there."""
    stages = info.get("stages", {})
    if stages.get(ADAPT_STAGE, {}).get("kept"):
        source: str | Path | None = Path(place) / ADAPTED_FOLDER
    elif info.get("command") == "recover":  # its own source is the cut model
        source = stages.get("memory", {}).get("full model")
    else:
        source = info.get("model", {}).get("source")
    if not source or Path(source).exists():
        return str(source) if source else None
    return None if Path(source).is_absolute() else str(source)  # a hub id: folders are noted with their whole path


def _yardstick(run: OpenRun, info: Mapping[str, Any]) -> dict[str, float]:
    """The full model's losses, where the run that made the model measured them on the same text; else zeros."""
    stages = info.get("stages", {})
    losses = stages.get(ADAPT_STAGE, {}).get("losses") or stages.get("target", {}).get("losses")
    if losses and info["data"]["sources"] == run.info["data"]["sources"]:
        return dict(losses)
    logger.info("recovery goes by the losses themselves: those of the full model on this text are not known")
    return dict.fromkeys(run.data.names, 0.0)
