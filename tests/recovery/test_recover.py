from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerFast, TrainerCallback

from lorashear.config import CompressSettings, RecoverSettings
from lorashear.data.packing import TokenData, tokenize
from lorashear.data.sources import read_sources
from lorashear.errors import SettingsError
from lorashear.evaluation.perplexity import source_losses
from lorashear.recovery import recover
from lorashear.recovery.recover import RecoverResult, deviation_losses, recover_model, round_starts, stage_weights

Build = Callable[..., PreTrainedModel]
STEPS = 16


def settings(**changes: Any) -> CompressSettings:
    values: dict[str, Any] = {
        "batch": 4, "micro_batch": 2, "data": {"window": 16, "eval_windows": 8}, "lora": {"rank": 4},
        "recover": {"train": "all", "learning_rate": 3e-3, "rounds": 2, "instruct_share": 0.25},
    }  # fmt: skip
    recover_changes = changes.pop("recover", {})
    return CompressSettings.from_mapping(values | changes | {"recover": values["recover"] | recover_changes})


@pytest.fixture(scope="module")
def data(pico_data: Path, pico_tokenizer: PreTrainedTokenizerFast) -> TokenData:
    given = settings().data
    return tokenize(read_sources(pico_data, given), pico_tokenizer, given)


def recovered(model: PreTrainedModel, data: TokenData, out: Path, **options: Any) -> RecoverResult:
    given: dict[str, Any] = {
        "target": {"foxes": 2.0, "heads": 3.0, "asked": 2.5}, "settings": settings(), "steps": STEPS, "progress": False,
    }  # fmt: skip
    return recover_model(model, data, out=out, **(given | options))


def same_weights(one: nn.Module, other: nn.Module) -> bool:
    theirs = other.state_dict()
    return all(torch.equal(value, theirs[name]) for name, value in one.state_dict().items())


@pytest.mark.parametrize("train", ["all", "adapters"])
def test_both_stages_from_end_to_end(pico_llama: Build, data: TokenData, tmp_path: Path, train: str) -> None:
    model = pico_llama()
    before = source_losses(model, data)
    result = recovered(model, data, tmp_path, settings=settings(recover={"train": train, "learning_rate": 1e-2}))
    assert result.tokens == STEPS * 4 * 16
    after = source_losses(result.model, data)
    assert all(after[name] < before[name] - 0.1 for name in before)
    assert not [name for name, _ in result.model.named_modules() if "lora" in name]
    assert [(each.stage, each.first_step) for each in result.rounds] == [
        ("pretraining", 0), ("pretraining", 6), ("instruction", 12), ("instruction", 14),
    ]  # fmt: skip
    first, *_, last = result.rounds
    measured = deviation_losses(pico_llama(), data)
    assert first.deviation == {
        name: measured[name] - {"foxes": 2.0, "heads": 3.0, "asked": 2.5}[name] for name in measured
    }
    assert sum(first.weights.values()) == pytest.approx(1.0)
    assert first.weights["foxes"] > first.weights["heads"] > 0.0  # foxes are further behind
    assert last.weights["asked"] > 0.7
    assert json.loads(json.dumps(result.log()))[0]["weights"] == first.weights
    assert sorted(item.name for item in tmp_path.iterdir()) == ["metrics.jsonl", "tensorboard"]


