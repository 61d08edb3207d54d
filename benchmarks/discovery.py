"""Finding the structures of a model: ours beside Torch-Pruning's dependency graph, on the same models.

    python benchmarks/discovery.py --out discovery.json
    python benchmarks/discovery.py FOLDER --layers 4 8 --skip-peer

Three things are measured: the time from a model to all of its groups; whether a structure taken out of every layer
leaves the logits of the model in which it is zero; and what a configuration without weights costs. The peer is a
dependency of this file alone: pip install --no-deps torch-pruning==1.6.1

The peer is used as its own `examples/LLMs/prune_llm.py` uses it: traced through autograd, attention groups rooted at
the input channels of `o_proj`, head counts set from the pruned projections. It needs three things besides: eager
attention (under grouped queries it knows `repeat_kv` and not the fused kernel's own grouping), `use_cache=False` (its
shape inference goes astray at the cache's concatenation) and `output_transform` (it cannot flatten a ModelOutput).
Both sides get that same model. A search that does not end is stopped after --limit seconds. On the meta device it needs
a ready-made attention mask besides. Its times hold the groups of the two kinds asked for; "groups alone" finds all
kinds and judges each for exactness, `discover` besides tries what the model's configuration can be built with.
"""

from __future__ import annotations

import argparse
import copy
import importlib
import json
import re
import signal
import subprocess
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median
from typing import Any

import psutil
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen3MoeConfig

from lorashear import Graph, Plan, cut_, discover, zero_
from lorashear.graph.groups import Kind
from lorashear.graph.inputs import example_inputs
from lorashear.graph.trace import record

TOLERANCE = 1e-4
"""Largest difference of logits, over the largest logit, that counts as the same."""

KINDS = (Kind.CHANNELS, Kind.HEADS)
OUTCOMES = ("exact", "other logits", "wrong shapes", "raised", "no end", "no group")


def main() -> None:
    arguments = _arguments()
    torch.set_num_threads(arguments.threads)
    if arguments.child:
        name, layers, side = arguments.child
        print(json.dumps(_weightless(name, int(layers), side, arguments.meta_limit)))
        return
    peer = None if arguments.skip_peer else _load_peer()
    real, correct = [], []
    for name, make in _cases(arguments):
        model = make()
        row = {"model": name, **_times(model, peer, arguments.repeats, arguments.limit)}
        real.append(row)
        _say(f"{name}: {row}")
        if _num_layers(model) <= arguments.check_layers:
            checked = {"model": name, **_correctness(model, peer, arguments.check_limit)}
            correct.append(checked)
            _say(f"{name}: {checked}")
    weightless = []
    for name, depths in (("llama-70b", arguments.meta_layers), ("qwen3-moe", arguments.moe_layers)):
        for layers in depths:
            runs = [_in_child(name, layers, "ours", arguments) for _ in range(arguments.repeats)]
            row = {"model": name, "layers": layers, "ours": {key: median(run[key] for run in runs) for key in runs[0]}}
            if peer is not None:
                row["peer"] = _in_child(name, layers, "peer", arguments)
            weightless.append(row)
            _say(f"{row}")
    report = {
        "versions": {name: _version(name) for name in ("torch", "transformers", "torch-pruning")},
        "threads": arguments.threads,
        "repeats": arguments.repeats,
        "limit": arguments.limit,
        "check_limit": arguments.check_limit,
        "meta_limit": arguments.meta_limit,
        "times": real,
        "correctness": correct,
        "weightless": weightless,
    }
    if arguments.out:
        Path(arguments.out).write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(render(report))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", help="folders of models whose modules are named as Llama's are")
    parser.add_argument("--layers", type=int, nargs="*", default=[4, 8, 16, 32])
    parser.add_argument("--kv-heads", type=int, nargs="+", default=[4, 2], help="of the made-up models' 8 heads")
    parser.add_argument("--check-layers", type=int, default=8, help="correctness on models of at most this depth")
    parser.add_argument("--meta-layers", type=int, nargs="*", default=[10, 20, 40, 80])
    parser.add_argument("--moe-layers", type=int, nargs="*", default=[15, 30, 60])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--limit", type=float, default=30.0, help="seconds for one kind of the peer's groups")
    parser.add_argument("--check-limit", type=float, default=5.0, help="seconds for one of the peer's groups")
    parser.add_argument("--meta-limit", type=float, default=300.0, help="seconds for the peer on one configuration")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out")
    parser.add_argument("--skip-peer", action="store_true")
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    return parser.parse_args()


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


