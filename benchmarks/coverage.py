"""What lorashear can do with every causal-LM type of transformers, proved on a tiny instance of each.

    python benchmarks/coverage.py --out runs/coverage --write docs/coverage.md

Every type is built small with random weights (`benchmarks/zoo.py`), its node groups are found, and for random plans the
zeroed and the cut model are compared: by replaying the trace, and on the model itself, which is then saved, loaded and
run with a cache. Each type runs in a process of its own; a JSON line a type is appended to OUT/types.jsonl, and a type
that is there already is not repeated.

An "ok" means: for all random plans, max |logit difference| <= 1e-4 * max |logit| in float32.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import json
import tempfile
import time
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from apart import ApartError, run_apart
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

import lorashear as ls
from lorashear.errors import LorashearError
from lorashear.graph.groups import Graph, Kind, NodeGroup
from lorashear.graph.inputs import example_inputs
from lorashear.surgery.saving import save
from lorashear.verify import MODULE_RUNS, TOLERANCE, Verification, verify

KINDS = (Kind.HEADS, Kind.CHANNELS, Kind.EXPERTS, Kind.RESIDUAL, Kind.DEPTH)
TIMEOUT = 900.0


def main() -> None:
    arguments = _arguments()
    zoo = _zoo(arguments.zoo)
    out = Path(arguments.out)
    out.mkdir(parents=True, exist_ok=True)
    path = out / "types.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []
    done = {row["type"] for row in rows}
    for model_type in arguments.types or _types(zoo):
        if model_type not in done:
            row = _in_process(zoo, model_type, arguments.plans)
            print(_line(row), flush=True)
            with path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
            rows.append(row)
    table = render(rows, arguments.plans)
    print(summary(rows))
    if arguments.write:
        Path(arguments.write).write_text(table, encoding="utf-8")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("types", nargs="*", metavar="TYPE")
    parser.add_argument(
        "--zoo", type=Path, default=Path(__file__).with_name("zoo.py"), help="module that builds a type"
    )
    parser.add_argument("--plans", type=int, default=3, help="random plans a kind")
    parser.add_argument("--out", default="runs/coverage")
    parser.add_argument("--write", help="Markdown file for the table")
    return parser.parse_args()


def _zoo(path: Path) -> Any:
    """The module that builds tiny models: `zoo.py` here, or another with `tiny_model` or `build_tiny`."""
    spec = importlib.util.spec_from_file_location("coverage_zoo", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _types(zoo: Any) -> Sequence[str]:
    return tuple(getattr(zoo, "TYPES", ())) or tuple(zoo.NAMES)


def _build(zoo: Any, model_type: str) -> PreTrainedModel:
    if hasattr(zoo, "tiny_model"):
        return zoo.tiny_model(model_type)
    model, _ = zoo.build_tiny(model_type)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0.0, 0.1)
    return model


def _in_process(zoo: Any, model_type: str, plans: int) -> dict[str, Any]:
    try:
        row = run_apart(_examined, zoo, model_type, plans, timeout=TIMEOUT)
    except ApartError as error:
        row = {"error": str(error)}
    return {"type": model_type, **row}


def _examined(zoo: Any, model_type: str, plans: int) -> dict[str, Any]:
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    try:
        return examine(_build(zoo, model_type), plans)
    except Exception as error:  # whatever keeps a type from being examined is what the table has to say about it
        return {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"}


def examine(model: PreTrainedModel, plans: int) -> dict[str, Any]:
    """All findings about one model."""
    model.eval()
    start = time.perf_counter()
    graph = ls.discover(model)
    seconds = time.perf_counter() - start
    result = verify(model, graph, plans=plans)
    return {
        "class": type(model).__name__,
        "seconds": round(seconds, 2),
        "operators": len(graph.inference.trace.nodes) if graph.inference else 0,
        "attention_layers": sorted(_attention_layers(graph)),
        "kinds": {kind.value: _kind(graph, result, kind) for kind in Kind if _of(graph, kind)},
        "together": _worst(result, "all kinds", ("replay", "replay, batch of 2")),
        "together_modules": _worst(result, "all kinds", MODULE_RUNS),
        "cache": _worst(result, None, ("cache",)),
        "share": round(result.prunable_share, 4),
        "saved": _saved(model, graph),
        "reasons": sorted({f"{group.kind.value}: {group.reason}" for group in graph if group.reason})[:12],
        "not_checked": dict(result.not_checked),
    }


def _of(graph: Graph, kind: Kind) -> list[NodeGroup]:
    return [group for group in graph if group.kind is kind]


def _attention_layers(graph: Graph) -> set[int]:
    """Layers in which a softmax runs over the sequence."""
    found = set()
    assert graph.inference is not None
    for site in graph.inference.sites:
        if site.kind == "_softmax" and graph.inference.outside(site.operands[0][1]):
            rest = site.node.module.removeprefix(graph.layers_path + ".").split(".")[0]
            if site.node.module.startswith(graph.layers_path + ".") and rest.isdigit():
                found.add(int(rest))
    return found


def _kind(graph: Graph, result: Verification, kind: Kind) -> dict[str, Any]:
    groups = _of(graph, kind)
    return {
        "groups": len(groups),
        "exact": sum(group.exact for group in groups),
        "realisable": sum(group.realisable for group in groups),
        "plain": sum(group.plain for group in groups),
        "layers": sorted({group.layer for group in groups if group.exact and group.layer is not None}),
        "replay": _worst(result, kind.value, ("replay", "replay, batch of 2")),
        "modules": _worst(result, kind.value, MODULE_RUNS),
    }


def _worst(result: Verification, kind: str | None, ways: Iterable[str]) -> float | None:
    found = [check.difference for check in result.checks if kind in (None, check.kind) and check.how in ways]
    return max(found) if found else None


def _saved(model: PreTrainedModel, graph: Graph) -> dict[str, Any]:
    """Cuts heads and FFN channels, saves, loads: with transformers alone where the configuration can tell the sizes."""
    wanted = [group for group in graph if group.kind in (Kind.HEADS, Kind.CHANNELS) and group.prunable]
    plain = [group for group in wanted if group.plain]
    outcome: dict[str, Any] = {}
    for name, groups in (("stock", plain), ("own", wanted)):
        if groups and not (name == "own" and len(plain) == len(wanted)):
            outcome[name] = _round_trip(model, graph, groups, stock=name == "stock")
    return outcome


def _round_trip(model: PreTrainedModel, graph: Graph, groups: Sequence[NodeGroup], *, stock: bool) -> Any:
    small = copy.deepcopy(model)
    removed = {group.name: tuple(range(group.size // 2)) for group in groups if group.size > 1}
    try:
        ls.cut_(small, graph, ls.Plan(removed=removed, shape="uniform" if stock else "per-layer"))
        with tempfile.TemporaryDirectory() as folder:
            save(small, None, folder)
            again: Any = AutoModelForCausalLM.from_pretrained(folder) if stock else ls.load(folder)
        before, after = _logits(small), _logits(again.eval())
    except LorashearError as error:
        return f"refused: {error}"
    except ValueError as error:  # transformers saves some types under a configuration that its Auto classes do not know
        return f"not read back: {' '.join(str(error).split())[:80]}"
    return float((before - after).abs().max() / before.abs().max())


def _logits(model: Any) -> Tensor:
    with torch.no_grad():
        out = model(**example_inputs(model))
    logits: Tensor = out.logits if hasattr(out, "logits") else out[0]
    return logits


def _proved(row: dict[str, Any], kind: Kind, how: str) -> bool | None:
    """Whether a kind's checks were all equal; None where the type has no such group."""
    found = row.get("kinds", {}).get(kind.value)
    if found is None or not found["exact"]:
        return None if found is None else False
    return found[how] is not None and found[how] <= TOLERANCE


