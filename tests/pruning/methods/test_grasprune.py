"""Gates under a hard budget: the mask against a slow reference, the budget at every step, scales folded exactly."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

import lorashear as ls
from lorashear.config import CompressSettings
from lorashear.data.packing import TokenData, TokenSource
from lorashear.graph.groups import Graph
from lorashear.pruning import prune as stage
from lorashear.pruning.methods import METHODS, grasprune
from lorashear.pruning.methods.grasprune import REACH, GatedModel
from lorashear.pruning.prune import PruneResult, budget_plan, prune_model

Pico = Callable[..., PreTrainedModel]
STEPS, WINDOW, BATCH, RATIO = 24, 10, 4, 0.3
FFN = "model.layers.0.mlp:ffn-channels"
SHAPES = ["uniform", "per-layer"]


@pytest.fixture(scope="module")
def graph(pico_llama: Pico) -> Graph:
    return ls.discover(pico_llama())


@pytest.fixture(autouse=True)
def _known_graph(graph: Graph, monkeypatch: pytest.MonkeyPatch) -> None:
    """Discovery is most of a run's time here; it knows nothing of the weights."""
    monkeypatch.setattr(stage, "discover", lambda _: graph)


def settings(**prune: Any) -> CompressSettings:
    return CompressSettings.from_mapping(
        {
            "batch": BATCH, "micro_batch": 2, "data": {"calibration_windows": 4},
            "prune": {"method": "grasprune", "ratio": RATIO, **prune},
        }
    )  # fmt: skip


def data(*, constant: bool = False) -> TokenData:
    generator = torch.Generator().manual_seed(7)
    windows = torch.randint(0, 97, (24, WINDOW), generator=generator)
    windows = torch.full_like(windows, 5) if constant else windows
    return TokenData((TokenSource("a", "text", windows[:20], windows[20:]),), separator_id=0, window=WINDOW)


def run(model: PreTrainedModel, out: Path, chosen: CompressSettings, **options: Any) -> PruneResult:
    given = {"data": data(), **options}
    return prune_model(model, settings=chosen, steps=STEPS, out=out, progress=False, **given)


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(input_ids=data().sources[0].valid).logits


def gated_model(model: PreTrainedModel, graph: Graph, shape: str, seed: int = 0) -> GatedModel:
    """With scores, and after it logits and scales, drawn at random."""
    generator = torch.Generator().manual_seed(seed)
    chosen = settings(shape=shape).prune
    scores = {group.name: torch.rand(group.size, generator=generator) for group in graph.gated}
    gated = GatedModel(
        model, graph, scores, lambda found: budget_plan(graph, chosen, scores=found), uniform=shape == "uniform"
    )
    with torch.no_grad():
        gated.logits.copy_(torch.randn(gated.logits.shape, generator=generator))
        gated.scales.copy_(torch.randn(gated.scales.shape, generator=generator))
    return gated


def test_the_lowest_of_each_group_go(pico_llama: Pico, graph: Graph) -> None:
    gated = gated_model(pico_llama(), graph, "uniform")
    assert int(gated.removed.sum()) > 0
    kept = gated.split(gated.kept())
    for (name, values), count in zip(gated.split(gated.logits.detach()).items(), gated.removed.tolist(), strict=True):
        slow = sorted(range(len(values)), key=values.tolist().__getitem__)[:count]
        assert (kept[name] == 0).nonzero().flatten().tolist() == sorted(slow)
    assert gated.plan("uniform").removed == {
        name: tuple((mask == 0).nonzero().flatten().tolist()) for name, mask in kept.items() if bool((mask == 0).any())
    }


def test_the_gradient_goes_straight_through(pico_llama: Pico, graph: Graph) -> None:
    """Forward the mask, backward the sigmoid: at gates that are shut too."""
    gated = gated_model(pico_llama(), graph, "uniform")
    gates = gated.current()
    assert torch.equal(gates.detach().round(), gated.kept())
    gates.sum().backward()
    soft = gated.logits.detach().sigmoid()
    torch.testing.assert_close(gated.logits.grad, soft * (1 - soft))
    assert gated.scales.grad is None


def test_gradients_reach_logits_first_and_then_scales(pico_llama: Pico, graph: Graph) -> None:
    """The loss' derivative by a gate times the sigmoid's; the derivative is that which the meter finds."""
    gated = gated_model(pico_llama().requires_grad_(False), graph, "uniform")
    windows = data().sources[0].valid
    loss = gated(input_ids=windows, labels=windows).loss
    loss.backward()
    by_logit, gated.logits.grad = gated.logits.grad, None
    factor = gated.kept().requires_grad_()
    gated.gates.follow(gated.split(factor))
    gated.model(input_ids=windows, labels=windows).loss.backward()
    soft = gated.logits.detach().sigmoid()
    assert by_logit is not None
    assert factor.grad is not None
    torch.testing.assert_close(by_logit, factor.grad * soft * (1 - soft), rtol=1e-3, atol=1e-8)
    assert bool((by_logit[gated.kept() == 0] != 0).any())
    gated.choosing = False
    gated(input_ids=windows, labels=windows).loss.backward()
    assert gated.logits.grad is None
    assert gated.scales.grad is not None
    assert bool((gated.scales.grad[gated.kept() == 0] == 0).all())


@pytest.mark.parametrize("shape", SHAPES)
def test_it_starts_at_the_one_shot_choice(pico_llama: Pico, graph: Graph, shape: str) -> None:
    model = pico_llama()
    scores = stage.calibration_scores(model, graph, data(), settings=settings())
    chosen = settings(shape=shape, method="one-shot", kinds=METHODS["grasprune"].kinds)
    gated = GatedModel(
        model, graph, scores, lambda found: budget_plan(graph, chosen.prune, scores=found), uniform=shape == "uniform"
    )
    expected = budget_plan(graph, chosen.prune, scores=scores)
    assert gated.plan(shape) == expected
    gated.update_widths()
    assert gated.plan(shape) == expected


