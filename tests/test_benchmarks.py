"""Scripts under `benchmarks/`: what they compare is equal, and their tables show what was measured."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
from transformers import PreTrainedModel

import lorashear as ls


def script(name: str) -> ModuleType:
    path = Path(__file__).parent.parent / "benchmarks" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"benchmark_{name}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, spec.name, module)
        spec.loader.exec_module(module)
    return module


def test_cached_and_naive_probing_agree(pico_llama: Callable[..., PreTrainedModel]) -> None:
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


def test_layers_are_evenly_spaced() -> None:
    layers = script("analysis")._layers
    assert layers(30, 4) == [0, 10, 19, 29]
    assert layers(6, None) == layers(6, 9) == [0, 1, 2, 3, 4, 5]
    assert layers(6, 1) == [0]


def test_the_quality_table_shows_a_source() -> None:
    def perplexity(macro: float, code: float) -> dict[str, object]:
        return {"macro": macro, "per_source": {"code": code, "wiki": 50.0}}

    whole = {"method": "whole", "before": perplexity(10.0, 5.0)}
    run = {
        "method": "one-shot", "ratio": 0.2, "seed": 0, "net": 0.2, "seconds": 3, "before": perplexity(14.0, 7.25),
        "after": perplexity(12.0, 6.5),
    }  # fmt: skip
    render = script("quality").render
    head, _, dense, line = render([whole, run], "code").splitlines()
    assert head.endswith("| code before | code after |")
    assert dense.endswith("| 5.00 | |")
    assert line.endswith("| 7.25 | 6.50 |")
    assert {row.count("|") for row in (head, dense, line)} == {13}
    assert "code" not in render([whole, run])
