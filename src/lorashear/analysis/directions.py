"""Principal directions of an axis: those that matter first, one basis for the whole model, so that nothing is added to it.

A direction matters if the activations move there (as in SliceGPT, arXiv 2401.15024) and the loss would notice: the
geometric mean of the second moments of activations and gradients. Activations alone keep loud directions that nothing
listens to; the mean keeps the space that either knows, and gives none to where nothing moves.
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from lorashear.evaluation.inference import autocast, input_gradients, run_back, run_through
from lorashear.graph.basis import Basis


def principal_directions(
    model: nn.Module,
    basis: Basis,
    windows: Tensor,
    *,
    batch: int = 8,
    sensitivity: bool = True,
    dtype: torch.dtype | None = None,
    progress: bool = False,
) -> tuple[Tensor, Tensor]:
    """Eigenvectors of what the vectors that the norms measure do, each brought to the same length first, as the norm does.

    Args:
        model: left as it was.
        basis: says which modules measure the axis.
        windows: token ids, `(samples, window)`.
        batch: windows in a pass.
        sensitivity: whether the loss's derivative by the vectors counts as much as the vectors; forward passes alone do
            without.
        dtype: autocast of the backward passes.
        progress: show a bar when it takes long.

    Returns:
        `(size, size)` float32, column i the direction that matters i-th most, and the shares, `(size,)`, falling.
    """
    moments = _Moments(basis.group.size, sensitivity)
    with ExitStack() as stack:
        for path in basis.measured:
            stack.callback(model.get_submodule(path).register_forward_pre_hook(moments.gather).remove)
        if sensitivity:
            stack.enter_context(input_gradients(model))
            run_back(model, windows, batch=batch, description="Directions", dtype=dtype, progress=progress)
        else:
            run_through(model, windows, batch=batch, description="Directions", progress=progress)
    values, vectors = torch.linalg.eigh(moments.mean())
    share = values.flip(0).clamp(min=0.0)
    return vectors.flip(1).float(), (share / share.sum()).float()


_NOTHING = 1e-7
"""Share of the largest variance below which nothing moves along a direction: sums of products in float32 know no less."""


class _Moments:
    """Sums over tokens and norms of x x^T and g g^T, `(size, size)` float64, x of length 1 a channel, g = d loss / d x."""

    def __init__(self, size: int, sensitivity: bool) -> None:
        self.size, self.sensitivity = size, sensitivity
        self.vectors = torch.zeros(size, size, dtype=torch.float64)
        self.gradients = torch.zeros(size, size, dtype=torch.float64)

    def gather(self, _module: nn.Module, args: tuple[Any, ...]) -> None:
        given: Tensor = args[0]
        length = (given.detach().float().square().mean(-1, keepdim=True) + 1e-12).sqrt()
        _add(self.vectors, given.detach().float() / length)
        if self.sensitivity and given.requires_grad:
            share = length * len(given)  # the loss is a mean over the batch, whose last one may be smaller
            given.register_hook(lambda gradient: _add(self.gradients, gradient.float() * share))  # type: ignore[no-untyped-call]

    def mean(self) -> Tensor:
        """C # G, on the space where anything moves; without gradients C."""
        if not float(self.gradients.trace()) > 0.0:
            return self.vectors
        variances, axes = torch.linalg.eigh(self.vectors)
        alive = variances > _NOTHING * variances[-1]
        roots, axes = variances[alive].sqrt(), axes[:, alive]
        inner = (axes.T @ self.gradients @ axes) / torch.outer(roots, roots)
        values, turn = torch.linalg.eigh(inner)
        middle: Tensor = (turn * values.clamp(min=0.0).sqrt()) @ turn.T
        half: Tensor = axes * roots
        return half @ middle @ half.T


def _add(total: Tensor, values: Tensor) -> None:
    flat = values.reshape(-1, len(total))
    with autocast(flat.device.type, None):  # these sums need all their digits
        total.add_((flat.T @ flat).cpu())