@pytest.mark.parametrize("shape", SHAPES)
def test_the_budget_is_met_at_every_step(
    pico_llama: Pico, graph: Graph, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shape: str
) -> None:
    seen: list[dict[str, tuple[int, ...]]] = []
    original = GatedModel.forward

    def forward(gated: GatedModel, **inputs: Any) -> Any:
        seen.append(gated.plan(shape).removed)
        return original(gated, **inputs)

    monkeypatch.setattr(GatedModel, "forward", forward)
    model = pico_llama()
    result = run(model, tmp_path, settings(shape=shape, learning_rate=0.2))
    assert len(seen) == STEPS * BATCH // 2
    for removed in seen:
        assert 1 - graph.kept_parameters(removed) / graph.num_parameters == pytest.approx(RATIO, abs=0.02)
    choices = [removed for at, removed in enumerate(seen) if at % 2 == 0]
    assert choices[0] != choices[10]  # the gates learn
    frozen = choices[2 * STEPS // 3 :]
    assert all(removed == result.plan.removed for removed in frozen)  # the last third learns scales alone
    assert result.tokens == STEPS * BATCH * WINDOW
    left = sum(parameter.numel() for parameter in model.parameters())
    assert result.net == pytest.approx(1 - left / graph.num_parameters)
    assert result.net == pytest.approx(RATIO, abs=0.02)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_cut_model_is_the_gated_one(pico_llama: Pico, graph: Graph, shape: str) -> None:
    model = pico_llama().eval()
    dense = copy.deepcopy(model)
    gated = gated_model(model, graph, shape)
    gated.choosing = False
    wanted = logits(gated)
    gates = gated.current().detach()
    gated.gates.remove()
    grasprune.fold_gates_(model, graph, gated.split(gates))
    assert not torch.allclose(wanted, logits(dense), atol=1e-3)
    assert torch.allclose(logits(model), wanted, atol=1e-5)
    ls.cut_(model, graph, gated.plan(shape))
    assert torch.allclose(logits(model), wanted, atol=1e-5)
    ls.cut_(dense, ls.discover(dense), gated.plan(shape))
    assert not torch.allclose(logits(dense), wanted, atol=1e-3)  # the scales are no ones


def test_only_what_reads_a_structure_is_scaled(pico_llama: Pico, tmp_path: Path) -> None:
    model, dense = pico_llama(), pico_llama()
    flags = [parameter.requires_grad for parameter in model.parameters()]
    result = run(model, tmp_path, settings())
    ls.cut_(dense, ls.discover(dense), result.plan)
    for (name, after), before in zip(model.named_parameters(), dense.parameters(), strict=True):
        if name.endswith(("down_proj.weight", "o_proj.weight")):
            factor = (after / before).detach()
            torch.testing.assert_close(factor, factor[:1].expand_as(factor), rtol=1e-3, atol=1e-3)
            reach = (1 + REACH) ** (2 if "o_proj" in name else 1)  # a head's scale and its query slot's
            assert bool((factor > 1 / 2 / reach).all())
            assert bool((factor < reach).all())
            assert bool((factor != 1).any())
        else:
            assert torch.equal(after, before)
    assert [parameter.requires_grad for parameter in model.parameters()] == flags
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_a_gate_that_matters_comes_back(
    pico_llama: Pico, graph: Graph, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Channel 3 says what the next token is; the scores it starts from know nothing of that and put it last."""
    model = pico_llama()
    layer: Any = model.model.layers[0].mlp
    seen: list[Tensor] = []
    hook = layer.register_forward_pre_hook(lambda _, args: seen.append(args[0][0, -1]))
    with torch.no_grad():
        model(input_ids=torch.full((1, WINDOW), 5))
        hook.remove()
        direction = seen[0] / seen[0].norm()
        layer.gate_proj.weight[3] = direction
        layer.up_proj.weight[3] = direction
        layer.down_proj.weight[:, 3] = model.lm_head.weight[5]

    def scores(_: Any) -> dict[str, Tensor]:
        found = {group.name: torch.linspace(1, 1.5, group.size) for group in graph.gated}
        found[FFN][3] = 0.9
        return found

    monkeypatch.setattr(grasprune, "ONE_SHOT", replace(METHODS["one-shot"], score=scores))
    before = budget_plan(graph, settings().prune, scores=scores(None))
    assert 3 in before.removed[FFN]
    result = run(model, tmp_path, settings(learning_rate=0.05), data=data(constant=True))
    assert 3 not in result.plan.removed[FFN]


@pytest.mark.parametrize("killed", [14, 21])
def test_killed_and_resumed_is_never_killed(pico_llama: Pico, tmp_path: Path, killed: int, kill_at: Any) -> None:
    """Within the choice, and within the scales."""
    chosen = settings(shape="per-layer", learning_rate=0.2)
    whole = run(pico_llama(), tmp_path / "whole", chosen)
    with kill_at(grasprune, killed), pytest.raises(KeyboardInterrupt):
        run(pico_llama(), tmp_path / "parts", chosen, checkpoint_every=6)
    parts = run(pico_llama(), tmp_path / "parts", chosen, checkpoint_every=6, resume=True)
    assert parts.plan == whole.plan
    for one, other in zip(parts.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(one, other)


def test_compensation_is_not_applied_and_says_so(
    pico_llama: Pico, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run(pico_llama(), tmp_path, settings(compensate=True))
    assert "prune.compensate is not applied" in caplog.text
