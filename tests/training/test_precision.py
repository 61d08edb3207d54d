from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from lorashear.training import full_precision_weights, precision, resolve_dtype

Build = Callable[..., PreTrainedModel]
SAMPLE = torch.arange(24).view(2, 12)


def test_what_is_set_is_not_measured(pico_llama: Build) -> None:
    assert resolve_dtype("float32", pico_llama(), SAMPLE) is None
    assert resolve_dtype("bfloat16", pico_llama(), SAMPLE) == torch.bfloat16


@pytest.mark.parametrize(("plain", "half", "chosen"), [(1.0, 0.5, torch.bfloat16), (1.0, 0.95, None), (1.0, 3.0, None)])
def test_auto_takes_bfloat16_where_it_pays(
    pico_llama: Build, monkeypatch: pytest.MonkeyPatch, plain: float, half: float, chosen: torch.dtype | None
) -> None:
    monkeypatch.setattr(precision, "_seconds", lambda _, __, dtype: plain if dtype is None else half)
    assert resolve_dtype("auto", pico_llama(), SAMPLE) == chosen


def test_weights_held_in_bfloat16_train_in_it(pico_llama: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "_seconds", lambda _, __, dtype: 1.0 if dtype is None else 3.0)
    assert resolve_dtype("auto", pico_llama().bfloat16(), SAMPLE) == torch.bfloat16


def test_measuring_changes_nothing(pico_llama: Build) -> None:
    model, untouched = pico_llama(), pico_llama()
    assert resolve_dtype("auto", model, SAMPLE) in (None, torch.bfloat16)
    assert all(torch.equal(one, other) for one, other in zip(model.parameters(), untouched.parameters(), strict=True))
    assert all(parameter.grad is None for parameter in model.parameters())


def test_trainable_weights_are_float32_for_a_while(pico_llama: Build) -> None:
    def dtypes(model: Any) -> set[torch.dtype]:
        return {parameter.dtype for parameter in model.parameters()}

    model = pico_llama().bfloat16()
    model.lm_head.requires_grad_(False)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    same = model.model.norm.weight
    with full_precision_weights(model):
        assert dtypes(model.model) == {torch.float32}
        assert model.lm_head.weight.dtype == torch.bfloat16
    assert dtypes(model) == {torch.bfloat16}
    with pytest.raises(KeyboardInterrupt), full_precision_weights(model):
        raise KeyboardInterrupt
    assert dtypes(model) == {torch.bfloat16}
    assert model.model.norm.weight is same
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