# Models


def _cases(arguments: argparse.Namespace) -> Iterator[tuple[str, Callable[[], nn.Module]]]:
    for kv_heads in arguments.kv_heads:
        for layers in arguments.layers:
            yield f"{layers} layers, 8/{kv_heads} heads", partial(_llama, layers, kv_heads)
    for folder in arguments.models:
        yield Path(folder).name, partial(_read, folder)


def _llama(layers: int, kv_heads: int) -> nn.Module:
    config = LlamaConfig(
        hidden_size=256,
        num_attention_heads=8,
        num_key_value_heads=kv_heads,
        head_dim=32,
        intermediate_size=704,
        vocab_size=1000,
        num_hidden_layers=layers,
        initializer_range=0.06,  # so that a structure that goes missing is seen in the logits
        use_cache=False,
        attn_implementation="eager",
    )
    torch.manual_seed(0)
    model: nn.Module = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    return model


def _read(folder: str) -> nn.Module:
    model: nn.Module = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", use_cache=False
    ).eval()
    if not all(hasattr(layer.mlp, "down_proj") and hasattr(layer.self_attn, "o_proj") for layer in _layers(model)):
        raise SystemExit(f"{folder}: its layers have no mlp.down_proj and self_attn.o_proj, by which the peer is told")
    return model


def _weightless_model(name: str, layers: int) -> nn.Module:
    common = {"num_hidden_layers": layers, "use_cache": False, "attn_implementation": "eager", "vocab_size": 32000}
    if name == "llama-70b":
        config: Any = LlamaConfig(
            hidden_size=8192, num_attention_heads=64, num_key_value_heads=8, intermediate_size=28672, **common
        )
    else:
        config = Qwen3MoeConfig(
            hidden_size=4096,
            num_attention_heads=32,
            num_key_value_heads=8,
            head_dim=128,
            intermediate_size=14336,
            moe_intermediate_size=1536,
            num_experts=64,
            num_experts_per_tok=8,
            **common,
        )
    with torch.device("meta"):  # grouped experts want bfloat16 there, which the peer cannot go around
        model: nn.Module = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    return model


def _layers(model: Any) -> Any:
    return model.model.layers


def _num_layers(model: nn.Module) -> int:
    return len(_layers(model))


def _head_sizes(model: Any) -> tuple[int, int]:
    """(entries of one key/value head, input channels of `o_proj` that all of its queries make)."""
    attention = _layers(model)[0].self_attn
    return attention.head_dim, attention.head_dim * attention.num_key_value_groups


# The peer


def _load_peer() -> Any:
    try:
        return importlib.import_module("torch_pruning")
    except ImportError:
        _say("torch-pruning is not installed: only our part runs (pip install --no-deps torch-pruning==1.6.1)")
        return None


class _NoEndError(Exception):
    pass


@contextmanager
def _limited(seconds: float) -> Iterator[None]:
    """Stops pure Python code that runs for too long."""

    def stop(_number: int, _frame: object) -> None:
        raise _NoEndError

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def _peer_graph(peer: Any, model: nn.Module, inputs: Tensor | dict[str, Tensor]) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peer.DependencyGraph().build_dependency(
            model, example_inputs=inputs, output_transform=lambda output: output.logits, verbose=False
        )


def _peer_group(peer: Any, graph: Any, model: nn.Module, layer: int, kind: Kind, index: int | None = None) -> Any:
    """The group of one structure, or of all of a layer, as `get_all_groups` would ask for it."""
    block = _layers(model)[layer]
    if kind is Kind.CHANNELS:
        root, prune, size = block.mlp.gate_proj, peer.prune_linear_out_channels, 1
        width = root.out_features
    else:
        root, prune, size = block.self_attn.o_proj, peer.prune_linear_in_channels, _head_sizes(model)[1]
        width = root.in_features
    entries = range(width) if index is None else range(index * size, (index + 1) * size)
    return graph.get_pruning_group(root, prune, list(entries))