def _line(row: dict[str, Any]) -> str:
    if "error" in row:
        return f"{row['type']:28} {row['error']}"
    cells = [f"{kind.value} {_cell(row, kind)}" for kind in KINDS]
    return f"{row['type']:28} {row['seconds']:6.1f} s  " + "  ".join(cells) + f"  saved {row['saved']}"


def _cell(row: dict[str, Any], kind: Kind) -> str:
    found = row.get("kinds", {}).get(kind.value)
    if found is None:
        return ""
    if not found["exact"]:
        return "pinned"
    bad = [found[how] for how in ("replay", "modules") if found[how] is not None and not found[how] <= TOLERANCE]
    if bad:
        return f"**{max(bad):.1e}**"
    if found["modules"] is None:
        return "exact"
    return "plain" if found["plain"] == found["exact"] else "own" if found["realisable"] == found["exact"] else "part"


def summary(rows: Sequence[dict[str, Any]]) -> str:
    """Counts over all types."""
    built = [row for row in rows if "error" not in row]
    attention = [row for row in built if row["attention_layers"]]
    in_every_layer = [r for r in attention if set(r["attention_layers"]) <= set(_layers(r, Kind.HEADS))]
    lines = [f"- {len(built)} of {len(rows)} types were built, traced and examined"]
    for kind in KINDS:
        exact = [row for row in built if _proved(row, kind, "replay")]
        real = [row for row in built if _proved(row, kind, "modules")]
        stock = [row for row in real if row["kinds"][kind.value]["plain"]]
        lines.append(
            f"- {kind.value}: proven by replay on {len(exact)}, cut for real and equal on {len(real)}, "
            f"of these in a plain configuration on {len(stock)}"
        )
    lines.append(
        f"- heads in every attention layer: {len(in_every_layer)} of {len(attention)} types with softmax attention"
    )
    together = [row for row in built if row["together"] is not None and row["together"] <= TOLERANCE]
    wrong = [row["type"] for row in built if _wrong(row)]
    lines.append(f"- all groups together exact: {len(together)}")
    lines.append(f"- silently wrong: {len(wrong)} {', '.join(wrong)}".rstrip())
    return "\n".join(lines)


