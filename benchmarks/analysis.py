"""What the knowledge profile costs with cached prefixes, beside naive probing with whole forward passes.

    python benchmarks/analysis.py MODEL DATA --threads 1

Both probe the same structures of the same windows in one process and take turns, probe by probe; the deviations have to
be equal to the last bit. The bound is what no scheme that caches whole layers can beat: a probe of layer l of L needs
the L - l layers from there on and what is outside the layers (embedding, final norm, head, loss). Averaged over layers
that is (L + 1) / 2L of the layers' share of a pass, plus all of the rest; the shares are measured.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, median

import torch
from torch import Tensor, nn

from lorashear.analysis.profile import TRIAL_TOKENS, CachedProbes, Probe, window_losses
from lorashear.analysis.saliency import random_scores
from lorashear.config import AnalysisSettings
from lorashear.data.packing import TokenData, tokenize
from lorashear.data.sources import read_sources
from lorashear.evaluation.inference import autocast
from lorashear.evaluation.perplexity import windows_per_pass
from lorashear.graph.discover import discover
from lorashear.graph.groups import Graph
from lorashear.models import load_model
from lorashear.settings_file import read_settings


def main() -> None:
    arguments = _arguments()
    torch.set_num_threads(arguments.threads)
    settings = read_settings(assignments=["data.render=text", "data.eval_windows=1", "data.max_train_tokens=20000"])
    loaded = load_model(arguments.model)
    data = tokenize(read_sources(arguments.data, settings.data), loaded.tokenizer, settings.data)
    model: nn.Module = loaded.model.eval()
    graph = discover(model)
    chosen = _layers(graph.num_layers, arguments.layers)
    dtype = torch.bfloat16 if arguments.bfloat16 else None
    with torch.no_grad(), autocast("cpu", dtype):
        costs = compare(model, graph, _windows(data, arguments.sources), chosen)
    report = {
        "model": Path(arguments.model).name,
        "format": "bfloat16 autocast" if dtype else str(next(model.parameters()).dtype).removeprefix("torch."),
        "probes": costs.probes,
        "layers probed": f"{len(chosen)} of {graph.num_layers}",
        "windows": costs.windows,
        "windows a pass": costs.windows_per_pass,
        "deviations equal to the last bit": costs.equal,
        "seconds, naive": round(costs.naive, 3),
        "seconds, cached prefixes": round(costs.cached, 3),
        "seconds once a profile, where replays may start": round(costs.trial, 3),
        "layers' share of a pass": round(costs.layers_share, 4),
        "ratio (cached / naive, both with the whole model)": round(costs.ratio, 4),
        "ratio of a probe (mean over layers of the median)": round(costs.probe_ratio, 4),
        "bound of a probe": round(costs.bound, 4),
        "above the bound": f"{costs.probe_ratio / costs.bound - 1:+.1%}",
    }
    for name, value in report.items():
        print(f"{name:52} {value}")
    if arguments.out:
        report |= {"deviations": costs.deviations}
        Path(arguments.out).write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("data")
    parser.add_argument("--sources", type=int, help="one window of each of the first so many sources (default: of all)")
    parser.add_argument("--layers", type=int, help="probe so many layers, evenly spaced (default: all)")
    parser.add_argument("--bfloat16", action="store_true", help="autocast, as `analyze` does where it is faster")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", help="JSON file of the report and of each probe's deviation")
    return parser.parse_args()


@dataclass(frozen=True)
class Costs:
    """Seconds of both sides for the same probes."""

    probes: int
    windows: int
    windows_per_pass: int
    equal: bool
    naive: float
    """Whole passes, one of the whole model and one a probe."""
    cached: float
    """The same with cached prefixes, the recording included."""
    trial: float
    """Finding out from which layers a replay may start: once a profile, whatever its windows and probes."""
    layers_share: float
    """Share of a whole pass that is spent inside decoder layers."""
    bound: float
    """Least ratio of a probe's cost, with the layers that were probed here."""
    probe_ratio: float
    """Ratio of a probe's cost, without recording and trial."""
    deviations: list[float]
    """Nats per token, of each probe, mean over the windows: to compare number formats by."""

    @property
    def ratio(self) -> float:
        return self.cached / self.naive


