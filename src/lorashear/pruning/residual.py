"""How much of the budget the residual stream gives up: measured on the model at hand, before anything is changed.

Some models use all of their residual stream, others move in few of its directions. For each width that the configuration
takes, the loss of the model is measured with its least principal directions projected away and the rest of the budget
taken from heads and FFN channels; the width of least loss is taken. A few passes, no training tokens.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lorashear.analysis.directions import principal_directions
from lorashear.errors import PlanError
from lorashear.evaluation.inference import inference
from lorashear.evaluation.perplexity import token_losses
from lorashear.graph.basis import Basis, NoBasisError, basis_of
from lorashear.graph.groups import Graph, Kind, NodeGroup
from lorashear.plan import Plan
from lorashear.progress import track
from lorashear.pruning.gates import StructureGates

logger = logging.getLogger(__name__)

MEASURED_WINDOWS = 32
"""Calibration windows that a width is judged by."""

PlanOf = Callable[[Mapping[str, Sequence[int]]], Plan]
"""Groups that lose these structures and no others -> plan for the whole budget."""


@dataclass(frozen=True)
class ResidualCut:
    """A narrower residual stream, in the basis of its principal directions."""

    basis: Basis
    rotation: Tensor
    """`(size, size)`, columns by falling variance: the last ones go."""
    kept: int
    losses: Mapping[int, float]
    """Width -> loss before any training, nats per token, of every width that was measured; 1 plan each."""

    @property
    def fixed(self) -> dict[str, tuple[int, ...]]:
        """What the group loses, once the model is rotated."""
        return _lost(self.basis.group, self.kept)


def choose_residual_cut(
    model: nn.Module,
    graph: Graph,
    windows: Tensor,
    plan_of: PlanOf,
    *,
    round_to: int = 8,
    batch: int = 8,
    sensitivity: bool = True,
    dtype: torch.dtype | None = None,
    progress: bool = False,
) -> ResidualCut | None:
    """The width of the residual stream at which the whole plan costs least; None where that is all of it.

    Args:
        model: left as it was.
        graph: of the model.
        windows: token ids, `(samples, window)`: all give the directions, the first `MEASURED_WINDOWS` the losses.
        plan_of: the plan for the whole budget around a residual stream that is narrower already; raises `PlanError`
            where there is none.
        round_to: widths are multiples of this.
        batch: windows in a forward pass.
        sensitivity: as `principal_directions` takes it.
        dtype: autocast of backward passes.
        progress: show bars.
    """
    group = residual_group(graph)
    if group is None:
        return None
    try:
        basis = basis_of(graph, group)
    except NoBasisError as error:
        logger.info("the residual stream keeps its width: no other basis goes unnoticed (%s)", error)
        return None
    if basis.inside or not basis.measured:
        logger.info(
            "the residual stream keeps its width: %s measures or writes it out of sight", basis.inside or "no norm"
        )
        return None
    plans = dict(_plans(graph, group, round_to, plan_of))
    if not plans:
        return None
    rotation, _ = principal_directions(
        model, basis, windows, batch=batch, sensitivity=sensitivity, dtype=dtype, progress=progress
    )
    losses: dict[int, float] = {}

    def loss(width: int) -> float:
        if width not in losses:
            losses[width] = _measured(
                model, graph, basis, rotation, width, windows[:MEASURED_WINDOWS], plans[width], batch, progress
            )
        return losses[width]

    kept = _least(list(plans), loss)
    told = ", ".join(f"{width}: {losses[width]:.3f}" for width in sorted(losses, reverse=True))
    logger.info("residual width %d of %d (loss by width, nats per token, before training: %s)", kept, group.size, told)
    return None if kept == group.size else ResidualCut(basis, rotation, kept, losses)


def residual_group(graph: Graph) -> NodeGroup | None:
    """The residual stream, where its width is a value of the configuration."""
    groups = [group for group in graph.prunable if group.kind is Kind.RESIDUAL and group.plain]
    return max(groups, key=lambda each: len(each.members), default=None)


def residual_widths(graph: Graph, round_to: int) -> list[dict[str, tuple[int, ...]]]:
    """What the residual stream would lose at each width that the configuration takes, least first."""
    group = residual_group(graph)
    return [] if group is None else [_lost(group, width) for width in _widths(graph, group, round_to)[1:]]


def _widths(graph: Graph, group: NodeGroup, round_to: int) -> list[int]:
    """Widths that the configuration takes, from all of it down to half, in steps of at least 1 / 64."""
    assert graph.geometry is not None
    found = [group.size]
    step = round_to * max(1, group.size // (64 * round_to))
    for width in range(group.size - 1 - (group.size - 1) % step, group.size // 2 - 1, -step):
        overrides = graph.geometry.solve({group.role: width})
        if overrides is not None and not graph.geometry.refusal(overrides):
            found.append(width)
    return found


def _plans(graph: Graph, group: NodeGroup, round_to: int, plan_of: PlanOf) -> Iterator[tuple[int, Plan]]:
    """Every width at which the budget can be met, and the plan there."""
    for width in _widths(graph, group, round_to):
        with suppress(PlanError):
            yield width, plan_of(_lost(group, width))


def _least(widths: Sequence[int], loss: Callable[[int], float]) -> int:
    """Where the loss is least: a coarse look at all widths, then closer ones around the best."""
    stride = max(1, len(widths) // 4)
    best = min(widths[::stride], key=loss)
    while stride > 1:
        stride = -(-stride // 2) if stride > 2 else 1
        at = widths.index(best)
        best = min((widths[i] for i in (at - stride, at, at + stride) if 0 <= i < len(widths)), key=loss)
    return best


def _measured(
    model: nn.Module,
    graph: Graph,
    basis: Basis,
    rotation: Tensor,
    width: int,
    windows: Tensor,
    plan: Plan,
    batch: int,
    progress: bool,
) -> float:
    gates = StructureGates(model, graph.gated)
    try:
        for name, rows in plan.removed.items():
            if name != basis.group.name:
                gates.set_(name, torch.tensor(rows), 0.0)
        with ExitStack() as stack:
            if width < basis.group.size:
                stack.enter_context(_projected(model, basis, rotation[:, :width]))
            return _mean_loss(model, windows, batch, f"Residual width {width}" if progress else None)
    finally:
        gates.remove()


def _lost(group: NodeGroup, width: int) -> dict[str, tuple[int, ...]]:
    return {group.name: tuple(range(width, group.size))} if width < group.size else {}


@contextmanager
def _projected(model: nn.Module, basis: Basis, directions: Tensor) -> Iterator[None]:
    """The model as if rotated and cut to these directions, `(size, kept)`; gains that would be lost are even."""
    tensors = dict(model.named_parameters())
    loose = [tensors[gain.parameter] for gain in basis.gains if not gain.readers]
    before = [gain.detach().clone() for gain in loose]
    projector = (directions @ directions.T).to(next(model.parameters()).device)

    def project(_module: nn.Module, _args: Any, output: Tensor) -> Tensor:
        return output @ projector.to(output.device, output.dtype)

    hooks = [model.get_submodule(path).register_forward_hook(project) for path in basis.writers]
    try:
        with torch.no_grad():
            for gain in loose:
                gain.fill_(float(gain.float().mean()))
        yield
    finally:
        for hook in hooks:
            hook.remove()
        with torch.no_grad():
            for gain, values in zip(loose, before, strict=True):
                gain.copy_(values)


def _mean_loss(model: nn.Module, windows: Tensor, batch: int, description: str | None) -> float:
    total = 0.0
    parts = torch.split(windows, batch)
    with inference(model) as device:
        for part in track(parts, total=len(parts), description=description or "", show=description is not None):
            input_ids = part.to(device)
            total += float(token_losses(model(input_ids=input_ids, use_cache=False).logits, input_ids).sum())
    return total / (windows.shape[0] * (windows.shape[1] - 1))
