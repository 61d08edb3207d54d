"""LLM-Pruner: first-order Taylor terms of the weights of a structure.

Element: the sum over a structure's weights of |weight x gradient|. Vector: |sum of weight x gradient| of each parameter,
summed over the parameters that the structure has slices of.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from lorashear.evaluation.inference import autocast
from lorashear.graph.groups import Member, NodeGroup
from lorashear.progress import track
from lorashear.pruning.methods.method import Method, Scoring


def _taylor(scoring: Scoring, *, vector: bool) -> dict[str, Tensor]:
    groups = scoring.graph.gated
    products = _products(scoring, groups)
    return {group.name: _of_group(group, products, vector) for group in groups}


def _of_group(group: NodeGroup, products: dict[str, Tensor], vector: bool) -> Tensor:
    total = torch.zeros(group.size)
    for member in group.members:
        if not member.adapter and not member.buffer:
            total += _of_member(products[member.parameter], member, vector)
    return total


def _of_member(product: Tensor, member: Member, vector: bool) -> Tensor:
    rows = (product if vector else product.abs()).movedim(member.dim, 0).flatten(1).sum(1)
    per_structure = rows[member.rows.to(rows.device)].sum(1).cpu()
    return per_structure.abs() if vector else per_structure


def _products(scoring: Scoring, groups: tuple[NodeGroup, ...]) -> dict[str, Tensor]:
    """Weight x gradient of the mean loss, of every weight that has a slice of a structure."""
    model = scoring.model
    named = dict(model.named_parameters())
    wanted = {member.parameter for group in groups for member in group.members if not member.buffer}
    flags = {name: parameter.requires_grad for name, parameter in named.items()}
    device = next(model.parameters()).device
    training = model.training
    model.eval()
    try:
        for name, parameter in named.items():
            parameter.requires_grad_(name in wanted)
        parts = torch.split(scoring.windows, scoring.batch)
        for part in track(parts, total=len(parts), description="Saliency"):
            input_ids = part.to(device)
            with autocast(device.type, scoring.dtype):
                loss = model(input_ids=input_ids, labels=input_ids, use_cache=False).loss
            (loss * len(part) / len(scoring.windows)).backward()
        return {name: _product(named[name]) for name in wanted}
    finally:
        model.zero_grad(set_to_none=True)
        for name, parameter in named.items():
            parameter.requires_grad_(flags[name])
        model.train(training)


def _product(parameter: Tensor) -> Tensor:
    gradient = parameter.grad
    return torch.zeros_like(parameter) if gradient is None else (parameter.detach() * gradient).float()


_REFERENCE = "https://arxiv.org/abs/2305.11627"
TAYLOR = Method("taylor", _REFERENCE, partial(_taylor, vector=False))
TAYLOR_VECTOR = Method("taylor-vector", _REFERENCE, partial(_taylor, vector=True))
