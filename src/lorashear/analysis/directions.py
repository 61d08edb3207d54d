"""Principal directions of an axis: in which of them the activations move, and in which they hardly do (as in SliceGPT,
arXiv 2401.15024, but one basis for the whole model, so that nothing is added to it)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lorashear.evaluation.inference import run_through
from lorashear.graph.basis import Basis


def principal_directions(
    model: nn.Module, basis: Basis, windows: Tensor, *, batch: int = 8, progress: bool = False
) -> tuple[Tensor, Tensor]:
    """Eigenvectors of the vectors that the norms measure, each brought to the same length first, as the norm does.

    Args:
        model: runs forward only.
        basis: says which modules measure the axis.
        windows: token ids, `(samples, window)`.
        batch: windows in a forward pass.
        progress: show a bar when it takes long.

    Returns:
        `(size, size)` float32, column i the direction of the i-th largest variance, and the shares of variance,
        `(size,)`, falling.
    """
    size = basis.group.size
    total = torch.zeros(size, size, dtype=torch.float64)

    def gather(_module: nn.Module, args: tuple[Any, ...]) -> None:
        vectors = args[0].detach().reshape(-1, size).float()
        unit = vectors * torch.rsqrt(vectors.square().mean(1, keepdim=True) + 1e-12)
        total.add_((unit.T @ unit).cpu())

    hooks = [model.get_submodule(path).register_forward_pre_hook(gather) for path in basis.measured]
    try:
        run_through(model, windows, batch=batch, description="Directions", progress=progress)
    finally:
        for hook in hooks:
            hook.remove()
    values, vectors = torch.linalg.eigh(total)
    variance = values.flip(0).clamp(min=0.0)
    return vectors.flip(1).float(), (variance / variance.sum()).float()
