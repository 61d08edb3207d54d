"""Closed-form compensation at the cut: what stays of a consumer's inputs takes over, as well as a linear map can, what the
features that go have contributed.

With G = sum of x x^T over calibration tokens, W the consumer's weight and K the features that stay, the weight on them that
changes the consumer's output least (in the mean square) is W G[:, K] (G[K, K] + lambda I)^-1: least squares with
damping, as in the OBS family (Frantar and Alistarh, arXiv 2301.00774, for whole columns). It takes forward passes and no
training tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from lorashear.evaluation.inference import run_through
from lorashear.graph.groups import Consumer, Graph, Kind
from lorashear.plan import Plan

DAMPING = 0.01
"""Share of the mean variance that is added to every feature's."""
MOMENT_BYTES = 2**30
"""Room for the matrices of one pass; a model with more makes several passes."""


@dataclass(frozen=True)
class Loss:
    """What the module loses that reads some structures."""

    consumer: Consumer
    dim: int
    """Dimension of the weight along its input features."""
    keep: Tensor
    """`(features,)` bool."""


def compensate_(
    model: nn.Module, graph: Graph, plan: Plan, windows: Tensor, *, batch: int = 8, damping: float = DAMPING
) -> int:
    """Changes the weights that read what the plan removes; to be followed by `cut_` with the same plan.

    Args:
        model: the model that `graph` was discovered on; with adapters the base weight takes over for both.
        graph: its node groups.
        plan: groups without consumers (the residual stream, experts, layers) are passed over.
        windows: token ids to take the moments from, `(samples, window)`.
        batch: windows in a forward pass.
        damping: share of the mean variance added to every feature's.

    Returns:
        The number of consumers whose weight was changed.
    """
    losses = losses_of(graph, plan)
    for some in _passes(losses):
        moments = _moments(model, some, windows, batch)
        for loss in some:
            solve_(model, loss, moments[loss.consumer.module], damping)
    return len(losses)


def losses_of(graph: Graph, plan: Plan, *, every: bool = False) -> list[Loss]:
    """What the consumers of the plan's structures lose; with `every`, all consumers, those that lose nothing too."""
    keep: dict[str, Tensor] = {}
    consumers: dict[str, Consumer] = {}
    removed = dict.fromkeys((group.name for group in graph.gated), ()) | dict(plan.removed) if every else plan.removed
    for name, structures in removed.items():
        if graph[name].kind is Kind.RESIDUAL:  # whoever reads the stream reads all that is left of it
            continue
        for consumer in graph[name].consumers:
            mask = keep.setdefault(consumer.module, torch.ones(consumer.features, dtype=torch.bool))
            mask[consumer.rows[list(structures)].flatten()] = False
            consumers[consumer.module] = consumer
    return [Loss(consumer, _dim(graph, consumer), keep[path]) for path, consumer in consumers.items()]


def _dim(graph: Graph, consumer: Consumer) -> int:
    axes = graph.parameters[consumer.parameter].axes
    return next(at for at, axis in enumerate(axes) if axis.root() is consumer.axis.root())


def _passes(losses: Sequence[Loss]) -> Iterator[list[Loss]]:
    """Consumers whose matrices fit together."""
    some: list[Loss] = []
    for loss in losses:
        if some and 4 * sum(each.consumer.features**2 for each in (*some, loss)) > MOMENT_BYTES:
            yield some
            some = []
        some.append(loss)
    if some:
        yield some


def _moments(model: nn.Module, losses: Sequence[Loss], windows: Tensor, batch: int) -> Mapping[str, Tensor]:
    """Consumer's path -> sum over tokens of x x^T, `(features, features)` float32."""
    found: dict[str, Tensor] = {}

    def gather(path: str) -> Any:
        def hook(_module: nn.Module, args: tuple[Any, ...]) -> None:
            features = args[0].detach().flatten(0, -2).float()
            product = features.T @ features
            found[path] = product if path not in found else found[path] + product

        return hook

    hooks = [
        model.get_submodule(loss.consumer.module).register_forward_pre_hook(gather(loss.consumer.module))
        for loss in losses
    ]
    try:
        run_through(model, windows, batch=batch, description="Compensation")
    finally:
        for hook in hooks:
            hook.remove()
    return found


@torch.no_grad()
def solve_(model: nn.Module, loss: Loss, moment: Tensor, damping: float) -> None:
    """Changes one weight; `moment` is the sum of x x^T over its module's inputs, `(features, features)`."""
    weight = dict(model.named_parameters())[loss.consumer.parameter]
    update = _update(model.get_submodule(loss.consumer.module))
    keep = loss.keep.to(moment.device)
    moment = moment.clone()  # it was made in inference mode
    inner = moment[keep][:, keep].double()
    inner.diagonal().add_(damping * float(moment.diagonal().mean()))
    across = moment[keep].double()  # (kept, features)
    # rows of the solution: how much of every feature each kept one takes over, (kept, features)
    shares = torch.linalg.solve(inner, across)
    features_first = weight.movedim(loss.dim, 0)
    composed = features_first if update is None else features_first + update.movedim(loss.dim, 0)
    flat = composed.reshape(len(keep), -1).double()
    change = (shares @ flat - flat[keep]).to(weight.dtype)
    features_first[keep] += change.reshape(-1, *features_first.shape[1:])


def _update(module: nn.Module) -> Tensor | None:
    """What adapters add to a weight."""
    if not isinstance(module, BaseTunerLayer):
        return None
    return torch.stack([module.get_delta_weight(name) for name in module.active_adapters]).sum(0)
