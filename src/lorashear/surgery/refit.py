"""Closed-form refit at the cut, layer by layer: what stays learns, by least squares, to write what the full model wrote.

`compensate_` answers for the inputs of the full model. But once something is cut, every later layer reads a stream that
has drifted. Here the layers are walked once, the full model and the cut one side by side: the weight that writes into the
stream is solved for on the inputs that it will really have, X, and its target is what the full layer wrote there, Y,
plus a share c of what the stream is off by so far, D:

    W = argmin |W X - (Y + c D)|^2 + lambda |W - W0|^2

The full model needs no copy: a layer is run as it is before it is changed. It takes about four forward passes and no
training tokens. (Layer-wise reconstruction goes back to Dong et al., arXiv 1705.07565; here with the drift.)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from lorashear.evaluation.inference import autocast, inference
from lorashear.graph.groups import Graph, Kind
from lorashear.plan import Plan
from lorashear.progress import track
from lorashear.surgery.compensate import DAMPING, Loss, compensate_, losses_of
from lorashear.surgery.stepping import Layer, reached, steppable, watched

CORRECTION = 0.5
"""Share of the drift that a layer is asked to make good; with all of it layers chase the noise of those before them."""
_ELSEWHERE = 0.01
"""Share of what a layer adds to the stream that may come from elsewhere than from the modules that are refit."""


def refit_(
    model: nn.Module,
    graph: Graph,
    plan: Plan,
    windows: Tensor,
    *,
    batch: int = 8,
    dtype: torch.dtype | None = None,
    correction: float = CORRECTION,
    damping: float = DAMPING,
    progress: bool = True,
) -> int:
    """Changes the weights that write into the residual stream; to be followed by `cut_` with the same plan.

    Where the layers cannot be run one by one (they are not called once each, in order, on nothing but each other's
    output), or what is cut does not see every token (an expert), `compensate_` does what it can.

    Args:
        model: without adapters, the one that `graph` was discovered on.
        graph: its node groups.
        plan: groups without consumers are passed over; but the residual stream counts, in whatever basis it is.
        windows: token ids, `(samples, window)`.
        batch: windows in a forward pass.
        dtype: autocast of the passes.
        correction: share of the drift that every layer makes good, 0 to 1.
        damping: share of the inputs' mean variance that ties a weight to what it was.
        progress: show a bar when it takes long.

    Returns:
        The number of weights that were changed.
    """
    losses = {loss.consumer.module: loss for loss in losses_of(graph, plan, every=True)}
    lost = {path for path, loss in losses.items() if not bool(loss.keep.all())}
    stream = _stream_mask(graph, plan)
    if not lost and stream is None:
        return 0
    batch = min(batch, len(windows))
    parts = torch.split(windows[: len(windows) - len(windows) % batch], batch)
    with inference(model) as device, autocast(device.type, dtype, keeps_casts=False):
        inputs = [part.to(device) for part in parts]
        layers = steppable(model, graph.layers_path, list(losses), inputs[:2])
        if layers is not None and lost.issubset(path for layer in layers for path in layer.once):
            entries = [reached(layers[0].module, partial(model, input_ids=part, use_cache=False)) for part in inputs]
            if stream is None or len(stream) == entries[0].shape[-1]:  # else it is put together from narrower parts
                silent = {n: ~mask for n, dim, mask in graph.keep_masks(plan.removed) if _writes(losses, n, dim)}
                refit = _Refit(model, losses, silent, correction, damping, entries)
                if stream is not None:
                    refit.narrow_(stream.to(device))
                for layer in track(layers, total=len(layers), description="Refit", show=progress):
                    refit.step_(layer, lost)
                return refit.changed
    return compensate_(model, graph, plan, windows, batch=batch)


def _stream_mask(graph: Graph, plan: Plan) -> Tensor | None:
    """What stays of the residual stream, `(hidden,)`; None where all does."""
    for name in plan.removed:
        if graph[name].kind is Kind.RESIDUAL:
            return next(iter(graph.keep_leaves({name: plan.removed[name]}).values()), None)
    return None


def _writes(losses: Mapping[str, Loss], parameter: str, dim: int) -> bool:
    return any(loss.consumer.parameter == parameter and loss.dim != dim for loss in losses.values())


class _Refit:
    """The two streams, `(batch, seq, hidden)` a part, as they enter a layer, and what a step does to them."""

    def __init__(
        self,
        model: nn.Module,
        losses: Mapping[str, Loss],
        silent: Mapping[str, Tensor],
        correction: float,
        damping: float,
        entries: list[Tensor],
    ) -> None:
        self.model, self.losses, self.correction, self.damping = model, losses, correction, damping
        self.silent = silent  # parameter -> outputs that are cut, `(outputs,)`
        self.full = self.cut = entries
        self.stream: Tensor | None = None
        self.changed = 0

    def narrow_(self, stream: Tensor) -> None:
        """From here on the cut model's stream is zero where the mask, `(hidden,)`, is."""
        self.stream = stream
        self.cut = [hidden * stream for hidden in self.cut]

    def step_(self, layer: Layer, lost: set[str]) -> None:
        """Runs the full layer, refits it, runs the cut one."""
        if self.cut is self.full and lost.isdisjoint(layer.once):
            self.full = self.cut = [layer(hidden) for hidden in self.full]
            return
        wrote: dict[str, list[Tensor]] = {path: [] for path in layer.once}
        with watched(self.model, layer.once, lambda path, _, output: wrote[path].append(output)):
            after = [layer(hidden) for hidden in self.full]
        wrote = {path: [*map(_as_stream, outputs, after)] for path, outputs in wrote.items()}
        added = _all_added(self.full, after, wrote)
        for at, path in enumerate(layer.once):
            self._solve_(layer, path, layer.once[:at], wrote, added=added)
        self.changed += len(layer.once)
        self.cut = [layer(hidden) for hidden in self.cut]
        if self.stream is not None:  # what is not refit still writes there
            self.narrow_(self.stream)
        self.full = after

    def _solve_(
        self, layer: Layer, path: str, before: Sequence[str], wrote: Mapping[str, list[Tensor]], *, added: bool
    ) -> None:
        module, loss = self.model.get_submodule(path), self.losses[path]
        bias = getattr(module, "bias", None)
        inner = across = None
        for part, hidden in enumerate(self.cut):
            written: dict[str, Tensor] = {}
            with watched(self.model, before, partial(_note, written)):
                features = reached(module, partial(layer, hidden))
            target = wrote[path][part].float()
            if added:
                drift = (
                    self.full[part]
                    - hidden
                    + sum(wrote[name][part] - _as_stream(written[name], hidden) for name in before)
                )
                target = target + self.correction * drift
            if bias is not None:
                target = target - bias
            flat = features.flatten(0, -2).float()[:, loss.keep.to(features.device)]
            with autocast(flat.device.type, None):  # these sums need all their digits
                square, product = flat.T @ flat, flat.T @ target.flatten(0, -2)
            inner = square if inner is None else inner + square
            across = product if across is None else across + product
        assert inner is not None
        assert across is not None
        name = loss.consumer.parameter
        weight = dict(self.model.named_parameters())[name]
        _tie_and_solve_(weight, loss, inner, across, self.damping)
        if name in self.silent:
            weight.movedim(loss.dim, 0)[:, self.silent[name].to(weight.device)] = 0.0
            if bias is not None:
                bias[self.silent[name].to(weight.device)] = 0.0


