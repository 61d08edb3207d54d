"""The teacher's part of the loss, against the formula written out."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from lorashear.training import Teacher, TrainJob, cosine_to, distill, train
from lorashear.training.distill import distillation_loss


def expected(logits: Tensor, teacher: Tensor, input_ids: Tensor, weight: float) -> Tensor:
    text = F.cross_entropy(logits[:, :-1].flatten(0, 1), input_ids[:, 1:].flatten())
    against = F.cross_entropy(logits[:, :-1].flatten(0, 1), teacher[:, :-1].flatten(0, 1).softmax(-1))
    return (1 - weight) * text + weight * against


@pytest.mark.parametrize("chunk_bytes", [1, 2**26])
@pytest.mark.parametrize("weight", [0.0, 0.3, 1.0])
def test_loss_and_gradient(monkeypatch: pytest.MonkeyPatch, weight: float, chunk_bytes: int) -> None:
    monkeypatch.setattr(distill, "_CHUNK_BYTES", chunk_bytes)
    torch.manual_seed(0)
    logits, teacher = torch.randn(2, 5, 11, requires_grad=True), torch.randn(2, 5, 11)
    input_ids = torch.randint(0, 11, (2, 5))
    ours, wanted = (f(logits, teacher, input_ids, weight) for f in (distillation_loss, expected))
    assert torch.allclose(ours, wanted, atol=1e-6)
    (one,), (other,) = (torch.autograd.grad(loss, logits) for loss in (ours, wanted))
    assert torch.allclose(one, other, atol=1e-7)


class Same(torch.utils.data.Dataset[dict[str, Tensor]]):
    """One window again and again."""

    def __len__(self) -> int:
        return 40

    def __getitem__(self, n: int) -> dict[str, Tensor]:
        if n >= len(self):
            raise IndexError(n)
        return {"input_ids": torch.arange(10)}


def test_a_student_comes_nearer_to_its_teacher(pico_llama: Callable[..., PreTrainedModel], tmp_path: Path) -> None:
    """With the whole weight on the teacher, and micro batches that have to be averaged."""
    teacher, student = pico_llama(seed=1).eval(), pico_llama(seed=2)
    input_ids = torch.arange(10)[None]
    before = {name: weight.clone() for name, weight in teacher.state_dict().items()}

    def distance() -> float:
        with torch.no_grad():
            student.eval()
            logits = [model(input_ids=input_ids).logits.log_softmax(-1) for model in (student, teacher)]
            return float(F.kl_div(logits[0], logits[1], log_target=True, reduction="sum"))

    far = distance()
    optimizer = torch.optim.AdamW(student.parameters(), lr=3e-3)
    job = TrainJob(name="s", steps=10, batch=4, micro_batch=2, seed=0, out=tmp_path, progress=False)
    train(
        student,
        Same(),
        optimizer=optimizer,
        scheduler=cosine_to(optimizer, steps=10),
        job=job,
        teacher=Teacher(teacher, 1.0),
    )
    assert distance() < 0.5 * far
    assert all(torch.equal(weight, before[name]) for name, weight in teacher.state_dict().items())