def _mend_heads(model: nn.Module) -> None:
    """Head counts as `prune_llm.py` sets them; from the weights, for `out_features` miscounts repeated indices."""
    for layer in _layers(model):
        attention = layer.self_attn
        attention.num_heads = attention.q_proj.weight.shape[0] // attention.head_dim
        attention.num_key_value_heads = attention.k_proj.weight.shape[0] // attention.head_dim
        if attention.num_key_value_heads:
            attention.num_key_value_groups = attention.num_heads // attention.num_key_value_heads


# 1: times


def _times(model: nn.Module, peer: Any, repeats: int, limit: float) -> dict[str, Any]:
    inputs = example_inputs(model)
    discover(model, inputs=inputs)  # the first run imports and warms up
    row: dict[str, Any] = {"layers": _num_layers(model)}
    ours: dict[str, list[float]] = {"discover": [], "groups": [], "trace": []}
    theirs: dict[str, list[float]] = {"build": [], "ffn": [], "heads": []}
    ended = True
    if peer is not None:
        _peer_graph(peer, model, inputs["input_ids"])
    for _ in range(repeats):
        ours["discover"].append(_seconds(lambda: discover(model)))
        ours["groups"].append(_seconds(lambda: discover(model, realisable=False)))
        ours["trace"].append(_seconds(lambda: record(model, inputs)))
        if peer is None:
            continue
        start = time.perf_counter()
        graph = _peer_graph(peer, model, inputs["input_ids"])
        theirs["build"].append(time.perf_counter() - start)
        theirs["ffn"].append(_seconds(partial(_all_groups, peer, graph, model, Kind.CHANNELS)))
        if ended:
            try:
                with _limited(limit):
                    theirs["heads"].append(_seconds(partial(_all_groups, peer, graph, model, Kind.HEADS)))
            except _NoEndError:
                ended = False
                theirs["heads"] = [limit]
    row["ours"] = {key: median(values) for key, values in ours.items()}
    if peer is not None:
        row["peer"] = {key: median(values) for key, values in theirs.items()} | {"heads_ended": ended}
        if ended:  # a limit makes no ratio
            whole = sum(median(values) for values in theirs.values())
            row["ratio"], row["ratio_groups"] = whole / row["ours"]["discover"], whole / row["ours"]["groups"]
    return row


def _all_groups(peer: Any, graph: Any, model: nn.Module, kind: Kind) -> None:
    for layer in range(_num_layers(model)):
        _peer_group(peer, graph, model, layer, kind)


def _seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


# 2: correctness


def _correctness(model: nn.Module, peer: Any, limit: float) -> dict[str, Any]:
    """One structure out of one layer at a time, against the model whose consumer has zeros there, set by hand."""
    input_ids = example_inputs(model, batch=2)["input_ids"]
    graph = discover(model)
    whole = _logits(model, input_ids)
    sides: dict[str, Callable[[int, Kind], nn.Module | None]] = {"ours": partial(_cut_ours, model, graph)}
    if peer is not None:
        sides["peer"] = partial(_cut_theirs, model, peer, limit)
    counts: dict[str, dict[str, Counter[str]]] = {side: {kind.value: Counter() for kind in KINDS} for side in sides}
    worst = {side: {kind.value: 0.0 for kind in KINDS} for side in sides}
    effects: list[float] = []
    for kind in KINDS:
        for layer in range(_num_layers(model)):
            zeroed = _logits(_zeroed(model, layer, kind), input_ids)
            effects.append(_difference(whole, zeroed))
            for side, cut in sides.items():
                outcome, difference = _judge(partial(cut, layer, kind), zeroed, input_ids)
                counts[side][kind.value][outcome] += 1
                if outcome == "exact":
                    worst[side][kind.value] = max(worst[side][kind.value], difference)
    return {
        **{side: {kind: dict(counter) for kind, counter in kinds.items()} for side, kinds in counts.items()},
        "largest difference of an exact one": worst,
        "smallest effect of a removal": min(effects),
    }


INDEX = 1
"""The structure that is removed."""


