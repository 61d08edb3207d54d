"""SliceGPT: the residual stream in the basis of its principal directions, the least of them cut.

The published method has a basis a block, and matrices between them that count against it; here one basis serves the whole
model and nothing is added.
"""

from __future__ import annotations

from torch import Tensor

from lorashear.pruning.methods.method import Method, Scoring


def _nothing(_scoring: Scoring) -> dict[str, Tensor]:
    """Which directions go follows from their variance (`pruning/residual.py`)."""
    return {}


SLICEGPT = Method("slicegpt", "https://arxiv.org/abs/2401.15024", _nothing, kinds=("residual",), by_variance=True)
