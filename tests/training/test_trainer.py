from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import PreTrainedModel, TrainerCallback

from lorashear.config import LoraSettings
from lorashear.errors import DataError, OutputError, SettingsError, TrainingError
from lorashear.training import TrainJob, TrainResult, attach_lora, cosine_to, discard_checkpoints, merge_lora, train

Build = Callable[..., PreTrainedModel]
STEPS, BATCH, WINDOW = 6, 4, 12


class Windows(Dataset[dict[str, Tensor]]):
    """Counting modulo a few tokens: easy to learn."""

    def __init__(self, count: int = STEPS * BATCH) -> None:
        starts = torch.arange(count)[:, None]
        self.windows = (starts + torch.arange(WINDOW)) % 7 + 1

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, n: int) -> dict[str, Tensor]:
        return {"input_ids": self.windows[n]}


class Kill(TrainerCallback):
    """Ends the process' work after a step, as a kill would."""

    def __init__(self, after: int) -> None:
        self.after = after

    def on_step_end(self, _: Any, state: Any, *__: Any, **___: Any) -> None:
        if state.global_step == self.after:
            raise KeyboardInterrupt


def job(out: Path, **changes: Any) -> TrainJob:
    given: dict[str, Any] = {
        "name": "stage", "steps": STEPS, "batch": BATCH, "micro_batch": 2, "seed": 0, "out": out, "progress": False,
    }  # fmt: skip
    return TrainJob(**(given | changes))


def run(
    model: nn.Module, job: TrainJob, *callbacks: TrainerCallback, dataset: Windows | None = None, lr: float = 3e-3
) -> TrainResult:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)
    return train(
        model,
        dataset or Windows(job.steps * job.batch),
        optimizer=optimizer,
        scheduler=cosine_to(optimizer, steps=job.steps),
        job=job,
        callbacks=callbacks,
    )


def learner(pico_llama: Build, kind: str) -> nn.Module:
    return attach_lora(pico_llama(), LoraSettings(rank=2), seed=1) if kind == "adapters" else pico_llama()


