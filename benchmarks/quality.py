"""Quality of the small model: methods side by side, same recovery, same token budget.

    python benchmarks/quality.py MODEL DATA --methods lhspg random magnitude --ratios 0.2 0.5 --seeds 3

One JSON line a run is appended to OUT/runs.jsonl; a run that is there already is not repeated, so the script can be
stopped and started again. At the end the whole table is printed and written to OUT/table.md: perplexities before and
after recovery and per source, the excess over `dense` and over REFERENCE, zero-shot accuracy where `--tasks` names a folder
with tasks of lm-evaluation-harness, training tokens and seconds (the tasks' left out).

`--source code` adds columns with that source's own perplexity before and after recovery, for runs that weigh it
(`--set data.weights.code=4`).

A method may carry the kinds it may cut after a colon: `magnitude:ffn-channels`. `dense` is the dense model with the
same fine-tuning over the whole budget. `--save FOLDER` keeps the recovered models as FOLDER/METHOD-RATIO-SEED, for
`benchmarks/zeroshot.py` and `benchmarks/writing.py`.
"""

from __future__ import annotations

import argparse
import copy
import json
import logging
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from quality_table import render
from transformers import PreTrainedModel

from lorashear.config import CompressSettings
from lorashear.data.packing import TokenData, tokenize
from lorashear.data.sources import read_sources
from lorashear.devices import resolve_device
from lorashear.evaluation.perplexity import evaluate_perplexity
from lorashear.evaluation.tasks import evaluate_task, task_names
from lorashear.graph.discover import discover
from lorashear.models import LoadedModel, load_model
from lorashear.pipeline import profile_model
from lorashear.pruning.methods import method_of, wants_profile
from lorashear.pruning.prune import prune_model, walk_steps
from lorashear.recovery.adapt import adapt_model
from lorashear.recovery.recover import deviation_losses, recover_model
from lorashear.settings_file import read_settings
from lorashear.surgery.saving import save
from lorashear.training import Teacher


def main() -> None:
    arguments = _arguments()
    torch.set_num_threads(arguments.threads)
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    out = Path(arguments.out)
    out.mkdir(parents=True, exist_ok=True)
    runs = out / "runs.jsonl"
    done = [json.loads(line) for line in runs.read_text().splitlines()] if runs.is_file() else []
    known = {(run["method"], run["ratio"], run["seed"]) for run in done}
    base = read_settings(file=arguments.config, assignments=["data.render=text", *arguments.set])
    loaded = load_model(arguments.model, device=resolve_device(base.device))
    data = tokenize(read_sources(arguments.data, base.data), loaded.tokenizer, base.data)
    target = deviation_losses(loaded.model, data)
    if not any(run["method"] == "whole" for run in done):
        before = evaluate_perplexity(loaded.model, data, progress=False).to_dict()
        _append(runs, _row("whole", 0.0, 0, before=before, zeroshot=_zeroshot(loaded.model, loaded, base, arguments)))
    for seed in range(arguments.first_seed, arguments.first_seed + arguments.seeds):
        for method, ratio in _cases(arguments.methods, arguments.ratios):
            if (method, ratio, seed) not in known:
                print(f"{method} at {ratio:.0%}, seed {seed}", flush=True)
                settings = _settings(base, method, ratio, seed)
                small, row = _run(arguments.model, data, target, settings, method, ratio)
                if arguments.save:
                    name = f"{method.replace(':', '_')}-{ratio:g}-{seed}"
                    save(small.to(loaded.checkpoint_dtype), loaded.tokenizer, arguments.save / name)
                _append(runs, row | {"zeroshot": _zeroshot(small, loaded, base, arguments)})
    rows = [json.loads(line) for line in runs.read_text().splitlines()]
    table = render(rows, reference=arguments.reference, source=arguments.source)
    (out / "table.md").write_text(table, encoding="utf-8")
    print(table)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("data")
    parser.add_argument("--methods", nargs="+", default=["dense", "lhspg", "random", "magnitude"])
    parser.add_argument("--ratios", nargs="+", type=float, default=[0.2, 0.5])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--out", default="runs/quality")
    parser.add_argument("--source", help="also show this source's perplexity")
    parser.add_argument("--config", type=Path)
    parser.add_argument("--set", nargs="*", default=[])
    parser.add_argument("--reference", type=float, help="macro perplexity of a second reference")
    parser.add_argument("--tasks", type=Path, help="folder with tasks of lm-evaluation-harness")
    parser.add_argument("--save", type=Path, help="folder for the recovered models")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    return parser.parse_args()


