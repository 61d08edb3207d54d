"""Principal directions: those that the residual stream really moves in."""

from __future__ import annotations

from collections.abc import Callable

import torch
from transformers import PreTrainedModel

import lorashear as ls
from lorashear.analysis.directions import principal_directions
from lorashear.graph.basis import basis_of


def test_directions_of_a_stream_that_moves_in_few(pico_llama: Callable[..., PreTrainedModel]) -> None:
    """Every writer writes into a space of 10 dimensions: the other 62 have no variance."""
    model = pico_llama(seed=3).eval()
    graph = ls.discover(model, realisable=False)
    basis = basis_of(graph, graph["model:residual"])
    space = torch.linalg.qr(torch.randn(72, 10, generator=torch.Generator().manual_seed(0)))[0]
    with torch.no_grad():
        for path in basis.writers:
            weight = model.get_submodule(path).weight
            dim = next(p.dim for p in basis.places if p.parameter == f"{path}.weight")
            weight.copy_((weight.movedim(dim, -1) @ space @ space.T).movedim(-1, dim))  # type: ignore[union-attr, operator, arg-type]
    windows = torch.randint(0, 97, (5, 11), generator=torch.Generator().manual_seed(1))
    rotation, variance = principal_directions(model, basis, windows, batch=2)
    assert torch.allclose(rotation.T @ rotation, torch.eye(72), atol=1e-4)
    assert variance.sum().isclose(torch.ones(()))
    assert float(variance[10:].sum()) < 1e-6
    assert bool((variance.diff() <= 1e-9).all())
    first = rotation[:, :10]
    assert torch.allclose(first @ first.T, space @ space.T, atol=1e-3)