def metrics(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def same_weights(one: nn.Module, other: nn.Module) -> bool:
    theirs = other.state_dict()
    return all(torch.equal(value, theirs[name]) for name, value in one.state_dict().items())


@pytest.mark.parametrize("kind", ["adapters", "all"])
def test_a_short_run_lowers_the_loss(pico_llama: Build, tmp_path: Path, kind: str) -> None:
    model = learner(pico_llama, kind).eval()
    model.config.use_cache = True
    result = run(model, job(tmp_path, steps=12), lr=1e-2)
    assert (result.steps, result.tokens) == (12, 12 * BATCH * WINDOW)
    lines = metrics(tmp_path)
    assert [line["step"] for line in lines] == list(range(1, 13))
    assert {line["stage"] for line in lines} == {"stage"}
    assert lines[-1]["tokens"] == result.tokens
    assert lines[-1]["loss"] < lines[0]["loss"] - 0.2
    assert result.loss == pytest.approx(sum(line["loss"] for line in lines) / 12, rel=1e-3)
    # it is handed back in the state it was in, and nothing but the record stays
    assert not model.training
    assert model.config.use_cache
    assert all(parameter.grad is None for parameter in model.parameters())
    assert sorted(item.name for item in tmp_path.iterdir()) == ["metrics.jsonl", "tensorboard"]


def test_frozen_weights_stay_and_adapters_merge(pico_llama: Build, tmp_path: Path) -> None:
    model = attach_lora(pico_llama(), LoraSettings(rank=2), seed=1)
    frozen = {name: p.detach().clone() for name, p in model.named_parameters() if not p.requires_grad}
    run(model, job(tmp_path, steps=2))
    now = dict(model.named_parameters())
    assert all(torch.equal(now[name], before) for name, before in frozen.items())
    tokens = Windows().windows[:3]
    with torch.no_grad():
        adapted = model(input_ids=tokens).logits
        plain = merge_lora(model)
        torch.testing.assert_close(plain(input_ids=tokens).logits, adapted)
    assert all(parameter.requires_grad for parameter in plain.parameters())


@pytest.mark.parametrize("kind", ["adapters", "all"])
@pytest.mark.parametrize("killed_after", [3, 5])
def test_killed_and_resumed_is_never_killed(pico_llama: Build, tmp_path: Path, kind: str, killed_after: int) -> None:
    whole, parts = learner(pico_llama, kind), learner(pico_llama, kind)
    run(whole, job(tmp_path / "whole", checkpoint_every=2))
    with pytest.raises(KeyboardInterrupt):
        run(parts, job(tmp_path / "parts", checkpoint_every=2), Kill(killed_after))
    folder = tmp_path / "parts" / "checkpoints" / "stage"
    assert [item.name for item in folder.iterdir()] == [f"checkpoint-{killed_after - 1}"]  # one is enough
    again = learner(pico_llama, kind)
    torch.manual_seed(1234)
    result = run(again, job(tmp_path / "parts", checkpoint_every=2, resume=True))
    assert result.steps == STEPS
    assert same_weights(again, whole)
    steps = [(line["step"], line["loss"], line["lr"]) for line in metrics(tmp_path / "parts")]
    assert steps == [(line["step"], line["loss"], line["lr"]) for line in metrics(tmp_path / "whole")]


def test_killed_before_the_first_checkpoint(pico_llama: Build, tmp_path: Path) -> None:
    whole = pico_llama()
    run(whole, job(tmp_path / "whole", checkpoint_every=4))
    with pytest.raises(KeyboardInterrupt):
        run(pico_llama(), job(tmp_path / "parts", checkpoint_every=4), Kill(2))
    again = pico_llama()
    run(again, job(tmp_path / "parts", checkpoint_every=4, resume=True))
    assert same_weights(again, whole)
    assert [line["step"] for line in metrics(tmp_path / "parts")] == list(range(1, STEPS + 1))


def test_a_checkpoint_that_was_cut_short_is_passed_over(pico_llama: Build, tmp_path: Path) -> None:
    whole = pico_llama()
    run(whole, job(tmp_path / "whole", checkpoint_every=2))
    with pytest.raises(KeyboardInterrupt):
        run(pico_llama(), job(tmp_path / "parts", checkpoint_every=2), Kill(5))
    broken = tmp_path / "parts" / "checkpoints" / "stage" / "checkpoint-5"
    broken.mkdir()
    (broken / "trainer_state.json").write_text('{"global_st')
    again = pico_llama()
    run(again, job(tmp_path / "parts", checkpoint_every=2, resume=True))
    assert same_weights(again, whole)


def test_without_resume_old_checkpoints_do_not_count(pico_llama: Build, tmp_path: Path) -> None:
    whole = pico_llama()
    run(whole, job(tmp_path / "whole"))
    with pytest.raises(KeyboardInterrupt):
        run(pico_llama(seed=5), job(tmp_path / "parts", checkpoint_every=2), Kill(5))
    fresh = pico_llama()
    run(fresh, job(tmp_path / "parts"))
    assert same_weights(fresh, whole)


def test_a_checkpoint_of_another_model_is_refused(pico_llama: Build, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(learner(pico_llama, "adapters"), job(tmp_path, checkpoint_every=2), Kill(3))
    with pytest.raises(OutputError, match=r"checkpoint-2: the checkpoint does not fit this run.*start in a new folder"):
        run(pico_llama(), job(tmp_path, checkpoint_every=2, resume=True))


def test_a_result_that_was_not_saved_takes_few_steps_to_get_again(pico_llama: Build, tmp_path: Path) -> None:
    model = pico_llama()
    run(model, job(tmp_path, checkpoint_every=3))
    assert [item.name for item in (tmp_path / "checkpoints" / "stage").iterdir()] == ["checkpoint-3"]
    again = pico_llama(seed=9)
    result = run(again, job(tmp_path, checkpoint_every=3, resume=True))
    assert result.steps == STEPS
    assert result.tokens == STEPS * BATCH * WINDOW
    assert same_weights(again, model)
    discard_checkpoints(tmp_path, "stage")
    assert not (tmp_path / "checkpoints").exists()


@pytest.mark.parametrize(
    "error", [OSError(28, "No space left on device"), RuntimeError("PytorchStreamWriter failed writing file data/3")]
)
def test_a_disk_that_is_full_at_a_checkpoint(
    pico_llama: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OutputError, match=r"checkpoints.stage: the disk is full.*--resume"):
        run(pico_llama(), job(tmp_path, checkpoint_every=2))


def test_frozen_weights_go_into_checkpoints_on_request(pico_llama: Build, tmp_path: Path) -> None:
    def halved() -> nn.Module:
        model = learner(pico_llama, "adapters")
        with torch.no_grad():
            model.get_parameter("base_model.model.model.norm.weight").mul_(0.5)
        return model

    options = {"checkpoint_every": 2, "checkpoint_frozen": True}
    with pytest.raises(KeyboardInterrupt):
        run(halved(), job(tmp_path, **options), Kill(3))
    again = learner(pico_llama, "adapters")
    run(again, job(tmp_path, resume=True, **options))
    assert torch.equal(again.get_parameter("base_model.model.model.norm.weight"), torch.full((72,), 0.5))


def test_micro_batches_give_the_gradient_of_the_whole_batch(pico_llama: Build, tmp_path: Path) -> None:
    models = []
    for micro_batch in (1, 4):
        models.append(pico_llama())
        run(models[-1], job(tmp_path / str(micro_batch), steps=2, micro_batch=micro_batch), lr=1e-4)
    for one, other in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=0)


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_a_number_that_is_not_finite_stops_the_run(pico_llama: Build, tmp_path: Path, what: str) -> None:
    class Break(TrainerCallback):
        def on_step_begin(self, _: Any, state: Any, __: Any, *, model: nn.Module, **___: Any) -> None:
            if state.global_step == 3:
                weight = model.get_parameter("model.layers.1.mlp.down_proj.weight")
                if what == "loss":
                    weight.data[0, 0] = float("nan")
                else:
                    weight.register_hook(lambda gradient: gradient * float("inf"))

    with pytest.raises(TrainingError, match=r"(loss|norm of the gradient) is (nan|inf) at step 4 of stage.*lower the"):
        run(pico_llama(), job(tmp_path, checkpoint_every=1), Break())
    assert [line["step"] for line in metrics(tmp_path)] == [1, 2, 3]
    assert [item.name for item in (tmp_path / "checkpoints" / "stage").iterdir()] == ["checkpoint-3"]


def test_mistakes(pico_llama: Build, tmp_path: Path) -> None:
    model = pico_llama()
    with pytest.raises(SettingsError, match="0 optimizer steps; expected at least 1"):
        run(model, job(tmp_path, steps=0))
    with pytest.raises(SettingsError, match="batch = 4 is not divisible by micro_batch = 3"):
        run(model, job(tmp_path, micro_batch=3))
    with pytest.raises(DataError, match="stage: 23 windows for 6 steps of 4; expected at least 24"):
        run(model, job(tmp_path), dataset=Windows(23))
    assert list(tmp_path.iterdir()) == []
