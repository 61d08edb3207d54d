"""`verify`: proves on the user's own model that zeroed and cut models are equal, before time is spent on pruning.

For every kind of group random structures are zeroed in the whole model and cut out of it, and the outputs are compared:
by replaying the trace (which covers every exact group and needs no second model in memory), and on the model itself
(modules, attributes, configuration), also with a key/value cache, other attention code and another batch.
"""

from __future__ import annotations

import copy
import inspect
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import psutil
import torch
from torch import Tensor, nn

from lorashear.errors import ModelError, PlanError
from lorashear.graph.base import base_model
from lorashear.graph.discover import discover
from lorashear.graph.groups import Graph, Kind, NodeGroup
from lorashear.graph.inputs import TOKENS, example_inputs
from lorashear.graph.replay import Replay
from lorashear.graph.scales import NoScaleError, rescaling
from lorashear.plan import Plan
from lorashear.surgery.cut import cut_, zero_

TOLERANCE = 1e-4
"""Largest difference of two outputs, as a share of the largest output, that counts as equal in float32."""

MODULE_RUNS = ("plain", "batch of 2", "sdpa", "cache")
"""Ways in which zeroed and cut models are run."""

NEW_TOKENS = 5


@dataclass(frozen=True)
class Check:
    """One comparison of the zeroed with the cut model, over all groups of a kind at once."""

    kind: str
    how: str
    """`replay`, `replay, batch of 2`, or one of `MODULE_RUNS`."""
    groups: int
    structures: int
    """How many were removed in all."""
    difference: float
    """Largest difference of the outputs, as a share of the largest output."""
    effect: float
    """How far the removal moved the outputs, likewise: a check of structures that do nothing would prove nothing."""

    @property
    def equal(self) -> bool:
        """Whether zeroed and cut model agree."""
        return self.difference <= TOLERANCE


@dataclass(frozen=True)
class Verification:
    """All checks of one model."""

    checks: tuple[Check, ...]
    not_checked: Mapping[str, str]
    """Kind -> why it was not run on the model itself."""
    prunable_share: float
    """Share of the parameters that the prunable groups can give."""
    notes: tuple[str, ...] = field(default=())

    @property
    def equal(self) -> bool:
        """Whether every check found zeroed and cut models equal."""
        return all(check.equal for check in self.checks)


def verify(
    model: nn.Module,
    graph: Graph | None = None,
    *,
    plans: int = 3,
    seed: int = 0,
    progress: Callable[[str], None] = lambda _kind: None,
) -> Verification:
    """Compares zeroed with cut models for random plans, kind by kind, and all kinds together.

    Args:
        model: with real weights; it is not changed. Compared in float32.
        graph: its node groups; None discovers them.
        plans: random selections a kind.
        seed: of the selections and of the token ids.
        progress: called with each kind before it is checked.

    Raises:
        ModelError: for a model on the meta device, which has no outputs to compare.
    """
    if any(parameter.is_meta for parameter in model.parameters()):
        raise ModelError("verify compares outputs, and this model has no weights; load the checkpoint, or use inspect")
    graph = graph or discover(model)
    chance = random.Random(seed)
    checks: list[Check] = []
    not_checked: dict[str, str] = {}
    twice = _second_graph(model)
    room = _room_for_copies(model)
    for kind, groups in _kinds(graph).items():
        progress(kind)
        for _ in range(plans):
            removed = {group.name: _selection(group, chance) for group in groups}
            checks.extend(_by_replay(model, graph, twice, kind, removed))
            plain = {name: rows for name, rows in removed.items() if graph[name].realisable}
            if not room:
                not_checked[kind] = "too little memory for three copies of the model in float32"
            elif not plain:
                not_checked[kind] = groups[0].reason
            else:
                try:
                    for check in _on_modules(model, graph, kind, _even(graph, plain, chance)):
                        checks.append(check)
                except (PlanError, _NotRunError) as error:
                    not_checked[kind] = str(error)
    return Verification(tuple(checks), not_checked, prunable_share(graph), tuple(_notes(graph)))


def prunable_share(graph: Graph, groups: Sequence[NodeGroup] | None = None) -> float:
    """Share of the parameters that goes when groups (all prunable ones) keep as few structures as they may.

    Whole layers stay.
    """
    chosen = [group for group in (graph.prunable if groups is None else groups) if not group.layers]
    kept = graph.kept_parameters({group.name: range(group.minimum, group.size) for group in chosen})
    return 1 - kept / graph.num_parameters


