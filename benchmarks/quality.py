"""Quality of the small model: methods side by side, same recovery, same token budget.

    python benchmarks/quality.py MODEL DATA --methods lhspg random magnitude --ratios 0.2 0.5 --seeds 3

One JSON line a run is appended to OUT/runs.jsonl; a run that is there already is not repeated, so the script can be
stopped and started again. At the end the whole table is printed and written to OUT/table.md.

`--source code` adds columns with that source's own perplexity, for runs that weigh it (`--set data.weights.code=4`).

A method may carry the kinds it may cut after a colon: `magnitude:ffn-channels`. `dense` is the dense model with the
same fine-tuning over the whole budget.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from transformers import PreTrainedModel

from lorashear.config import CompressSettings
from lorashear.data.packing import TokenData, tokenize
from lorashear.data.sources import read_sources
from lorashear.evaluation.perplexity import evaluate_perplexity
from lorashear.graph.discover import discover
from lorashear.models import load_model
from lorashear.pipeline import profile_model
from lorashear.pruning.methods import method_of
from lorashear.pruning.prune import prune_model, walk_steps
from lorashear.recovery.recover import deviation_losses, recover_model
from lorashear.settings_file import read_settings
from lorashear.training import Teacher


def main() -> None:
    arguments = _arguments()
    torch.set_num_threads(arguments.threads)
    out = Path(arguments.out)
    out.mkdir(parents=True, exist_ok=True)
    runs = out / "runs.jsonl"
    done = [json.loads(line) for line in runs.read_text().splitlines()] if runs.is_file() else []
    known = {(run["method"], run["ratio"], run["seed"]) for run in done}
    base = read_settings(file=arguments.config, assignments=["data.render=text", *arguments.set])
    loaded = load_model(arguments.model)
    data = tokenize(read_sources(arguments.data, base.data), loaded.tokenizer, base.data)
    target = deviation_losses(loaded.model, data)
    if not any(run["method"] == "whole" for run in done):
        row = _row("whole", 0.0, 0, before=evaluate_perplexity(loaded.model, data, progress=False).to_dict())
        _append(runs, row)
    for seed in range(arguments.first_seed, arguments.first_seed + arguments.seeds):
        for method, ratio in _cases(arguments.methods, arguments.ratios):
            if (method, ratio, seed) not in known:
                print(f"{method} at {ratio:.0%}, seed {seed}", flush=True)
                _append(runs, _run(arguments.model, data, target, _settings(base, method, ratio, seed), method, ratio))
    table = render([json.loads(line) for line in runs.read_text().splitlines()], arguments.source)
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
) -> dict[str, Any]:
    start = time.perf_counter()
    small = load_model(model).model
    steps = settings.tokens // (settings.batch * data.window)
    dtype = None if settings.dtype == "float32" else torch.bfloat16
    teacher = _teacher(model, settings, dtype)
    with tempfile.TemporaryDirectory() as folder:
        out, used, net, widths, before = Path(folder), 0, 0.0, {}, None
        if method != "dense":
            walk = walk_steps(settings.prune, steps) if method_of(settings.prune).walks else 0
            graph = discover(small)
            unprunable = _unprunable(small, data, settings, dtype)
            pruned = prune_model(
                small, data, settings=settings, steps=walk, out=out, dtype=dtype, teacher=teacher,
                unprunable=unprunable, progress=False,
            )  # fmt: skip
            small, net = pruned.model, pruned.net
            used = pruned.tokens // (settings.batch * data.window)
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
    return _row(method, ratio, settings.seed, before=before, after=after, net=net, widths=widths, tokens=tokens,
                seconds=round(seconds), settings=settings.model_dump())  # fmt: skip


def _unprunable(
    model: PreTrainedModel, data: TokenData, settings: CompressSettings, dtype: torch.dtype | None
) -> tuple[str, ...]:
    if not settings.wants_profile:
        return ()
    return profile_model(model, data, settings=settings, dtype=dtype, progress=False).unprunable


def _teacher(model: str, settings: CompressSettings, dtype: torch.dtype | None) -> Teacher | None:
    if settings.distill.teacher == "off" or not settings.distill.weight:
        return None
    return Teacher(load_model(model, dtype=dtype or torch.float32).model.eval(), settings.distill.weight)


def _row(method: str, ratio: float, seed: int, **values: Any) -> dict[str, Any]:
    return {"method": method, "ratio": ratio, "seed": seed, **values}


def _append(path: Path, row: dict[str, Any]) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


def render(runs: Sequence[dict[str, Any]], source: str | None = None) -> str:
    """Markdown: one line a method and ratio, mean over its seeds and the spread (largest minus smallest)."""
    head = ["method", "ratio", "seeds", "net", "before recovery", "after", "spread", "excess (ln)", "worst source", "s"]
    head += [f"{source} before", f"{source} after"] if source else []
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    whole = next(run for run in runs if run["method"] == "whole")
    dense = [run["after"]["macro"] for run in runs if run["method"] == "dense"]
    own = f" {whole['before']['per_source'][source]:.2f} | |" if source else ""
    lines.append(f"| whole model | | | | {whole['before']['macro']:.2f} | | | | | |{own}")
    groups: dict[tuple[str, float], list[dict[str, Any]]] = {}
    for run in runs:
        if run["method"] != "whole":
            groups.setdefault((run["method"], run["ratio"]), []).append(run)
    for (method, ratio), each in sorted(groups.items(), key=lambda item: (item[0][1], item[0][0] != "lhspg", item[0])):
        after = [run["after"]["macro"] for run in each]
        logs = [math.log(value) for value in after]
        before = [run["before"]["macro"] for run in each if run.get("before")]
        excess = f"{mean(logs) - mean(map(math.log, dense)):.4f}" if dense else ""
        worst = max(each[0]["after"]["per_source"].items(), key=lambda item: item[1])
        cells = [
            method if method != "dense" else "dense + same fine-tuning",
            f"{ratio:.0%}" if ratio else "",
            str(len(each)),
            f"{mean(run['net'] for run in each):.1%}" if ratio else "",
            f"{mean(before):.2f}" if before else "",
            f"**{math.exp(mean(logs)):.2f}**",
            f"{max(logs) - min(logs):.4f}" if len(each) > 1 else "",
            excess,
            f"{worst[0]} {worst[1]:.1f}",
            f"{mean(run['seconds'] for run in each):.0f}",
            *(_of_source(each, source) if source else ()),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _of_source(runs: Sequence[dict[str, Any]], source: str) -> list[str]:
    """Geometric means of the source's perplexity, before and after recovery."""
    cells = []
    for when in ("before", "after"):
        logs = [math.log(run[when]["per_source"][source]) for run in runs if run.get(when)]
        cells.append(f"{math.exp(mean(logs)):.2f}" if logs else "")
    return cells


if __name__ == "__main__":
    main()
