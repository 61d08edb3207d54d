from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from lorashear.config import CompressSettings
from lorashear.data.packing import TokenData, tokenize
from lorashear.data.sources import read_sources
from lorashear.evaluation.perplexity import source_losses
from lorashear.recovery import recover
from lorashear.recovery.adapt import AdaptResult, adapt_model, adapt_steps
from lorashear.recovery.recover import deviation_losses

Build = Callable[..., PreTrainedModel]
STEPS, OWN, TRIAL = 60, 18, 12


def settings(**adapts: Any) -> CompressSettings:
    return CompressSettings.from_mapping(
        {
            "batch": 4, "micro_batch": 2, "data": {"window": 16, "eval_windows": 8}, "lora": {"rank": 4},
            "adapt": {"learning_rate": 1e-2} | adapts,
        }
    )  # fmt: skip


@pytest.fixture(scope="module")
def data(pico_data: Path, pico_tokenizer: PreTrainedTokenizerFast) -> TokenData:
    given = settings().data
    return tokenize(read_sources(pico_data, given), pico_tokenizer, given)


def adapted(model: PreTrainedModel, data: TokenData, out: Path, **options: Any) -> AdaptResult:
    given: dict[str, Any] = {
        "target": deviation_losses(model, data), "settings": settings(), "steps": STEPS, "progress": False,
    }  # fmt: skip
    return adapt_model(model, data, out=out, **(given | options))


def plain_weights(model: nn.Module) -> dict[str, torch.Tensor]:
    assert not [name for name, _ in model.named_modules() if "lora" in name]
    return model.state_dict()


def same_weights(one: nn.Module, other: nn.Module) -> bool:
    theirs = plain_weights(other)
    return all(torch.equal(value, theirs[name]) for name, value in plain_weights(one).items())


def test_new_text_is_learned_to_the_end(pico_llama: Build, data: TokenData, tmp_path: Path) -> None:
    model = pico_llama()
    before = source_losses(model, data)
    result = adapted(model, data, tmp_path)
    assert result.kept
    assert result.gain is not None
    assert result.gain > 0.1
    assert result.tokens == OWN * 4 * 16
    after = source_losses(result.model, data)
    assert all(after[name] < before[name] - result.gain / 2 for name in before)
    assert plain_weights(result.model).keys() == pico_llama().state_dict().keys()


def test_known_text_ends_with_the_trial_and_leaves_no_trace(pico_llama: Build, data: TokenData, tmp_path: Path) -> None:
    result = adapted(pico_llama(), data, tmp_path, settings=settings(learning_rate=1e-7))
    assert not result.kept
    assert result.gain == pytest.approx(0.0, abs=0.01)
    assert result.tokens == TRIAL * 4 * 16  # the trial is paid for
    assert same_weights(result.model, pico_llama())


def test_a_share_that_is_set_is_not_tried(pico_llama: Build, data: TokenData, tmp_path: Path) -> None:
    result = adapted(pico_llama(), data, tmp_path, settings=settings(learning_rate=1e-7, share=0.25))
    assert result.kept
    assert result.gain is None
    assert result.tokens == STEPS // 4 * 4 * 16


@pytest.mark.parametrize(("share", "steps"), [(0.0, STEPS), (None, 30)])  # 9 steps would be fewer than the trial
def test_nothing_is_learned_where_nothing_can_be(
    pico_llama: Build, data: TokenData, tmp_path: Path, share: float | None, steps: int
) -> None:
    result = adapted(pico_llama(), data, tmp_path, settings=settings(share=share), steps=steps)
    assert (result.tokens, result.gain, result.kept) == (0, None, False)
    assert same_weights(result.model, pico_llama())
    assert not list(tmp_path.iterdir())


def test_the_share_is_open_or_set() -> None:
    assert adapt_steps(settings().adapt, 400) == 120
    assert adapt_steps(settings(share=0.1).adapt, 400) == 40


def test_stopped_after_the_trial_and_resumed_is_never_stopped(
    pico_llama: Build, data: TokenData, tmp_path: Path, kill_at: Any
) -> None:
    whole = adapted(pico_llama(), data, tmp_path / "whole")

    with kill_at(recover, 16), pytest.raises(KeyboardInterrupt):
        adapted(pico_llama(), data, tmp_path / "parts", checkpoint_every=5)
    done = adapted(pico_llama(), data, tmp_path / "parts", checkpoint_every=5, resume=True)
    assert done.gain == whole.gain
    assert done.kept
    assert same_weights(done.model, whole.model)


def test_a_source_that_does_not_count_has_no_say_in_the_trial(
    pico_llama: Build, data: TokenData, tmp_path: Path
) -> None:
    model = pico_llama()
    target = deviation_losses(model, data)
    first, *others = data.sources
    without = TokenData((first, *(replace(each, weight=0.0) for each in others)), data.separator_id, data.window)
    result = adapted(model, without, tmp_path, target=target | {each.name: -1000.0 for each in others})
    assert result.gain is not None
    assert result.gain > 0
    assert result.kept
