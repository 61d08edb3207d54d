"""Turns an axis of a model into another basis, in place: the same function, written in other directions."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lorashear.errors import PlanError
from lorashear.graph.basis import Basis, Gain, Place


@torch.no_grad()
def rotate_(model: nn.Module, basis: Basis, rotation: Tensor) -> None:
    """Multiplies every weight along the axis by `rotation`; the model's outputs stay what they were.

    Gains of norms go into the weights that read them first. A gain that cannot (`Gain.readers` is empty, as before a
    tied head) is replaced by its mean: that is the one thing which changes the outputs, as little as the gain varies.

    Args:
        model: the model that `basis` was found on.
        basis: from `graph.basis.basis_of`.
        rotation: orthogonal, `(size, size)`; column i is the direction that becomes channel i.

    Raises:
        PlanError: when `rotation` is not orthogonal or of another size.
    """
    size = basis.group.size
    if rotation.shape != (size, size):
        raise PlanError(f"a rotation of {basis.group.name} is {size} x {size}, this one {tuple(rotation.shape)}")
    turn = rotation.double()
    if float((turn.T @ turn - torch.eye(size, dtype=turn.dtype, device=turn.device)).abs().max()) > 1e-4:
        raise PlanError(f"the rotation of {basis.group.name} is not orthogonal")
    tensors = dict(model.named_parameters())
    for gain in basis.gains:
        _take_gain_(tensors, gain)
    for place in basis.places:
        weight = tensors[place.parameter]
        # one weight at a time, in float32: a rotation in half precision would round what it is meant to keep
        turned = weight.movedim(place.dim, -1).float() @ rotation.to(weight.device, torch.float32)
        weight.copy_(turned.movedim(-1, place.dim))


def _take_gain_(tensors: dict[str, nn.Parameter], gain: Gain) -> None:
    parameter = tensors[gain.parameter]
    factor = parameter.float() + gain.offset
    if not gain.readers:
        parameter.fill_(float(factor.mean()) - gain.offset)
        return
    for reader in gain.readers:
        weight = tensors[reader.parameter]
        weight.copy_(weight.float() * _along(factor, weight, reader))
    parameter.fill_(1.0 - gain.offset)


def _along(factor: Tensor, weight: Tensor, place: Place) -> Tensor:
    shape = [1] * weight.dim()
    shape[place.dim] = -1
    return factor.to(weight.device).view(shape)
