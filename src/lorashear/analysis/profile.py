"""The knowledge profile: which node groups carry what the model knows.

After the paper's knowledge distribution analysis. Each group is probed once: its least salient structures are taken out
for a moment, and the profile notes how much the loss on held-out text of every source rises. What cannot be missed
anywhere holds the most knowledge.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Protocol, Self

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from torch import Tensor, nn

from lorashear.analysis.prefix import record, replay_starts, replayed
from lorashear.analysis.saliency import score
from lorashear.config import AnalysisSettings, SaliencySettings
from lorashear.errors import DataError, ModelError, SettingsError, did_you_mean
from lorashear.evaluation.inference import autocast
from lorashear.evaluation.perplexity import token_losses, windows_per_pass
from lorashear.graph.groups import Graph, Kind, NodeGroup
from lorashear.progress import track

NATS = "nats/token"
TRIAL_TOKENS = 16
"""Length of the one sequence on which cached prefixes are tried out: any will do, short ones are cheap."""

Metric = Callable[[nn.Module], float | Mapping[str, float]]
"""A loss of the whole model (larger is worse), or one per source."""


class Source(Protocol):
    """What a profile needs of a source of text."""

    @property
    def name(self) -> str:
        """What the profile calls it."""

    @property
    def valid(self) -> Tensor:
        """Held-out tokens, `(windows, window)` int64, with the same window for every source."""


class Data(Protocol):
    """What a profile needs of the data: its sources."""

    @property
    def sources(self) -> Sequence[Source]:
        """The sources of text, each with a name of its own."""


class ProfileEntry(BaseModel):
    """What one probe found."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    group: str
    kind: Kind
    layer: int | None
    size: int
    """Structures of the group."""
    probed: int
    """Structures the probe removed: the least salient."""
    deviation: dict[str, float]
    """Source -> loss with the probed structures removed, minus the whole model's; below 0 the model got better."""
    macro: float
    """Mean of the deviations over the sources, by what each counts."""


class Profile(BaseModel):
    """The knowledge distribution of one model. Plain data: saved, read, drawn, used by a plan."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    entries: tuple[ProfileEntry, ...]
    """One per probed group, in the graph's order."""
    base: dict[str, float]
    """Source -> loss of the whole model."""
    unit: str = NATS
    """Unit of base and deviations: nats per token, or `metric` where the caller measured."""
    unprunable: tuple[str, ...]
    """Names of the groups that carry the most knowledge (paper: the top share gamma), largest deviation first."""
    settings: AnalysisSettings

    def __getitem__(self, group: str) -> ProfileEntry:
        for entry in self.entries:
            if entry.group == group:
                return entry
        raise DataError(
            f'the profile has no entry for "{group}"; it was not probed, or the profile is of another model'
        )

    @property
    def sources(self) -> tuple[str, ...]:
        """Names of the sources, in the data's order."""
        return tuple(self.base)

    def save(self, path: str | Path) -> None:
        """Writes the profile as JSON."""
        Path(path).write_text(self.model_dump_json(indent=1) + "\n", encoding="utf-8")

    @classmethod
    def read(cls, path: str | Path) -> Self:
        """Reads what `save` wrote.

        Raises:
            DataError: the file is missing or is not a profile.
        """
        try:
            return cls.model_validate_json(Path(path).read_text(encoding="utf-8"))
        except OSError as error:
            why = error.strerror or type(error).__name__
        except ValidationError as error:
            first = error.errors()[0]
            why = f"{'.'.join(map(str, first['loc'])) or 'the file'}: {first['msg']}"
        raise DataError(f"{path}: not a profile as lorashear saves it ({why}); make one with `lorashear analyze`")


