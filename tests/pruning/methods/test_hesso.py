"""HESSO is a preset: the walk that its settings spell out, unless the user says otherwise."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

import lorashear as ls
from lorashear.config import CompressSettings, SaliencySettings
from lorashear.data.packing import TokenData, TokenSource
from lorashear.pruning import prune as stage
from lorashear.pruning.lhspg import LHSPG
from lorashear.pruning.methods import METHODS, with_preset
from lorashear.pruning.prune import PruneResult, prune_model

Pico = Callable[..., PreTrainedModel]
STEPS, WINDOW, BATCH = 8, 10, 4
EQUAL = dict.fromkeys(("magnitude", "mean_magnitude", "cosine", "taylor", "taylor2"), 0.2)
ONE_KIND = ("ffn-channels",)
SPELT_OUT = {"train": "all", "shrink": "slices", "memory": 0.0, "kinds": ONE_KIND}


def settings(saliency: dict[str, float] | None = None, **prune: Any) -> CompressSettings:
    given = {"ratio": 0.3, "periods": 3, "warmup": 0.25, **prune}
    return CompressSettings.from_mapping(
        {
            "batch": BATCH,
            "micro_batch": 2,
            "data": {"calibration_windows": 4},
            "saliency": saliency or {},
            "prune": given,
        }
    )


def run(model: PreTrainedModel, out: Path, chosen: CompressSettings) -> PruneResult:
    windows = torch.randint(0, 97, (24, WINDOW), generator=torch.Generator().manual_seed(7))
    data = TokenData((TokenSource("a", "text", windows[:20], windows[20:]),), separator_id=0, window=WINDOW)
    return prune_model(model, data, settings=chosen, steps=STEPS, out=out, progress=False)


def test_it_is_the_walk_that_the_preset_spells_out(
    pico_llama: Pico, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    graph = ls.discover(pico_llama())
    monkeypatch.setattr(
        stage, "discover", lambda _: graph
    )  # most of a run's time here; it knows nothing of the weights
    cosines: list[bool] = []
    original = LHSPG._begin

    def begin(optimizer: LHSPG, period: int) -> None:
        cosines.append(all(p.grad is not None for group in optimizer.param_groups for p in group["params"]))
        original(optimizer, period)

    monkeypatch.setattr(LHSPG, "_begin", begin)
    hesso = run(pico_llama(), tmp_path / "hesso", settings(method="hesso", kinds=ONE_KIND))
    assert cosines == [True] * 3  # scored anew each period, with gradients there for the cosine
    walk = run(pico_llama(), tmp_path / "walk", settings(EQUAL, method="lhspg", **SPELT_OUT))
    assert hesso.plan == walk.plan
    assert all(torch.equal(a, b) for a, b in zip(hesso.model.parameters(), walk.model.parameters(), strict=True))
    assert hesso.tokens == STEPS * BATCH * WINDOW
    assert hesso.net == pytest.approx(0.3, abs=0.02)
    one = run(pico_llama(), tmp_path / "other", settings(method="lhspg", **SPELT_OUT))
    assert one.plan != hesso.plan  # the mix of criteria decides


def test_a_preset_fills_in_what_is_at_its_default() -> None:
    found = with_preset(settings(method="hesso"))
    assert (found.prune.train, found.prune.shrink, found.prune.memory) == ("all", "slices", 0.0)
    assert found.saliency == SaliencySettings(**EQUAL)
    assert with_preset(found) == found
    chosen = settings({"taylor2": 2.0}, method="hesso", train="adapters", memory=0.7)
    found = with_preset(chosen)
    assert (found.prune.train, found.prune.shrink, found.prune.memory) == ("adapters", "slices", 0.7)
    assert found.saliency == chosen.saliency
    plain = settings(method="lhspg")
    assert with_preset(plain) == plain


def test_structures_are_compared_whatever_they_save(pico_llama: Pico) -> None:
    """The planner divides by the parameters that a structure saves: what it sees then is the mix itself."""
    graph = ls.discover(pico_llama())
    scores = {group.name: torch.rand(group.size) for group in graph.gated}
    adjust = METHODS["hesso"].adjust
    assert adjust is not None
    for name, found in adjust(graph, scores).items():
        saved = graph.num_parameters - graph.kept_parameters({name: (1,)})
        torch.testing.assert_close(found / saved, scores[name])