def _cases(methods: Sequence[str], ratios: Sequence[float]) -> Iterator[tuple[str, float]]:
    for method in methods:
        for ratio in [0.0] if method == "dense" else ratios:
            yield method, ratio


def _settings(base: CompressSettings, method: str, ratio: float, seed: int) -> CompressSettings:
    values = base.model_dump()
    values["seed"] = seed
    if method != "dense":
        name, _, kinds = method.partition(":")
        values["prune"] |= {"method": name, "ratio": ratio, "ratio_of": "decoder"}
        if kinds:
            values["prune"]["kinds"] = kinds.split("+")
    return CompressSettings.from_mapping(values)


def _run(
    model: str, data: TokenData, target: dict[str, float], settings: CompressSettings, method: str, ratio: float
) -> tuple[PreTrainedModel, dict[str, Any]]:
    start = time.perf_counter()
    small = load_model(model, device=resolve_device(settings.device)).model
    steps = settings.tokens // (settings.batch * data.window)
    dtype = None if settings.dtype == "float32" else torch.bfloat16
    with tempfile.TemporaryDirectory() as folder:
        out, used, net, widths, before = Path(folder), 0, 0.0, {}, None
        if method != "dense":
            adapted = adapt_model(
                small, data, target=target, settings=settings, steps=steps, out=out, dtype=dtype, progress=False
            )
            small, used = adapted.model, adapted.tokens // (settings.batch * data.window)
            target = deviation_losses(small, data) if adapted.kept else target
        teacher = _teacher(small, settings, dtype)
        if method != "dense":
            walk = walk_steps(settings.prune, steps) if method_of(settings.prune).trains else 0
            graph = discover(small)
            unprunable = _unprunable(small, data, settings, dtype)
            pruned = prune_model(
                small, data, settings=settings, steps=walk, out=out, dtype=dtype, teacher=teacher,
                unprunable=unprunable, progress=False,
            )  # fmt: skip
            small, net = pruned.model, pruned.net
            used += pruned.tokens // (settings.batch * data.window)
            removed = pruned.plan.removed
            one_each = settings.prune.shape == "uniform"
            widths = {
                g.role if one_each else g.name: g.size - len(removed.get(g.name, ()))
                for g in graph
                if g.gated or g.name in removed
            }
            before = evaluate_perplexity(small, data, progress=False).to_dict()
        recovered = recover_model(
            small, data, target=target, settings=settings, steps=steps - used, out=out, dtype=dtype, teacher=teacher,
            progress=False,
        )  # fmt: skip
    after = evaluate_perplexity(recovered.model, data, progress=False).to_dict()
    tokens = steps * settings.batch * data.window
    seconds = time.perf_counter() - start
    row = _row(method, ratio, settings.seed, before=before, after=after, net=net, widths=widths, tokens=tokens,
               seconds=round(seconds), settings=settings.model_dump())  # fmt: skip
    return recovered.model, row


def _zeroshot(
    model: PreTrainedModel, loaded: LoadedModel, settings: CompressSettings, arguments: argparse.Namespace
) -> dict[str, list[int]] | None:
    """Task -> every item's result; the model is left in the dtype that the settings compute in."""
    if arguments.tasks is None:
        return None
    model.to(torch.float32 if settings.dtype == "float32" else torch.bfloat16)
    return {
        name: [int(value) for value in evaluate_task(model, loaded.tokenizer, arguments.tasks, name).quoted]
        for name in task_names(arguments.tasks)
    }


def _unprunable(
    model: PreTrainedModel, data: TokenData, settings: CompressSettings, dtype: torch.dtype | None
) -> tuple[str, ...]:
    if not wants_profile(settings):
        return ()
    return profile_model(model, data, settings=settings, dtype=dtype, progress=False).unprunable


def _teacher(model: PreTrainedModel, settings: CompressSettings, dtype: torch.dtype | None) -> Teacher | None:
    """A copy of the model as it is before the cut."""
    if settings.distill.teacher == "off" or not settings.distill.weight:
        return None
    full = copy.deepcopy(model).to(dtype or torch.float32).eval().requires_grad_(False)
    return Teacher(full, settings.distill.weight)


def _row(method: str, ratio: float, seed: int, **values: Any) -> dict[str, Any]:
    return {"method": method, "ratio": ratio, "seed": seed, **values}


def _append(path: Path, row: dict[str, Any]) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
