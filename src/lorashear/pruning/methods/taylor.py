"""LLM-Pruner: first-order Taylor terms of the weights of a structure.

Element: the sum over a structure's weights of |weight x gradient|. Vector: |sum of weight x gradient| of each parameter,
summed over the parameters that the structure has slices of.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from lorashear.evaluation.inference import autocast, evaluation
from lorashear.graph.groups import Member
from lorashear.progress import track
from lorashear.pruning.methods.method import Method, Scoring


def _taylor(scoring: Scoring, *, vector: bool) -> dict[str, Tensor]:
    groups = scoring.graph.gated
    named = dict(scoring.model.named_parameters())
    slices: dict[str, list[tuple[str, Member]]] = {}
    for group in groups:
        for member in group.members:
            if not (member.adapter or member.buffer):
                slices.setdefault(member.parameter, []).append((group.name, member))
    totals = {group.name: torch.zeros(group.size) for group in groups}
    with _gradients(scoring, named, {*slices}):
        for (
            name,
            members,
        ) in slices.items():  # one product at a time: beside the gradients there is nothing of the model's size
            product = _product(named[name])
            for group_name, member in members:
                totals[group_name] += _of_member(product, member, vector)
    return totals


def _of_member(product: Tensor, member: Member, vector: bool) -> Tensor:
    rows = (product if vector else product.abs()).movedim(member.dim, 0).flatten(1).sum(1)
    per_structure = rows[member.rows.to(rows.device)].sum(1).cpu()
    return per_structure.abs() if vector else per_structure


def _product(parameter: nn.Parameter) -> Tensor:
    """Weight x gradient, float32; the gradient is let go of."""
    gradient, parameter.grad = parameter.grad, None
    return torch.zeros_like(parameter) if gradient is None else parameter.detach().float() * gradient


@contextmanager
def _gradients(scoring: Scoring, named: dict[str, nn.Parameter], wanted: set[str]) -> Iterator[None]:
    """Inside, the wanted parameters have the gradient of the mean loss."""
    model = scoring.model
    flags = {name: parameter.requires_grad for name, parameter in named.items()}
    try:
        for name, parameter in named.items():
            parameter.requires_grad_(name in wanted)
        with evaluation(model) as device:
            parts = torch.split(scoring.windows, scoring.batch)
            for part in track(parts, total=len(parts), description="Saliency"):
                input_ids = part.to(device)
                with autocast(device.type, scoring.dtype):
                    loss = model(input_ids=input_ids, labels=input_ids, use_cache=False).loss
                (loss * len(part) / len(scoring.windows)).backward()
        yield
    finally:
        model.zero_grad(set_to_none=True)
        for name, parameter in named.items():
            parameter.requires_grad_(flags[name])


_REFERENCE = "https://arxiv.org/abs/2305.11627"
TAYLOR = Method("taylor", _REFERENCE, partial(_taylor, vector=False))
TAYLOR_VECTOR = Method("taylor-vector", _REFERENCE, partial(_taylor, vector=True))