def _judge(cut: Callable[[], nn.Module | None], zeroed: Tensor, input_ids: Tensor) -> tuple[str, float]:
    try:
        small = cut()
    except _NoEndError:
        return "no end", 0.0
    except Exception as error:
        _say(f"raised {type(error).__name__}: {error}")
        return "raised", 0.0
    if small is None:
        return "no group", 0.0
    try:
        logits = _logits(small, input_ids)
    except Exception as error:
        _say(f"does not run: {type(error).__name__}: {error}")
        return "wrong shapes", 0.0
    difference = _difference(zeroed, logits)
    return ("exact" if difference <= TOLERANCE else "other logits"), difference


def _zeroed(model: nn.Module, layer: int, kind: Kind) -> nn.Module:
    zeroed = copy.deepcopy(model)
    block = _layers(zeroed)[layer]
    size = 1 if kind is Kind.CHANNELS else _head_sizes(model)[1]
    consumer = block.mlp.down_proj if kind is Kind.CHANNELS else block.self_attn.o_proj
    with torch.no_grad():
        consumer.weight[:, INDEX * size : (INDEX + 1) * size] = 0
    return zeroed


def _cut_ours(model: nn.Module, graph: Graph, layer: int, kind: Kind) -> nn.Module | None:
    group = next((group for group in graph.prunable if group.kind is kind and group.layer == layer), None)
    if group is None:
        return None
    plan = Plan(removed={group.name: (INDEX,)}, shape="per-layer")
    small = copy.deepcopy(model)
    cut_(small, graph, plan)
    zeroed = copy.deepcopy(model)
    zero_(zeroed, graph, plan)
    input_ids = example_inputs(model)["input_ids"]
    if _difference(_logits(zeroed, input_ids), _logits(_zeroed(model, layer, kind), input_ids)) > TOLERANCE:
        raise AssertionError(f"zero_ does not zero structure {INDEX} of {group.name}")
    return small


def _cut_theirs(model: nn.Module, peer: Any, limit: float, layer: int, kind: Kind) -> nn.Module:
    small = copy.deepcopy(model)
    with _limited(limit):
        graph = _peer_graph(peer, small, example_inputs(model)["input_ids"])
        group = _peer_group(peer, graph, small, layer, kind, INDEX)
        group.prune()
    _mend_heads(small)
    return small


def _logits(model: Any, input_ids: Tensor) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model(input_ids=input_ids, use_cache=False).logits
    return logits


def _difference(expected: Tensor, found: Tensor) -> float:
    return float((expected - found).abs().max() / expected.abs().max())


# 3: configurations without weights


def _in_child(name: str, layers: int, side: str, arguments: argparse.Namespace) -> dict[str, Any]:
    own = [sys.executable, __file__, "--threads", str(arguments.threads), "--meta-limit", str(arguments.meta_limit)]
    done = subprocess.run([*own, "--child", name, str(layers), side], check=True, capture_output=True, text=True)
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def _weightless(name: str, layers: int, side: str, limit: float) -> dict[str, Any]:
    """In a process of its own: seconds, and how far the resident memory rose above what the built model had."""
    model = _weightless_model(name, layers)
    if side == "peer":
        return _weightless_peer(name, model, limit)
    discover(_weightless_model(name, 1))  # imports and warms up
    with _memory() as memory:
        seconds = _seconds(lambda: discover(model))
    trace = _seconds(lambda: record(model, example_inputs(model)))
    return {"seconds": seconds, "trace": trace, "memory": memory[0]}


def _weightless_peer(name: str, model: nn.Module, limit: float) -> dict[str, Any]:
    """What the peer does with it as it is, and what with a ready-made mask, which the model's own code cannot make
    there without reading values."""
    input_ids = example_inputs(model)["input_ids"].to("meta")
    length = input_ids.shape[1]
    masks = {
        "attention_mask": torch.zeros(1, 1, length, length, device="meta"),
        "position_ids": torch.arange(length, device="meta")[None],
    }
    peer = _load_peer()
    found: dict[str, Any] = {"as it is": _happens(lambda: _peer_graph(peer, model, input_ids), limit)}

    def work(built: nn.Module) -> None:
        graph = _peer_graph(peer, built, {"input_ids": input_ids, **masks})
        for kind in KINDS if hasattr(_layers(built)[0].mlp, "gate_proj") else [Kind.HEADS]:
            _all_groups(peer, graph, built, kind)  # experts' stacked weights are no module that a group could start at

    found["with a mask"] = _happens(lambda: work(_weightless_model(name, 1)), limit)
    if found["with a mask"] == "runs":
        with _memory() as memory:
            start = time.perf_counter()
            found["with a mask"] = _happens(lambda: work(model), limit)
            found["seconds"] = time.perf_counter() - start
        found["memory"] = memory[0]
        found["kinds"] = [
            kind.value for kind in KINDS if kind is Kind.HEADS or hasattr(_layers(model)[0].mlp, "gate_proj")
        ]
    return found