def _layers(row: dict[str, Any], kind: Kind) -> list[int]:
    layers: list[int] = row["kinds"].get(kind.value, {}).get("layers", [])
    return layers


def _wrong(row: dict[str, Any]) -> bool:
    found = [value for kind in row["kinds"].values() for value in (kind["replay"], kind["modules"])]
    found += [row["together"], row["together_modules"], *(v for v in row["saved"].values() if isinstance(v, float))]
    return any(value is not None and not value <= TOLERANCE for value in found)


def render(rows: Sequence[dict[str, Any]], plans: int) -> str:
    """The Markdown page."""
    head = ["type", *(kind.value for kind in KINDS), "all together", "saved, loaded", "with cache", "prunable", "s"]
    lines = [
        INTRODUCTION.format(version=transformers.__version__, plans=plans),
        summary(rows),
        "",
        "| " + " | ".join(head) + " |",
    ]
    lines.append("|" + "---|" * len(head))
    for row in sorted(rows, key=lambda row: row["type"]):
        if "error" in row:
            continue
        saved = row["saved"]
        cells = [
            row["type"],
            *(_cell(row, kind) for kind in KINDS),
            "" if row["together"] is None else f"{row['together']:.0e}",
            ", ".join(
                f"{k} ok" if isinstance(v, float) and v <= TOLERANCE else f"{k} {v}"[:60] for k, v in saved.items()
            ),
            "" if row["cache"] is None else "ok" if row["cache"] <= TOLERANCE else f"**{row['cache']:.0e}**",
            f"{row['share']:.0%}",
            f"{row['seconds']:.1f}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    failed = [row for row in rows if "error" in row]
    if failed:
        lines += ["", "## Types that could not be examined", "", "| type | why |", "|---|---|"]
        lines += [
            f"| {row['type']} | {_escaped(row['error'])} |" for row in sorted(failed, key=lambda row: row["type"])
        ]
    lines += ["", "## Why groups are pinned or not realisable", "", "| type | reasons |", "|---|---|"]
    for row in sorted(rows, key=lambda row: row["type"]):
        told = [r for r in row.get("reasons", []) if r.split(":")[0] in {k.value for k in KINDS}]
        if told:
            lines.append(f"| {row['type']} | {_escaped('; '.join(told))} |")
    return "\n".join(lines) + "\n"


def _escaped(text: str) -> str:
    return text.replace("|", "\\|")


INTRODUCTION = """# Which models work

Made by `python benchmarks/coverage.py --plans {plans} --write docs/coverage.md` with transformers {version}: every
registered causal-LM type as a tiny random instance, compared for random plans ({plans} a kind) with zeroed structures
(see the script). *plain*: cut for real, and the configuration tells the new sizes, so that stock tools load it.
*own*: cut for real, loads with `lorashear.load`.
*part*: cut for real in some layers or branches. *exact*: proven by replaying the trace, but the model's own modules
cannot be built so. *pinned*: not prunable, with the reason below. An empty cell: the type has no such structure.
Seconds are those of `discover`.
"""


if __name__ == "__main__":
    main()
