"""What LHSPG's step costs beside plain LoRA training: time and peak memory, same model, data and run.

    python benchmarks/overhead.py MODEL DATA --steps 40

Both sides train the same adapters on the same windows with AdamW through the same Trainer; one of them walks. They take
turns, block by block, so that a machine that slows down slows both, and the ratio is the median over pairs of blocks.
Memory is the peak of a process that does nothing else, one process a side.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
from peft import PeftModel

from lorashear.config import CompressSettings
from lorashear.data.packing import TokenData, tokenize
from lorashear.data.sources import read_sources
from lorashear.graph.discover import discover
from lorashear.models import load_model
from lorashear.pruning.gates import StructureGates
from lorashear.pruning.lhspg import LHSPG, WalkSchedule
from lorashear.pruning.prune import PeriodChooser
from lorashear.settings_file import read_settings
from lorashear.training import attach_lora


def main() -> None:
    arguments = _arguments()
    torch.set_num_threads(arguments.threads)
    if arguments.side:
        side = Side(arguments, walks=arguments.side == "lhspg")
        side.run(arguments.steps)
        print(json.dumps({"peak": _own_peak()}))
        return
    peaks = {side: _peak(side) for side in ("plain", "lhspg")}
    times = _times(arguments)
    ratio = median(walk / plain for plain, walk in zip(times["plain"], times["lhspg"], strict=True))
    report = {
        "model": arguments.model,
        "shrink": arguments.shrink,
        "steps": arguments.steps,
        "seconds a step, plain LoRA + AdamW (median)": round(median(times["plain"]), 4),
        "seconds a step, LHSPG (median)": round(median(times["lhspg"]), 4),
        "time ratio (median over pairs)": round(ratio, 4),
        "peak memory, plain (MiB)": round(peaks["plain"] / 2**20),
        "peak memory, LHSPG (MiB)": round(peaks["lhspg"] / 2**20),
        "memory ratio": round(peaks["lhspg"] / peaks["plain"], 4),
    }
    for name, value in report.items():
        print(f"{name:48} {value}")
    if arguments.out:
        Path(arguments.out).write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("data")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--shrink", choices=["gates", "slices"], default="gates")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--bfloat16", action="store_true")
    parser.add_argument("--out")
    parser.add_argument("--side", choices=["plain", "lhspg"], help=argparse.SUPPRESS)
    return parser.parse_args()


class Side:
    """A model with adapters and its optimizer, stepped from outside."""

    def __init__(self, arguments: argparse.Namespace, *, walks: bool) -> None:
        assign = ["prune.train=adapters", f"prune.shrink={arguments.shrink}", "data.render=text", "data.eval_windows=1"]
        self.settings = read_settings(assignments=[*assign, "prune.ratio_of=decoder", "data.max_train_tokens=200000"])
        self.batch, self.bfloat16 = arguments.batch, arguments.bfloat16
        loaded = load_model(arguments.model)
        self.data: TokenData = tokenize(
            read_sources(arguments.data, self.settings.data), loaded.tokenizer, self.settings.data
        )
        self.windows = self.data.calibration(arguments.steps * arguments.batch)
        self.model = attach_lora(loaded.model, self.settings.lora)
        adamw = torch.optim.AdamW([p for p in self.model.parameters() if p.requires_grad], lr=1e-3)
        self.optimizer: torch.optim.Optimizer = adamw
        if walks:
            self.optimizer = _lhspg(self.model, adamw, self.settings, arguments.steps)
        self.at = 0
        self.model.train()

    def run(self, steps: int) -> float:
        """Seconds a step."""
        start = time.perf_counter()
        for _ in range(steps):
            first = self.at * self.batch % len(self.windows)
            input_ids = self.windows[first : first + self.batch]
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=self.bfloat16):
                loss = self.model(input_ids=input_ids, labels=input_ids, use_cache=False).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_([p for p in self.model.parameters() if p.requires_grad], 1.0)
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.at += 1
        return (time.perf_counter() - start) / steps


def _lhspg(model: PeftModel, base: torch.optim.Optimizer, settings: CompressSettings, steps: int) -> LHSPG:
    graph = discover(model)
    gates = StructureGates(model, graph.gated)
    gates.metering = True
    return LHSPG(
        base,
        model=model,
        graph=graph,
        schedule=WalkSchedule(steps // 5, settings.prune.periods, steps),
        choose=PeriodChooser(model, graph, gates, settings, (), periods=settings.prune.periods),
        gates=gates,
        shrink=settings.prune.shrink,
    )


def _times(arguments: argparse.Namespace) -> dict[str, list[float]]:
    sides = {"plain": Side(arguments, walks=False), "lhspg": Side(arguments, walks=True)}
    for side in sides.values():
        side.run(1)  # first steps allocate
    times: dict[str, list[float]] = {name: [] for name in sides}
    for pair in range(arguments.steps - 1):
        for name in sorted(sides, reverse=bool(pair % 2)):
            times[name].append(sides[name].run(1))
    return times


def _peak(side: str) -> int:
    """Peak resident memory in bytes of a process that only trains."""
    with tempfile.TemporaryDirectory():
        done = subprocess.run([sys.executable, *sys.argv, "--side", side], check=True, capture_output=True, text=True)
    report: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return int(report["peak"])


def _own_peak() -> int:
    """Peak resident memory of this process in bytes.

    Linux carries `ru_maxrss` over from the process that started this one; the high-water mark of the address space is
    this program's own.
    """
    status = Path("/proc/self/status")
    if status.is_file():
        line = next(line for line in status.read_text(encoding="ascii").splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == "__main__":
    main()