def _happens(work: Callable[[], object], limit: float) -> str:
    try:
        with _limited(limit):
            work()
    except _NoEndError:
        return f"not done in {limit:.0f} s"
    except Exception as error:
        return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:120]}"
    return "runs"


@contextmanager
def _memory() -> Iterator[list[float]]:
    """MiB by which the resident memory's peak inside rose above what there was before."""
    before, found = psutil.Process().memory_info().rss, [0.0]
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here; getrusage would keep the parent's
    yield found
    found[0] = (_peak() - before) / 2**20


def _peak() -> int:
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024


# The tables


def render(report: dict[str, Any]) -> str:
    """All three parts as Markdown."""
    return "\n".join([*_render_times(report), "", *_render_correctness(report), "", *_render_weightless(report)])


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return ["| " + " | ".join(head) + " |", "|" + "---|" * len(head), *("| " + " | ".join(row) + " |" for row in rows)]


def _render_times(report: dict[str, Any]) -> list[str]:
    head = ["model (real weights)", "discover (s)", "groups alone", "of it tracing"]
    head += ["peer: build (s)", "FFN groups", "head groups"]
    rows = []
    for row in report["times"]:
        cells = [row["model"], *(f"{row['ours'][key]:.3f}" for key in ("discover", "groups", "trace"))]
        if peer := row.get("peer"):
            cells += [f"{peer['build']:.3f}", f"{peer['ffn']:.3f}"]
            cells += [f"{peer['heads']:.3f}" if peer["heads_ended"] else f"no end in {peer['heads']:.0f}"]
            cells += [f"{row[key]:.2f}" if peer["heads_ended"] else "" for key in ("ratio_groups", "ratio")]
        else:
            cells += [""] * 5
        rows.append(cells)
    return _table([*head, "peer / groups alone", "peer / discover"], rows)


def _render_correctness(report: dict[str, Any]) -> list[str]:
    head = ["model, one structure a layer", "kind", "side", *OUTCOMES, "largest difference", "effect of removal"]
    rows = []
    for row in report["correctness"]:
        for side in ("ours", "peer"):
            for kind, counts in row.get(side, {}).items():
                worst = row["largest difference of an exact one"][side][kind] if counts.get("exact") else None
                effect = row["smallest effect of a removal"]
                numbers = [str(counts.get(outcome, 0) or "") for outcome in OUTCOMES]
                rows.append(
                    [row["model"], kind, side, *numbers, "" if worst is None else f"{worst:.1e}", f">= {effect:.1e}"]
                )
    return _table(head, rows)


def _render_weightless(report: dict[str, Any]) -> list[str]:
    head = ["configuration, no weights", "layers", "discover (s)", "of it tracing", "s a layer", "memory added (MiB)"]
    rows = []
    for row in report["weightless"]:
        ours, layers, peer = row["ours"], row["layers"], row.get("peer", {})
        times = [f"{ours['seconds']:.3f}", f"{ours['trace']:.3f}", f"{ours['seconds'] / layers:.4f}"]
        cells = [row["model"], str(layers), *times, f"{ours['memory']:.0f}", peer.get("as it is", "")]
        if "seconds" in peer and peer["with a mask"] == "runs":
            only = "" if len(peer["kinds"]) > 1 else f" ({peer['kinds'][0]} only)"
            cells += [
                f"{peer['seconds']:.3f}{only}",
                f"{peer['memory']:.0f}",
                f"{peer['seconds'] / ours['seconds']:.3f}",
            ]
        else:
            cells += [peer.get("with a mask", ""), "", ""]
        rows.append(cells)
    return _table([*head, "peer as it is", "peer, mask given (s)", "peer: memory", "ratio (peer / ours)"], rows)


if __name__ == "__main__":
    main()