def analyze(
    model: nn.Module,
    graph: Graph,
    data: Data | None = None,
    *,
    scores: Mapping[str, Tensor] | None = None,
    settings: AnalysisSettings | None = None,
    metric: Metric | None = None,
    weights: Mapping[str, float] | None = None,
    dtype: torch.dtype | None = None,
    progress: bool = True,
) -> Profile:
    """Measures how much each prunable node group matters to each source (paper: knowledge distribution analysis).

    The probed structures are zeroed where they enter their consumers, which equals cutting them out; weights are never
    written to. Groups of one structure and groups without a consumer cannot be probed and get no entry.

    Args:
        model: a causal language model, with or without adapters; left as it was. With a metric, any model.
        graph: `lorashear.discover(model)`.
        data: sources with held-out windows; may be left out where a metric measures.
        scores: group name -> saliency `(structures,)`, higher means keep; None goes by the norm of the weights.
        settings: share probed, windows per source, share called unprunable; None takes the defaults.
        metric: measures the model in place of the loss per source; a loss, so larger must be worse. It is called once
            for the whole model and once per group, each time on all layers: cached prefixes do not apply.
        weights: source -> what it counts in `macro`, and so in what is unprunable; 1 where it is not named.
        dtype: autocast, of the metric too.
        progress: shows a bar on standard error.

    Returns:
        The profile; deviations in nats per token, or in the metric's own unit.

    Raises:
        DataError: a source has no held-out window.
        ModelError: a loss is not a number.
        SettingsError: saliency scores are missing or of another size, there is neither data nor metric, or a weight is
            for a source that was not measured.
    """
    settings = settings or AnalysisSettings()
    if scores is None:
        scores = score(model, graph, {}, SaliencySettings(taylor2=0.0, magnitude=1.0))
    groups = [group for group in graph.gated if group.size > 1 and group.consumers]
    probes = [Probe(model, group, _least_salient(group, scores, settings.probe)) for group in groups]
    device = next(model.parameters()).device
    training = model.training
    model.eval()
    try:
        # one autocast for all probes: it keeps the weights it has converted
        with torch.no_grad(), autocast(device.type, dtype):
            if metric is None:
                windows = _held_out(data, settings.windows)
                _shares(weights or {}, windows)  # a mistake shows before minutes of probing
                base, found = _measure_losses(model, graph, windows, probes, progress=progress)
            else:
                base, found = _measure_metric(model, metric, probes, progress=progress)
    finally:
        model.train(training)
    shares = _shares(weights or {}, base)
    entries = tuple(_entry(probe, losses, base, shares) for probe, losses in zip(probes, found, strict=True))
    return Profile(
        entries=entries,
        base=base,
        unit=NATS if metric is None else "metric",
        unprunable=_most_knowing(entries, settings.unprunable),
        settings=settings,
    )


class Probe:
    """The least salient structures of one group, and the hooks that take them out for a while."""

    def __init__(self, model: nn.Module, group: NodeGroup, structures: Tensor) -> None:
        self.group = group
        self.count = len(structures)
        self._gates: list[tuple[nn.Module, Tensor]] = []
        for consumer in group.consumers:
            module = _submodule(model, consumer.module)
            device = next((p.device for p in module.parameters()), torch.device("cpu"))
            keep = torch.ones(consumer.features, dtype=torch.bool)
            keep[consumer.rows[structures].flatten()] = False
            self._gates.append((module, keep.to(device)))

    @contextmanager
    def removed(self) -> Iterator[None]:
        """Inside the context the structures' features are zero at every consumer's input."""

        def zero(keep: Tensor) -> Callable[..., tuple[object, ...]]:
            # where, not a product: a structure that overflows to infinity is cut too
            return lambda _module, args: (args[0].where(keep, 0), *args[1:])

        with ExitStack() as stack:
            for module, keep in self._gates:
                stack.callback(module.register_forward_pre_hook(zero(keep)).remove)
            yield


class CachedProbes:
    """Losses of the whole model and of each probe on the same tokens; what lies before a probed layer runs once."""

    def __init__(self, model: nn.Module, graph: Graph, probes: Sequence[Probe], trial: Tensor) -> None:
        """`trial`, `(1, tokens)` ids, is where replays are tried out."""
        self.model, self.probes = model, probes
        self._layers = _layers(model, graph)
        self._starts = replay_starts(self._layers, lambda: _logits(model, trial))

    @torch.no_grad()
    def losses(self, tokens: Tensor) -> Iterator[Tensor]:
        """Of the whole model, then of each probe: nats per predicted token of each window, `(batch,)`.

        Args:
            tokens: `(batch, window)` ids on the model's device.
        """
        whole, outputs = record(self._layers, partial(window_losses, self.model, tokens))
        yield whole
        for probe in self.probes:
            start = self._starts[probe.group.layer] if outputs and probe.group.layer is not None else 0
            with replayed(self._layers, outputs or [], start), probe.removed():
                loss = window_losses(self.model, tokens)
            yield loss


def window_losses(model: nn.Module, tokens: Tensor) -> Tensor:
    """Mean nats per predicted token of every window, `(batch,)` float32, of `(batch, window)` ids."""
    return token_losses(_logits(model, tokens), tokens).mean(1)


Measured = tuple[dict[str, float], list[dict[str, float]]]
"""Loss per source of the whole model, and of each probe."""


def _measure_losses(
    model: nn.Module, graph: Graph, windows: Mapping[str, Tensor], probes: Sequence[Probe], *, progress: bool
) -> Measured:
    """Windows of several sources share a pass: a short one does not use what the machine can do."""
    device = next(model.parameters()).device
    rows = torch.cat(tuple(windows.values()))
    source_of = [source for source, some in windows.items() for _ in some]
    cached = CachedProbes(model, graph, probes, rows[:1, :TRIAL_TOKENS].to(device))
    sums = [dict.fromkeys(windows, 0.0) for _ in (None, *probes)]
    batches = torch.split(rows, windows_per_pass(model, rows.shape[1]))
    steps = ((at, loss) for batch in batches for at, loss in enumerate(cached.losses(batch.to(device))))
    done = [0] * len(sums)
    for at, losses in _track(steps, total=len(batches) * len(sums), show=progress):
        for loss in losses.tolist():
            source = source_of[done[at]]
            sums[at][source] += _finite(loss, probes[at - 1] if at else None, source) / len(windows[source])
            done[at] += 1
    return sums[0], sums[1:]


