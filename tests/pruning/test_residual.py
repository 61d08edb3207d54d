"""How much of the residual stream goes is measured: none of a full one, what is empty of an empty one."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

import lorashear as ls
from lorashear.config import CompressSettings
from lorashear.data.packing import TokenData, TokenSource
from lorashear.errors import PlanError
from lorashear.graph.basis import basis_of
from lorashear.pruning.prune import prune_model
from lorashear.pruning.residual import choose_residual_cut, residual_widths

Pico = Callable[..., PreTrainedModel]
RESIDUAL = "model:residual"


def windows(count: int = 8) -> torch.Tensor:
    return torch.randint(0, 97, (count, 12), generator=torch.Generator().manual_seed(1))


def empty_stream(build: Pico, used: int) -> PreTrainedModel:
    """Writes into few directions of the residual stream only, none of them along a channel."""
    model = build(seed=3).eval()
    basis = basis_of(graph := ls.discover(model, realisable=False), graph[RESIDUAL])
    space = torch.linalg.qr(torch.randn(72, used, generator=torch.Generator().manual_seed(0)))[0]
    named = dict(model.named_parameters())
    with torch.no_grad():
        for place in basis.places:
            if any(place.parameter == f"{path}.weight" for path in basis.writers):
                weight = named[place.parameter]
                weight.copy_((weight.movedim(place.dim, -1) @ space @ space.T).movedim(-1, place.dim))
    return model


def settings(ratio: float, **prune: Any) -> CompressSettings:
    return CompressSettings.from_mapping(
        {
            "batch": 4, "micro_batch": 2, "data": {"calibration_windows": 8},
            "prune": {"ratio": ratio, "periods": 2, "warmup": 0.25, "train": "all", **prune},
        }
    )  # fmt: skip


def data() -> TokenData:
    return TokenData((TokenSource("a", "text", windows(20), windows(2)),), separator_id=0, window=12)


def test_an_empty_part_of_the_stream_goes_first(pico_llama: Pico, tmp_path: Path) -> None:
    """And the model is still the same function once it is gone: nothing but emptiness was cut."""
    model = empty_stream(pico_llama, used=46)
    input_ids = windows(2)
    with torch.no_grad():
        before = model(input_ids=input_ids).logits
    graph = ls.discover(model)
    ratio = 1 - graph.kept_parameters({RESIDUAL: range(48, 72)}) / graph.num_parameters
    chosen = settings(ratio, kinds=("residual",))
    result = prune_model(model, data(), settings=chosen, steps=6, out=tmp_path, progress=False)
    assert result.model.config.hidden_size == 48
    assert set(result.plan.removed) == {RESIDUAL}
    assert result.tokens == 0  # nothing was left to walk
    assert result.net == pytest.approx(ratio)
    with torch.no_grad():
        assert torch.allclose(result.model(input_ids=input_ids).logits, before, atol=1e-4)


def test_what_the_stream_does_not_give_is_walked(pico_llama: Pico, tmp_path: Path) -> None:
    model = empty_stream(pico_llama, used=60)
    result = prune_model(model, data(), settings=settings(0.4), steps=6, out=tmp_path, progress=False)
    assert RESIDUAL in result.plan.removed
    assert len(result.plan.removed) > 1
    assert result.tokens == 6 * 4 * 12
    assert abs(result.net - 0.4) < 0.02


def test_the_model_is_left_as_it_was_and_losses_are_those_of_the_cut_model(pico_llama: Pico) -> None:
    model = pico_llama(tied=True).eval()
    with torch.no_grad():
        model.model.norm.weight.uniform_(0.5, 1.5)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    graph = ls.discover(model)

    def plan_of(fixed: Mapping[str, Sequence[int]]) -> ls.Plan:
        if len(fixed.get(RESIDUAL, ())) > 16:
            raise PlanError("too narrow")
        return ls.Plan(removed={**fixed, "model.layers.0.mlp:ffn-channels": (3, 5)})

    found = choose_residual_cut(model, graph, windows(), plan_of, batch=3)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert found is None or found.kept < 72


def test_kinds_without_the_residual_leave_it(pico_llama: Pico, tmp_path: Path) -> None:
    model = empty_stream(pico_llama, used=46)
    chosen = settings(0.2, kinds=("heads", "ffn-channels"))
    result = prune_model(model, data(), settings=chosen, steps=6, out=tmp_path, progress=False)
    assert result.model.config.hidden_size == 72


def test_slicegpt_takes_it_all_from_there(pico_llama: Pico, tmp_path: Path) -> None:
    chosen = settings(0.35, method="slicegpt")
    result = prune_model(pico_llama(), data(), settings=chosen, steps=6, out=tmp_path, progress=False)
    assert set(result.plan.removed) == {RESIDUAL}
    assert result.tokens == 0


def test_slicegpt_says_where_it_cannot(pico_llama: Pico, tmp_path: Path) -> None:
    chosen = settings(0.9, method="slicegpt")
    with pytest.raises(PlanError, match="cannot be reached"):
        prune_model(pico_llama(), data(), settings=chosen, steps=6, out=tmp_path, progress=False)


@pytest.mark.parametrize(("ratio", "missed"), [(0.11, False), (0.22, False), (0.2, True)])
def test_the_stream_alone_comes_as_near_as_half_a_step(
    pico_llama: Pico, ratio: float, missed: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = pico_llama()
    graph = ls.discover(model)
    lost = [1 - graph.kept_parameters(each) / graph.num_parameters for each in residual_widths(graph, 4)]
    chosen = settings(ratio, method="slicegpt", round_to=4)
    result = prune_model(model, data(), settings=chosen, steps=6, out=tmp_path, progress=False)
    assert result.net == pytest.approx(min(lost, key=lambda each: abs(each - ratio)))
    assert (abs(result.net - ratio) > 0.01) is missed
    assert ("gone instead of" in caplog.text) is missed


def test_less_than_half_a_step_of_the_stream_is_refused(pico_llama: Pico, tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="less than half of the first step"):
        prune_model(
            pico_llama(), data(), settings=settings(0.01, method="slicegpt"), steps=6, out=tmp_path, progress=False
        )