def _kinds(graph: Graph) -> dict[str, list[NodeGroup]]:
    """Kind -> its groups, and all kinds together at the end."""
    found: dict[str, list[NodeGroup]] = {}
    for group in graph.groups:
        if group.exact and group.size > group.minimum:
            found.setdefault(group.kind.value, []).append(group)
    together = [group for groups in found.values() for group in groups if group.kind is not Kind.DEPTH]
    if len(found) > 1 and together:
        found["all kinds"] = together
    return found


def _notes(graph: Graph) -> Iterator[str]:
    if graph.inference and graph.inference.trace.made_up_weights:
        yield "the model's path depends on its weights: it was traced on made-up ones and is not replayed"
    made_up = graph.inference.trace.made_up if graph.inference else []
    if made_up:
        yield f"{len(made_up)} values that depend on weights were made up while tracing, e.g. {made_up[0]}"


def _selection(group: NodeGroup, chance: random.Random) -> tuple[int, ...]:
    most = max(1, min(group.size - group.minimum, group.size // 2))
    return tuple(sorted(chance.sample(range(group.size), chance.randint(1, most))))


def _even(graph: Graph, removed: Mapping[str, Sequence[int]], chance: random.Random) -> dict[str, tuple[int, ...]]:
    """Equal counts for groups of equal role, so that a plain model can come of it."""
    counts: dict[str, int] = {}
    for name, rows in removed.items():
        role = graph[name].role
        counts[role] = min(counts.get(role, len(rows)), len(rows))
    return {name: tuple(sorted(chance.sample(range(graph[name].size), counts[graph[name].role]))) for name in removed}


def _second_graph(model: nn.Module) -> Graph | None:
    """The groups as seen in a run of another shape; None where the model takes no such input."""
    inputs = example_inputs(model, batch=2, length=17)
    if "input_ids" not in inputs:
        return None
    try:
        return discover(model, inputs=inputs, realisable=False)
    except ModelError:
        return None


def _room_for_copies(model: nn.Module) -> bool:
    size = 4 * sum(parameter.numel() for parameter in model.parameters())
    return 3.5 * size < psutil.virtual_memory().available


def _by_replay(
    model: nn.Module, graph: Graph, twice: Graph | None, kind: str, removed: Mapping[str, tuple[int, ...]]
) -> Iterator[Check]:
    for each, how in ((graph, "replay"), (twice, "replay, batch of 2")):
        known = {} if each is None else {group.name: group for group in each.groups}
        if each is not None and each.inference is not None and each.inference.trace.made_up_weights:
            continue  # the trace took the path of other weights
        alike = all(name in known and known[name].size == graph[name].size and known[name].exact for name in removed)
        if each is None or not alike or kind == Kind.DEPTH.value:
            continue
        try:
            whole, zeroed, cut = _replayed(model, each, removed)
        except NoScaleError:  # a mean over the axis that nothing can make up for
            continue
        yield _check(kind, how, removed, whole, zeroed, cut)


def _replayed(model: nn.Module, graph: Graph, removed: Mapping[str, tuple[int, ...]]) -> tuple[Tensor, Tensor, Tensor]:
    inference = graph.inference
    assert inference is not None
    tensors = _float_tensors(model)
    inputs = inference.trace.given
    experts = {name: rows for name, rows in removed.items() if graph[name].kind is Kind.EXPERTS}
    zeroes: dict[tuple[str, int], list[Tensor]] = {}
    for name, rows in removed.items():
        for member in graph[name].members if name not in experts else ():
            if not member.buffer:
                zeroes.setdefault((member.parameter, member.dim), []).append(member.rows[list(rows)].flatten())
    cutter = Replay(inference, graph.keep_leaves(removed))
    scales = rescaling(inference, cutter)

    def zeroed(name: str) -> Tensor:
        tensor = tensors(name)
        for (owner, dim), rows in zeroes.items():
            if owner == name:
                tensor = tensor.index_fill(dim, torch.cat(rows).to(tensor.device), 0)
        return tensor

    def rescaled(name: str) -> Tensor:
        scale = scales.get(name)
        return tensors(name) if scale is None else (tensors(name) + scale.offset) * scale.factor - scale.offset

    with torch.no_grad():
        whole = Replay(inference).run(_Lazy(tensors), inputs)[0]
        zero = Replay(inference, None, graph.keep_leaves(experts)).run(_Lazy(zeroed), inputs)[0]
        return whole, zero, cutter.run(_Lazy(rescaled), inputs)[0]


class _Lazy(dict[str, Tensor]):
    """Tensors made when they are asked for."""

    def __init__(self, make: Callable[[str], Tensor]) -> None:
        super().__init__()
        self._make = make

    def __missing__(self, name: str) -> Tensor:
        return self._make(name)


def _float_tensors(model: nn.Module) -> Callable[[str], Tensor]:
    named: dict[str, Tensor] = dict(model.named_parameters(remove_duplicate=False))
    named.update(model.named_buffers(remove_duplicate=False))

    def get(name: str) -> Tensor:
        tensor = named[name].detach().cpu()
        return tensor.float() if tensor.is_floating_point() else tensor

    return get


def _on_modules(model: nn.Module, graph: Graph, kind: str, removed: dict[str, tuple[int, ...]]) -> Iterator[Check]:
    plan = Plan(removed=removed)
    zeroed, cut = (copy.deepcopy(model).float().eval() for _ in range(2))
    zero_(zeroed, graph, plan)
    cut_(cut, graph, plan)
    whole = copy.deepcopy(model).float().eval()
    for each in (whole, zeroed, cut):  # grouped experts want widths that are multiples of 16 bytes
        with suppress(ValueError, AttributeError):
            base_model(each).set_experts_implementation("batched_mm")
    for how, run in _runs(model):
        outputs = [run(each) for each in (whole, zeroed)]
        try:
            outputs.append(run(cut))
        except Exception as error:  # whatever the model's code raises, e.g. a cache without an attention layer left
            raise _NotRunError(f"{how}: the cut model does not run ({type(error).__name__}: {error})") from error
        yield _check(kind, how, removed, *outputs)


class _NotRunError(Exception):
    """The cut model raises where the zeroed one runs."""


def _runs(model: nn.Module) -> Iterator[tuple[str, Callable[[Any], Tensor]]]:
    """Ways to run a model, each with a name."""
    yield "plain", lambda each: _output(each, example_inputs(each))
    inputs = example_inputs(model, batch=2, length=17)
    if "input_ids" not in inputs:
        return
    yield "batch of 2", lambda each: _output(each, inputs)
    base = base_model(model)
    if getattr(base, "_supports_sdpa", False) and hasattr(base, "set_attn_implementation"):
        yield "sdpa", lambda each: _with_attention(each, "sdpa", inputs)
    if _caches(model):
        yield "cache", _cached


def _output(model: Any, inputs: Mapping[str, Tensor], **options: Any) -> Tensor:
    device = next(model.parameters()).device
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        out = model(**{name: tensor.to(device) for name, tensor in inputs.items()}, **options)
    logits = getattr(out, "logits", None)
    return (logits if logits is not None else out[0] if not isinstance(out, Tensor) else out).float().cpu()


def _with_attention(model: Any, attention: str, inputs: Mapping[str, Tensor]) -> Tensor:
    base = base_model(model)
    before = base.config._attn_implementation
    base.set_attn_implementation(attention)
    try:
        return _output(model, inputs)
    finally:
        base.set_attn_implementation(before)


def _caches(model: nn.Module) -> bool:
    """Whether the whole model gives the same with its cache as without."""
    base = base_model(model)
    if not getattr(base, "can_generate", lambda: False)() or getattr(base.config, "is_encoder_decoder", False):
        return False
    try:
        inputs = example_inputs(model)
        last = _output(model, inputs)[:, -1]
        return float((_cached(model)[:, 0] - last).abs().max()) <= TOLERANCE * float(last.abs().max())
    except Exception:  # whatever such a model cannot do with a cache, it is not the cut's doing
        return False


def _cached(model: Any) -> Tensor:
    """Logits of some steps, each with the cache of those before, `(1, steps, vocabulary)`."""
    device = next(model.parameters()).device
    ids = example_inputs(model, length=TOKENS + NEW_TOKENS)["input_ids"].to(device)
    takes = inspect.signature(base_model(model).forward).parameters
    name = "cache" if "cache" in takes else "past_key_values"  # transformers renames it in 5.x
    logits = []
    with torch.no_grad():
        out = model(input_ids=ids[:, :TOKENS], use_cache=True)
        for at in range(TOKENS, TOKENS + NEW_TOKENS):
            logits.append(out.logits[:, -1])
            out = model(input_ids=ids[:, at : at + 1], use_cache=True, **{name: getattr(out, name)})
    return torch.stack(logits, dim=1).float().cpu()


def _check(
    kind: str, how: str, removed: Mapping[str, Sequence[int]], whole: Tensor, zeroed: Tensor, cut: Tensor
) -> Check:
    scale = max(float(zeroed.abs().max()), 1e-30)
    difference = float((zeroed - cut).abs().max()) / scale if bool(torch.isfinite(cut).all()) else float("inf")
    effect = float((zeroed - whole).abs().max()) / max(float(whole.abs().max()), 1e-30)
    return Check(kind, how, len(removed), sum(map(len, removed.values())), difference, effect)