def compare(model: nn.Module, graph: Graph, windows: Tensor, chosen: Sequence[int]) -> Costs:
    """Runs both sides; `windows` is `(windows, window)` token ids, `chosen` the layers whose groups are probed."""
    scores = random_scores(graph.gated, seed=0)
    removed = AnalysisSettings().probe
    groups = [g for g in graph.gated if g.size > 1 and g.consumers and g.layer in chosen]
    probes = [Probe(model, g, scores[g.name].argsort()[: max(1, round(removed * g.size))]) for g in groups]
    batches = torch.split(windows, windows_per_pass(model, windows.shape[1]))
    window_losses(model, batches[0])  # the first pass allocates
    start = time.perf_counter()
    cached = CachedProbes(model, graph, probes, windows[:1, :TRIAL_TOKENS])
    trial = time.perf_counter() - start
    turns = [_turns(cached, naive_losses(model, probes, batch), batch) for batch in batches]
    ours, naive = ([each for turn in turns for each in turn[side]] for side in ("cached", "naive"))
    share = _layers_share(model, graph, batches[0])
    remaining = mean((graph.num_layers - (g.layer or 0)) / graph.num_layers for g in groups)
    return Costs(
        probes=len(probes),
        windows=len(windows),
        windows_per_pass=len(batches[0]),
        equal=all(torch.equal(a.losses, b.losses) for a, b in zip(ours, naive, strict=True)),
        naive=sum(each.seconds for each in naive),
        cached=sum(each.seconds for each in ours),
        trial=trial,
        layers_share=share,
        bound=remaining * share + 1 - share,
        deviations=_deviations(ours, len(probes)),
        probe_ratio=_probe_ratio(groups_of=[None, *(g.layer for g in groups)] * len(batches), ours=ours, naive=naive),
    )


def naive_losses(model: nn.Module, probes: Sequence[Probe], tokens: Tensor) -> Iterator[Tensor]:
    """What `CachedProbes.losses` gives, by whole passes: of the model, then of each probe."""
    yield window_losses(model, tokens)
    for probe in probes:
        with probe.removed():
            losses = window_losses(model, tokens)
        yield losses


@dataclass(frozen=True)
class _Step:
    losses: Tensor
    seconds: float


def _turns(cached: CachedProbes, naive: Iterator[Tensor], tokens: Tensor) -> dict[str, list[_Step]]:
    """Step by step, in an order that changes each time, so that a machine that slows down slows both."""
    sides = {"cached": cached.losses(tokens), "naive": naive}
    steps: dict[str, list[_Step]] = {name: [] for name in sides}
    for turn in range(1 + len(cached.probes)):
        for name in sorted(sides, reverse=bool(turn % 2)):
            start = time.perf_counter()
            losses = next(sides[name])
            steps[name].append(_Step(losses, time.perf_counter() - start))
    return steps


def _deviations(steps: Sequence[_Step], probes: int) -> list[float]:
    losses = torch.stack(
        [torch.cat([each.losses for each in steps[at :: probes + 1]]).mean() for at in range(probes + 1)]
    )
    return (losses[1:] - losses[0]).tolist()


def _probe_ratio(groups_of: Sequence[int | None], ours: Sequence[_Step], naive: Sequence[_Step]) -> float:
    """Mean over the probed layers of the median over their probes of cached / naive."""
    ratios: dict[int, list[float]] = {}
    for layer, cached, whole in zip(groups_of, ours, naive, strict=True):
        if layer is not None:
            ratios.setdefault(layer, []).append(cached.seconds / whole.seconds)
    return mean(median(each) for each in ratios.values())


def _layers_share(model: nn.Module, graph: Graph, tokens: Tensor, *, passes: int = 5) -> float:
    """Median over a few passes of the share of the time that is spent in decoder layers."""
    shares = []
    for _ in range(passes):
        with _timed(list(model.get_submodule(graph.layers_path).children())) as inside:
            start = time.perf_counter()
            window_losses(model, tokens)
            whole = time.perf_counter() - start
        shares.append(sum(inside) / whole)
    return median(shares)


@contextmanager
def _timed(layers: Sequence[nn.Module]) -> Iterator[list[float]]:
    """Gathers the seconds of every call of the layers."""
    seconds: list[float] = []
    begun: list[float] = []
    hooks = [layer.register_forward_pre_hook(lambda *_: begun.append(time.perf_counter())) for layer in layers]
    hooks += [
        layer.register_forward_hook(lambda *_: seconds.append(time.perf_counter() - begun[-1])) for layer in layers
    ]
    try:
        yield seconds
    finally:
        for hook in hooks:
            hook.remove()


def _layers(number: int, count: int | None) -> list[int]:
    """`count` layers, evenly spaced from the first to the last."""
    if count is None or count >= number:
        return list(range(number))
    return [round(at * (number - 1) / max(count - 1, 1)) for at in range(count)]


def _windows(data: TokenData, sources: int | None) -> Tensor:
    return torch.cat([source.valid[:1] for source in data.sources[:sources]])


if __name__ == "__main__":
    main()
