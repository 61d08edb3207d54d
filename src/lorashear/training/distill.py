"""Knowledge distillation: the small model learns the full model's next-token distribution, not only the text.

Teacher passes cost time and no training tokens. (Hinton et al., arXiv 1503.02531, at temperature 1.) A teacher is listened
to as far as it knows better: on text that the full model was not made for, the small one soon overtakes it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

_CHUNK_BYTES = 2**26  # of the logits that are turned into float32 distributions at a time
BEHIND = 0.1
"""Nats per token by which a teacher may be behind the student and still have a say."""


@dataclass(frozen=True)
class Teacher:
    """The full model, and how much of the loss is its."""

    model: nn.Module
    """Runs forward only, in evaluation mode."""
    weight: float
    """Share of the loss that is the cross-entropy against the teacher, at most; the rest is against the text."""

    def logits(self, input_ids: Tensor) -> Tensor:
        """`(batch, seq, vocabulary)`."""
        with torch.no_grad():
            logits: Tensor = self.model(input_ids=input_ids, use_cache=False).logits
            return logits


def distillation_loss(logits: Tensor, teacher: Tensor, input_ids: Tensor, weight: float) -> Tensor:
    """Mean over predicted tokens of (1 - w) * loss on the text + w * cross-entropy against the teacher.

    w is `weight` where the teacher's loss on the text is below the student's, falling to 0 where it is `BEHIND` above.

    Args:
        logits: the student's, `(batch, seq, vocabulary)`, of any float type.
        teacher: the teacher's, the same shape.
        input_ids: `(batch, seq)`.
        weight: share of the teacher's part, 0 to 1.
    """
    student, wanted = logits[:, :-1].flatten(0, 1), teacher[:, :-1].flatten(0, 1)
    targets = input_ids[:, 1:].flatten()
    rows = max(1, _CHUNK_BYTES // (4 * logits.shape[-1]))
    parts = zip(*(torch.split(each, rows) for each in (student, wanted, targets)), strict=True)
    # float32 copies of one chunk live at a time: they are made again in the backward pass
    sums = [checkpoint(_summed, *part, use_reentrant=False) for part in parts]
    on_text, against, teachers = torch.stack(sums).sum(0) / len(targets)
    lead = (on_text - teachers).detach()
    share = weight * (1 + lead / BEHIND).clamp(0.0, 1.0)
    loss: Tensor = (1 - share) * on_text + share * against
    return loss


def _summed(student: Tensor, teacher: Tensor, targets: Tensor) -> Tensor:
    """Sums over tokens: the student's loss on the text, its cross-entropy against the teacher, the teacher's loss."""
    log_probabilities = F.log_softmax(student.float(), -1)
    on_text = F.nll_loss(log_probabilities, targets, reduction="sum")
    wanted = F.log_softmax(teacher.float(), -1)
    against = -(wanted.exp() * log_probabilities).sum()
    return torch.stack([on_text, against, F.nll_loss(wanted, targets, reduction="sum")])
