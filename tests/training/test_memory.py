from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from transformers import PreTrainedModel

from lorashear.devices import available_bytes
from lorashear.training.memory import activation_bytes, resolve_micro_batch, resolve_train, state_bytes

Build = Callable[..., PreTrainedModel]


def test_a_setting_is_taken_as_it_is(pico_llama: Build) -> None:
    model = pico_llama()
    assert resolve_train("adapters", model, 2**40).train == "adapters"
    assert resolve_train("all", model, 0).train == "all"
    assert resolve_micro_batch(3, model, 0, batch=16, window=8) == 3


def test_auto_trains_all_weights_where_their_state_fits(pico_llama: Build) -> None:
    model = pico_llama()
    # float32 weights are there already: gradient and two moments are missing, and one window's activations
    needed = 12 * model.num_parameters() + 8 * activation_bytes(model)
    assert resolve_train("auto", model, int(needed / 0.7) + 100, window=8).train == "all"
    scarce = resolve_train("auto", model, int(needed / 0.7) - 100, window=8)
    assert scarce.train == "adapters"
    assert "training adapters: all weights would take about" in scarce.explanation


def test_micro_batches_divide_the_batch_and_fit(pico_llama: Build) -> None:
    model = pico_llama()
    window = 8 * activation_bytes(model)
    sizes = [resolve_micro_batch(None, model, 2 * window * fit, batch=12, window=8) for fit in (0, 1, 2, 5, 11, 12, 99)]
    assert sizes == [1, 1, 2, 4, 6, 12, 12]


@pytest.mark.parametrize("batch", [1, 7])
def test_the_estimate_is_no_less_than_what_is_kept(pico_llama: Build, batch: int) -> None:
    model, kept = pico_llama(), 0

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        nonlocal kept
        if not isinstance(tensor, torch.nn.Parameter) and tensor.data_ptr() not in seen:
            seen.add(tensor.data_ptr())
            kept += tensor.numel() * tensor.element_size()
        return tensor

    seen = {parameter.data_ptr() for parameter in model.parameters()}
    input_ids = torch.randint(97, (batch, 32))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = model(input_ids=input_ids, labels=input_ids).loss
    loss.backward()
    assert 0.5 < kept / (batch * 32 * activation_bytes(model)) < 1.5


def test_there_is_memory() -> None:
    assert available_bytes(torch.device("cpu")) > 2**20


def test_what_training_takes_beside_the_weights(pico_llama: Build) -> None:
    model = pico_llama()
    count = model.num_parameters()
    assert state_bytes(model, train="all", autocast=False) == 12 * count
    assert state_bytes(model, train="adapters", autocast=False) == 0
    assert state_bytes(model, train="adapters", autocast=True) == 2 * count
    assert state_bytes(model.bfloat16(), train="adapters", autocast=True) == 0
