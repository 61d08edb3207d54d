"""Rotating a model's residual stream leaves its function as it was; cutting it afterwards is exact too."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

import lorashear as ls
from lorashear.errors import PlanError
from lorashear.graph.basis import Basis, basis_of
from lorashear.graph.groups import Kind
from lorashear.surgery.rotate import rotate_


def basis(model: PreTrainedModel, *, realisable: bool = False) -> tuple[ls.Graph, Basis]:
    graph = ls.discover(model, realisable=realisable)
    groups = [group for group in graph if group.kind is Kind.RESIDUAL]
    return graph, basis_of(graph, max(groups, key=lambda group: len(group.members)))


def rotation(size: int) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))[0].float()


@torch.no_grad()
def test_a_rotated_model_is_cut_like_any_other(pico_llama: Callable[..., PreTrainedModel]) -> None:
    model = pico_llama(tied=True).eval()
    graph, found = basis(model, realisable=True)
    rotate_(model, found, rotation(72))
    plan = ls.Plan(removed={found.group.name: range(48, 72)}, shape="uniform")
    input_ids = torch.arange(13)[None]
    zeroed = pico_llama(tied=True).eval()
    zeroed.load_state_dict(model.state_dict())
    ls.zero_(zeroed, graph, plan)
    ls.cut_(model, graph, plan)
    assert model.config.hidden_size == 48
    wanted = zeroed(input_ids=input_ids).logits
    assert torch.allclose(model(input_ids=input_ids).logits, wanted, atol=1e-5)


def test_mistakes(pico_llama: Callable[..., PreTrainedModel]) -> None:
    model = pico_llama()
    _, found = basis(model)
    with pytest.raises(PlanError, match="72 x 72"):
        rotate_(model, found, torch.eye(71))
    with pytest.raises(PlanError, match="not orthogonal"):
        rotate_(model, found, 2 * torch.eye(72))