def _measure_metric(model: nn.Module, metric: Metric, probes: Sequence[Probe], *, progress: bool) -> Measured:
    measured: list[dict[str, float]] = []
    for probe in _track([None, *probes], total=1 + len(probes), show=progress):
        with nullcontext() if probe is None else probe.removed():
            value = metric(model)
        values = value if isinstance(value, Mapping) else {"metric": value}
        measured.append({source: _finite(number, probe, source) for source, number in values.items()})
        if measured[-1].keys() != measured[0].keys():
            raise SettingsError(
                f"metric: it measured {sorted(measured[-1])} for the {_what(probe)}, but {sorted(measured[0])} for the "
                "whole model; it must name the same sources each time"
            )
    return measured[0], measured[1:]


_track = partial(track, description="probing node groups")


def _logits(model: nn.Module, tokens: Tensor) -> Tensor:
    logits: Tensor = model(input_ids=tokens, use_cache=False).logits
    return logits


def _finite(value: Tensor | float, probe: Probe | None, source: str) -> float:
    number = float(value)
    if not math.isfinite(number):
        raise ModelError(
            f"{_what(probe)}: the loss on {source} is {number}, a finite number was expected; look for non-finite "
            "weights, or load the model in bfloat16 or float32 if it is in float16"
        )
    return number


def _what(probe: Probe | None) -> str:
    return "whole model" if probe is None else f"probe of {probe.group.name}"


def _held_out(data: Data | None, count: int) -> dict[str, Tensor]:
    if data is None:
        raise SettingsError("there is nothing to measure the model on; give data, or a metric that measures it")
    windows = {source.name: source.valid[:count] for source in data.sources}
    if not windows:
        raise DataError("the data has no sources, at least one was expected; name them in the data file")
    for name, rows in windows.items():
        if not len(rows):
            raise DataError(f"source {name} has no held-out window; give it more text or a smaller `data.window`")
    short = {name: len(rows) for name, rows in windows.items() if len(rows) < count}
    if short:
        warnings.warn(f"analysis.windows = {count} is not reached: held-out windows are {short}", stacklevel=3)
    return windows


def _least_salient(group: NodeGroup, scores: Mapping[str, Tensor], share: float) -> Tensor:
    """Indices of the structures a probe removes: at least one, never all; equal scores go by index."""
    score = scores.get(group.name)
    if score is None or score.shape != (group.size,):
        found = "none" if score is None else f"shape {tuple(score.shape)}"
        raise SettingsError(
            f"scores of {group.name}: {found}, expected one saliency for each of its {group.size} structures; "
            "compute them on the same graph"
        )
    count = min(max(1, round(share * group.size)), group.size - 1)
    return score.detach().cpu().argsort(stable=True)[:count]


def _shares(weights: Mapping[str, float], sources: Collection[str]) -> dict[str, float]:
    """What each source counts; the shares sum to 1."""
    for name in weights.keys() - sources:
        raise SettingsError(f'weights: no source "{name}" was measured; {did_you_mean(name, sources)}')
    given = {source: weights.get(source, 1.0) for source in sources}
    total = sum(given.values())
    if not total > 0 or min(given.values()) < 0:
        raise SettingsError(f"weights = {dict(weights)}: expected numbers from 0 upwards, and one source above 0")
    return {source: weight / total for source, weight in given.items()}


def _entry(
    probe: Probe, losses: Mapping[str, float], base: Mapping[str, float], shares: Mapping[str, float]
) -> ProfileEntry:
    deviation = {source: losses[source] - base[source] for source in base}
    group = probe.group
    return ProfileEntry(
        group=group.name,
        kind=group.kind,
        layer=group.layer,
        size=group.size,
        probed=probe.count,
        deviation=deviation,
        macro=sum(shares[source] * value for source, value in deviation.items()),
    )


def _most_knowing(entries: Sequence[ProfileEntry], share: float) -> tuple[str, ...]:
    ranked = sorted(entries, key=lambda entry: entry.macro, reverse=True)
    return tuple(entry.group for entry in ranked[: round(share * len(entries))])


def _layers(model: nn.Module, graph: Graph) -> list[nn.Module]:
    return list(_submodule(model, graph.layers_path).children())


def _submodule(model: nn.Module, path: str) -> nn.Module:
    """The module at `path`, which may be written for the model without the wrapper that holds its adapters."""
    try:
        return model.get_submodule(path)
    except AttributeError:
        inner = getattr(model, "get_base_model", None)
        if inner is None:
            raise ModelError(
                f"the model has no module {path}, which its graph names; discover the graph anew"
            ) from None
        return _submodule(inner(), path)
