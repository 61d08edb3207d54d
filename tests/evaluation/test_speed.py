from __future__ import annotations

from collections.abc import Callable
from itertools import count
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from lorashear.evaluation import speed
from lorashear.evaluation.speed import Speed, tokens_per_second

Build = Callable[..., PreTrainedModel]


def test_arithmetic(pico_llama: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock of our own: reading takes 2 s (5 s once), every written token 0.5 s."""
    runs = count()

    def seconds(_: Any, input_ids: torch.Tensor, new_tokens: int) -> float:
        assert input_ids.shape == (1, 10)
        return (5.0 if next(runs) == 1 else 2.0) + 0.5 * (new_tokens - 1)

    monkeypatch.setattr(speed, "_seconds", seconds)
    assert tokens_per_second(pico_llama(), prompt=10, new_tokens=4) == Speed(prefill=5.0, decode=2.0)
    assert next(runs) == 11  # one to warm up, five for each


def test_noise_does_not_make_writing_take_no_time(pico_llama: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speed, "_seconds", lambda _, __, new_tokens: 3.0 if new_tokens == 1 else 2.0)
    assert tokens_per_second(pico_llama(), prompt=9, new_tokens=4) == Speed(prefill=3.0, decode=2.0)


def test_a_real_model_writes_all_tokens(pico_llama: Build) -> None:
    model = pico_llama().eval()
    passes: list[dict[str, Any]] = []
    model.register_forward_pre_hook(lambda *given: passes.append(given[2]), with_kwargs=True)
    tokens_per_second(model, prompt=12, new_tokens=0, repeats=1)
    with torch.no_grad():
        first = int(model(passes[0]["input_ids"]).logits[0, -1].argmax())
    model.generation_config.eos_token_id = first  # left to itself it would stop at once
    model.train()
    passes.clear()
    found = tokens_per_second(model, prompt=12, new_tokens=5, repeats=1)
    assert found.prefill > 0
    assert found.decode > 0
    assert found.to_dict().keys() == {"prefill", "decode"}
    assert len(passes) == 2 + 1 + 6
    assert passes[-1]["input_ids"].shape == (1, 1)  # through the cache
    assert model.training
