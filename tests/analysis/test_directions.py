"""Principal directions: those that the residual stream really moves in."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from transformers import PreTrainedModel

import lorashear as ls
from lorashear.analysis import directions
from lorashear.analysis.directions import principal_directions
from lorashear.graph.basis import basis_of


@pytest.mark.parametrize("sensitivity", [True, False])
def test_directions_of_a_stream_that_moves_in_few(
    pico_llama: Callable[..., PreTrainedModel], sensitivity: bool
) -> None:
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
    rotation, variance = principal_directions(model, basis, windows, batch=2, sensitivity=sensitivity)
    assert torch.allclose(rotation.T @ rotation, torch.eye(72), atol=1e-4)
    assert variance.sum().isclose(torch.ones(()))
    assert float(variance[10:].sum()) < 1e-6
    assert bool((variance.diff() <= 1e-9).all())
    first = rotation[:, :10]
    assert torch.allclose(first @ first.T, space @ space.T, atol=1e-3)


def test_directions_that_nothing_listens_to_come_last(pico_llama: Callable[..., PreTrainedModel]) -> None:
    """All readers, the head among them, are deaf in 30 dimensions, in which the stream moves most."""
    model = pico_llama(seed=3).eval()
    graph = ls.discover(model, realisable=False)
    basis = basis_of(graph, graph["model:residual"])
    deaf = torch.linalg.qr(torch.randn(72, 30, generator=torch.Generator().manual_seed(0)))[0]
    written = {f"{path}.weight" for path in basis.writers}
    named = dict(model.named_parameters())
    with torch.no_grad():
        for place in basis.places:
            along = named[place.parameter].movedim(place.dim, -1)
            loud = 10.0 if place.parameter in written else -1.0
            along.add_(loud * (along @ deaf) @ deaf.T)
    windows = torch.randint(0, 97, (5, 11), generator=torch.Generator().manual_seed(1))
    by_loss, _ = principal_directions(model, basis, windows, batch=2)
    by_variance, _ = principal_directions(model, basis, windows, batch=2, sensitivity=False)
    deaf_by_loss, deaf_by_variance = (float((each[:, :42].T @ deaf).square().sum()) for each in (by_loss, by_variance))
    assert deaf_by_variance > 29  # all but the norms' gains turn them
    assert deaf_by_loss < 17


def test_nothing_of_the_model_changes(pico_llama: Callable[..., PreTrainedModel]) -> None:
    model = pico_llama(seed=3).train()
    graph = ls.discover(model, realisable=False)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    windows = torch.randint(0, 97, (5, 11), generator=torch.Generator().manual_seed(1))
    principal_directions(model, basis_of(graph, graph["model:residual"]), windows, batch=2)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())
    assert all(module.training for module in model.modules())


def test_windows_count_as_much_in_a_smaller_last_batch(pico_llama: Callable[..., PreTrainedModel]) -> None:
    model = pico_llama(seed=3).eval()
    basis = basis_of(graph := ls.discover(model, realisable=False), graph["model:residual"])
    windows = torch.randint(0, 97, (5, 11), generator=torch.Generator().manual_seed(1))
    one, four = (principal_directions(model, basis, windows, batch=batch)[1] for batch in (1, 4))
    torch.testing.assert_close(one, four, rtol=1e-3, atol=1e-6)


def test_sums_keep_their_digits_under_autocast() -> None:
    values = torch.randn(40, 12, generator=torch.Generator().manual_seed(0))
    total = torch.zeros(12, 12, dtype=torch.float64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        directions._add(total, values)
    assert torch.allclose(total, values.double().T @ values.double(), rtol=1e-5, atol=1e-5)
