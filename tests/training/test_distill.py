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
from lorashear.training.distill import BEHIND, distillation_loss


def expected(logits: Tensor, teacher: Tensor, input_ids: Tensor, weight: float) -> Tensor:
    student, wanted = logits[:, :-1].flatten(0, 1), teacher[:, :-1].flatten(0, 1)
    text, teachers = (F.cross_entropy(each, input_ids[:, 1:].flatten()) for each in (student, wanted))
    share = weight * min(1.0, max(0.0, 1 + float((text - teachers).detach()) / BEHIND))
    return (1 - share) * text + share * F.cross_entropy(student, wanted.softmax(-1))


def given(lead: float) -> tuple[Tensor, Tensor, Tensor]:
    """Student's and teacher's logits and the text; the teacher's loss is `lead` nats below the student's."""
    torch.manual_seed(0)
    logits, teacher = torch.randn(2, 5, 11, requires_grad=True), torch.randn(2, 5, 11)
    input_ids = torch.randint(0, 11, (2, 5))
    right = F.one_hot(input_ids.roll(-1, 1), 11)
    wanted = float(F.cross_entropy(logits.detach()[:, :-1].flatten(0, 1), input_ids[:, 1:].flatten())) - lead
    low, high = -20.0, 20.0
    for _ in range(60):  # the more of the right answer, the lower the teacher's loss
        middle = (low + high) / 2
        tried = (teacher + middle * right)[:, :-1].flatten(0, 1)
        too_good = float(F.cross_entropy(tried, input_ids[:, 1:].flatten())) < wanted
        low, high = (low, middle) if too_good else (middle, high)
    return logits, teacher + low * right, input_ids


@pytest.mark.parametrize("chunk_bytes", [1, 2**26])
@pytest.mark.parametrize("lead", [0.5, 0.03, -0.05, -0.5])
@pytest.mark.parametrize("weight", [0.0, 0.3, 1.0])
def test_loss_and_gradient(monkeypatch: pytest.MonkeyPatch, weight: float, lead: float, chunk_bytes: int) -> None:
    monkeypatch.setattr(distill, "_CHUNK_BYTES", chunk_bytes)
    logits, teacher, input_ids = given(lead)
    ours, wanted = (f(logits, teacher, input_ids, weight) for f in (distillation_loss, expected))
    assert torch.allclose(ours, wanted, atol=1e-5)
    (one,), (other,) = (torch.autograd.grad(loss, logits) for loss in (ours, wanted))
    assert torch.allclose(one, other, atol=1e-6)


def test_a_teacher_that_knows_less_is_not_listened_to() -> None:
    logits, teacher, input_ids = given(lead=-0.2)
    assert torch.equal(
        distillation_loss(logits, teacher, input_ids, 1.0), distillation_loss(logits, teacher, input_ids, 0.0)
    )


class Same(torch.utils.data.Dataset[dict[str, Tensor]]):
    """One window again and again."""

    def __init__(self, window: Tensor) -> None:
        self.window = window

    def __len__(self) -> int:
        return 40

    def __getitem__(self, n: int) -> dict[str, Tensor]:
        if n >= len(self):
            raise IndexError(n)
        return {"input_ids": self.window}


def test_a_student_comes_nearer_to_its_teacher(pico_llama: Callable[..., PreTrainedModel], tmp_path: Path) -> None:
    """With the whole weight on the teacher, and micro batches that have to be averaged."""
    teacher, student = pico_llama(seed=1).eval(), pico_llama(seed=2)
    with torch.no_grad():
        teacher.get_output_embeddings().weight.mul_(20.0)  # one that is sure of itself
    input_ids = torch.arange(10)[None]
    for _ in range(10):  # what the teacher itself would write
        with torch.no_grad():
            said = teacher(input_ids=input_ids).logits.argmax(-1)
        input_ids[:, 1:] = said[:, :-1]
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
        Same(input_ids[0]),
        optimizer=optimizer,
        scheduler=cosine_to(optimizer, steps=10),
        job=job,
        teacher=Teacher(teacher, 1.0),
    )
    assert distance() < 0.5 * far
    assert all(torch.equal(weight, before[name]) for name, weight in teacher.state_dict().items())
