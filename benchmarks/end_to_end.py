"""Which causal-LM types of transformers can be pruned from beginning to end: scored, walked to zero, cut, saved, loaded.

    python benchmarks/end_to_end.py --out runs/end_to_end

Every type is built small with random weights (`benchmarks/zoo.py`) and loses a tenth of its decoder by `one-shot` and by
`lhspg` (six steps), in the uniform shape and, where its configuration cannot tell such widths, with widths of its own. What
was saved is loaded again, and has to give the same logits. Each type runs in a process of its own; a JSON line a type is
appended to OUT/types.jsonl, and a type that is there already is not repeated. `--bfloat16` holds the weights in that format.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import warnings
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
import zoo
from apart import ApartError, run_apart

import lorashear as ls
from lorashear.config import CompressSettings
from lorashear.data.packing import TokenData, TokenSource
from lorashear.errors import LorashearError
from lorashear.pruning.prune import prune_model
from lorashear.surgery.saving import save

METHODS = ("one-shot", "lhspg")
SHAPES = ("uniform", "per-layer")
STEPS, BATCH, WINDOW = 6, 4, 16
TIMEOUT = 600.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("types", nargs="*", metavar="TYPE")
    parser.add_argument("--ratio", type=float, default=0.1, help="share of the decoder layers' parameters")
    parser.add_argument("--bfloat16", action="store_true", help="weights held and trained in bfloat16")
    parser.add_argument("--out", type=Path, default=Path("runs/end_to_end"))
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    path = arguments.out / "types.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []
    done = {row["type"] for row in rows}
    for model_type in arguments.types or [each for each in zoo.TYPES if each not in zoo.UNUSABLE]:
        if model_type not in done:
            row = _in_process(model_type, arguments.ratio, arguments.bfloat16)
            print(json.dumps(row), flush=True)
            with path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
            rows.append(row)
    print(summary(rows))


def _in_process(model_type: str, ratio: float, bfloat16: bool) -> dict[str, Any]:
    try:
        row = run_apart(_examined, model_type, ratio, bfloat16, timeout=TIMEOUT)
    except ApartError as error:
        row = {"failed": str(error)}
    return {"type": model_type, **row}


def _examined(model_type: str, ratio: float, bfloat16: bool) -> dict[str, Any]:
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    return {method: examine(model_type, method, ratio, bfloat16=bfloat16) for method in METHODS}


def examine(model_type: str, method: str, ratio: float, *, bfloat16: bool = False) -> dict[str, Any]:
    """The first shape that works, or why the last one was refused, or what failed."""
    outcome: dict[str, Any] = {}
    for shape in SHAPES:
        try:
            return {"shape": shape, **_pruned(model_type, method, shape, ratio, bfloat16)}
        except LorashearError as error:
            outcome = {"refused": " ".join(str(error).split())[:300]}
        except Exception as error:  # whatever it is, it is a defect that the table has to show
            return {"failed": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}
    return outcome


def _pruned(model_type: str, method: str, shape: str, ratio: float, bfloat16: bool) -> dict[str, Any]:
    dtype = torch.bfloat16 if bfloat16 else None
    model = zoo.tiny_model(model_type)
    if dtype is not None:  # as a checkpoint loads: buffers stay float32
        for parameter in model.parameters():
            parameter.data = parameter.data.to(dtype if parameter.is_floating_point() else parameter.dtype)
    prune = {"method": method, "ratio": ratio, "ratio_of": "decoder", "shape": shape, "round_to": 4, "periods": 2}
    settings = CompressSettings.from_mapping(
        {
            "dtype": "bfloat16" if bfloat16 else "float32",
            "batch": BATCH,
            "micro_batch": 2,
            "prune": prune,
            "data": {"calibration_windows": 8},
        }
    )
    windows = torch.randint(*zoo.IDS, (44, WINDOW), generator=torch.Generator().manual_seed(0))
    data = TokenData((TokenSource("made up", "text", windows[:40], windows[40:]),), separator_id=0, window=WINDOW)
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder)
        result = prune_model(model, data, settings=settings, steps=STEPS, out=out, dtype=dtype, progress=False)
        save(result.model, None, out / "model")
        again = ls.load(out / "model").eval()
        with torch.no_grad():
            models = (again.float().eval(), result.model.float().eval())
            logits, wanted = (zoo.logits(each(input_ids=windows[:2])) for each in models)
    difference = float((logits - wanted).abs().max() / wanted.abs().max())
    if not difference <= 1e-4:
        raise ValueError(f"what was saved gives other logits: {difference:.1e} of the largest")
    return {"net": round(result.net, 3), "difference": difference}


def summary(rows: Sequence[dict[str, Any]]) -> str:
    """How many types a method comes through with, by shape."""
    lines = []
    for method in METHODS:
        found = Counter(_verdict(row.get(method, row)) for row in rows)
        lines.append(
            f"{method}: {', '.join(f'{count} {verdict}' for verdict, count in found.most_common())} of {len(rows)}"
        )
    return "\n".join(lines)


def _verdict(outcome: dict[str, Any]) -> str:
    return str(outcome.get("shape", "refused" if "refused" in outcome else "failed"))


if __name__ == "__main__":
    main()
