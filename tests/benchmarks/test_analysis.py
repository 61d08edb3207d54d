from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

import lorashear as ls

Script = Callable[[str], Any]


def test_cached_and_naive_probing_agree(script: Script, pico_llama: Callable[..., PreTrainedModel]) -> None:
    model = pico_llama(layers=3).eval()
    windows = torch.randint(97, (2, 24), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        costs = script("analysis").compare(model, ls.discover(model), windows, [0, 2])
    assert costs.equal
    assert costs.probes == 2 * 3  # heads, query slots and FFN channels of two layers
    assert costs.windows == 2
    assert 0 < costs.layers_share < 1
    assert costs.bound == pytest.approx(costs.layers_share * (1 + 1 / 3) / 2 + 1 - costs.layers_share)
    assert 0 < costs.ratio == costs.cached / costs.naive
    assert len(costs.deviations) == costs.probes
    assert any(costs.deviations)


def test_layers_are_evenly_spaced(script: Script) -> None:
    layers = script("analysis")._layers
    assert layers(30, 4) == [0, 10, 19, 29]
    assert layers(6, None) == layers(6, 9) == [0, 1, 2, 3, 4, 5]
    assert layers(6, 1) == [0]