def test_the_samples_follow_the_rounds(
    pico_llama: Build, data: TokenData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mixtures = []

    class Watched(recover.MixtureDataset):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            mixtures.append(self)

    monkeypatch.setattr(recover, "MixtureDataset", Watched)
    result = recovered(pico_llama(), data, tmp_path, settings=settings(recover={"floor": 0.0}))
    (mixture,) = mixtures
    # a round that is measured after s steps reaches the windows of step s + 1, since those of step s are fetched
    assert [change.from_sample for change in mixture.history] == [0, 7 * 4, 13 * 4, 15 * 4]
    assert [change.weights for change in mixture.history] == [each.weights for each in result.rounds]
    assert {mixture.source_of(n) for n in range(13 * 4)} <= {"foxes", "heads"}
    assert {mixture.source_of(n) for n in range(13 * 4, 64)} == {"asked"}


def test_the_same_seed_gives_the_same_model(pico_llama: Build, data: TokenData, tmp_path: Path) -> None:
    one = recovered(pico_llama(), data, tmp_path / "1", steps=4).model
    other = recovered(pico_llama(), data, tmp_path / "2", steps=4).model
    third = recovered(pico_llama(), data, tmp_path / "3", steps=4, settings=settings(seed=1)).model
    assert same_weights(one, other)
    assert not same_weights(one, third)


def kill(monkeypatch: pytest.MonkeyPatch, after: int) -> None:
    """The next training run ends after a step, as by a kill."""

    class Kill(TrainerCallback):
        def on_step_end(self, _: Any, state: Any, *__: Any, **___: Any) -> None:
            if state.global_step == after:
                raise KeyboardInterrupt

    original = recover.train

    def train(*args: Any, callbacks: list[TrainerCallback], **kwargs: Any) -> Any:
        return original(*args, callbacks=[*callbacks, Kill()], **kwargs)

    monkeypatch.setattr(recover, "train", train)


@pytest.mark.parametrize(("train", "killed_after"), [("all", 8), ("adapters", 13)])
def test_killed_and_resumed_is_never_killed(
    pico_llama: Build, data: TokenData, tmp_path: Path, train: str, killed_after: int
) -> None:
    options = {"settings": settings(recover={"train": train}), "checkpoint_every": 2}
    whole = recovered(pico_llama(), data, tmp_path / "whole", **options)
    with pytest.MonkeyPatch.context() as patch:
        kill(patch, killed_after)
        with pytest.raises(KeyboardInterrupt):
            recovered(pico_llama(), data, tmp_path / "parts", **options)
    again = recovered(pico_llama(), data, tmp_path / "parts", resume=True, **options)
    assert same_weights(again.model, whole.model)
    assert again.log() == whole.log()
    assert again.tokens == whole.tokens


IMPATIENT = {"patience": 1, "rounds": 6, "learning_rate": 1e-9}  # nothing is learnt, so no round brings anything


def test_a_stage_that_brings_nothing_ends_early(pico_llama: Build, data: TokenData, tmp_path: Path) -> None:
    result = recovered(pico_llama(), data, tmp_path, settings=settings(recover=IMPATIENT))
    # 12 and 4 steps; each stage's second round is found to be in vain, and the second stage starts at once
    assert [(each.stage, each.first_step) for each in result.rounds] == [("pretraining", 0), ("instruction", 2)]
    assert result.tokens == 3 * 4 * 16
    patient = settings(recover=IMPATIENT | {"patience": 3})
    result = recovered(pico_llama(), data, tmp_path / "3", settings=patient)
    assert [(each.stage, each.first_step) for each in result.rounds] == [
        ("pretraining", 0), ("pretraining", 2), ("pretraining", 4),
        ("instruction", 6), ("instruction", 7), ("instruction", 8),
    ]  # fmt: skip
    assert result.tokens == 9 * 4 * 16


@pytest.mark.parametrize("killed_after", [5, 8])
def test_patience_survives_a_kill(pico_llama: Build, data: TokenData, tmp_path: Path, killed_after: int) -> None:
    options = {"settings": settings(recover=IMPATIENT | {"patience": 3}), "checkpoint_every": 2}
    whole = recovered(pico_llama(), data, tmp_path / "whole", **options)
    with pytest.MonkeyPatch.context() as patch:
        kill(patch, killed_after)
        with pytest.raises(KeyboardInterrupt):
            recovered(pico_llama(), data, tmp_path / "parts", **options)
    again = recovered(pico_llama(), data, tmp_path / "parts", resume=True, **options)
    assert again.log() == whole.log()
    assert again.tokens == whole.tokens
    assert same_weights(again.model, whole.model)


def test_bfloat16_weights_stay_bfloat16(pico_llama: Build, data: TokenData, tmp_path: Path) -> None:
    result = recovered(pico_llama().bfloat16(), data, tmp_path, steps=2)
    assert {parameter.dtype for parameter in result.model.parameters()} == {torch.bfloat16}


def test_no_step_at_all(pico_llama: Build, data: TokenData, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="no optimizer step is left for it; give more tokens"):
        recovered(pico_llama(), data, tmp_path, steps=0)


def starts(data: TokenData, steps: int, **changes: Any) -> list[tuple[str, int]]:
    return [(start.stage, start.step) for start in round_starts(data, RecoverSettings(**changes), steps)]


def test_where_rounds_begin(data: TokenData) -> None:
    general, instruct = "pretraining", "instruction"
    assert starts(data, 100) == [
        (general, 0), (general, 25), (general, 50), (instruct, 75), (instruct, 83), (instruct, 91),
    ]  # fmt: skip
    assert starts(data, 2, rounds=5) == [(general, 0), (general, 1)]
    assert starts(data, 2, rounds=5, instruct_share=0.5) == [(general, 0), (instruct, 1)]
    assert starts(data, 4, rounds=1, instruct_share=0.0) == [(general, 0)]
    assert starts(data, 4, rounds=1, instruct_share=1.0) == [(instruct, 0)]
    only_text = replace(data, sources=data.pretraining)
    assert starts(only_text, 10, rounds=1) == [(general, 0)]
    only_asked = replace(data, sources=data.instruct)
    assert starts(only_asked, 10, rounds=2) == [(instruct, 0), (instruct, 5)]


def test_a_stage_draws_its_own_and_the_floor_of_the_others(data: TokenData) -> None:
    weights = stage_weights(data, {"foxes": 1.0, "heads": 3.0, "asked": 50.0}, "pretraining", floor=0.1)
    assert sum(weights.values()) == pytest.approx(1.0)
    assert weights["asked"] < 0.1
    assert weights["heads"] - weights["foxes"] == pytest.approx(0.45, abs=0.05)
    foxes, *others = data.sources
    heavy = replace(data, sources=(replace(foxes, weight=6.0), *others))
    weighted = stage_weights(heavy, {"foxes": 1.0, "heads": 3.0, "asked": 50.0}, "pretraining", floor=0.0)
    assert weighted == pytest.approx({"foxes": 2 / 3, "heads": 1 / 3, "asked": 0.0})
    only_asked = replace(data, sources=data.instruct)
    assert stage_weights(only_asked, {"asked": 1.0}, "instruction", floor=0.3) == {"asked": 1.0}