def _note(into: dict[str, Tensor], path: str, _features: Tensor, output: Tensor) -> None:
    into[path] = output


def _as_stream(output: Tensor, stream: Tensor) -> Tensor:
    """What a module put out, in the shape of the stream, `(batch, seq, hidden)`: some layers flatten batch and positions."""
    return output.reshape(stream.shape) if output.numel() == stream.numel() else output


def _tie_and_solve_(weight: nn.Parameter, loss: Loss, inner: Tensor, across: Tensor, damping: float) -> None:
    """(X X^T + lambda I) W^T = X T^T + lambda W0^T on the features that stay; the others write nothing any more."""
    keep = loss.keep.to(weight.device)
    features_first = weight.movedim(loss.dim, 0)
    before = features_first[keep].double()
    tie = damping * float(inner.diagonal().mean())
    left = inner.double()
    left.diagonal().add_(tie)
    solved = torch.linalg.solve(left, across.double() + tie * before)
    features_first[keep] = solved.to(weight.dtype)
    features_first[~keep] = 0.0


def _all_added(before: Sequence[Tensor], after: Sequence[Tensor], wrote: Mapping[str, Sequence[Tensor]]) -> bool:
    """Whether a layer adds to the stream what its writers write, and next to nothing else."""
    if any(
        output.shape != result.shape
        for outputs in wrote.values()
        for output, result in zip(outputs, after, strict=True)
    ):
        return False
    off = total = 0.0
    for part, (hidden, result) in enumerate(zip(before, after, strict=True)):
        addition = result.float() - hidden.float()
        off += float((addition - sum(outputs[part].float() for outputs in wrote.values())).square().sum())
        total += float(addition.square().sum())
    return off <= _ELSEWHERE * total
