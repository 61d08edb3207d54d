"""What the loss says about whole experts."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

import lorashear as ls
from lorashear.config import SaliencySettings
from lorashear.graph.groups import Kind, NodeGroup
from lorashear.graph.writers import expert_writers
from lorashear.pruning.gates import gate_statistics
from lorashear.pruning.methods import METHODS, Scoring

Pico = Callable[..., PreTrainedModel]
STEP = 1e-3
MAKES = ["mixtral", "qwen3_moe"]
WINDOWS = torch.randint(0, 97, (3, 7), generator=torch.Generator().manual_seed(3))


def experts(graph: ls.Graph) -> list[NodeGroup]:
    return [group for group in graph if group.kind is Kind.EXPERTS]


def loss(model: PreTrainedModel, window: Tensor) -> float:
    """From the logits: the model's own loss is rounded to float32."""
    with torch.no_grad():
        logits = model(window[None], use_cache=False).logits[0, :-1]
    return float(torch.nn.functional.cross_entropy(logits, window[1:]))


@contextmanager
def scaled(weight: Tensor, factor: float) -> Iterator[None]:
    before = weight.detach().clone()
    with torch.no_grad():
        weight.mul_(factor)
    yield
    with torch.no_grad():
        weight.copy_(before)


@pytest.mark.parametrize("make", MAKES)
def test_the_writer_is_the_last_matrix_of_an_expert(pico_mixture: Pico, make: str) -> None:
    graph = ls.discover(pico_mixture(make))
    writers = expert_writers(graph, experts(graph))
    assert [member.parameter for member in writers.values()] == [
        f"model.layers.{layer}.mlp.experts.down_proj" for layer in range(2)
    ]
    assert all(member.dim == 0 for member in writers.values())


@pytest.mark.parametrize("make", MAKES)
def test_statistics_are_those_of_differences_of_the_loss(pico_mixture: Pico, make: str) -> None:
    """An expert's output times 1 + e and 1 - e, window by window."""
    model = pico_mixture(make).double()
    model.set_experts_implementation("eager")  # the grouped product knows no float64
    for layer in model.model.layers:  # so that the loss depends on experts far above the rounding of the norms
        layer.mlp.experts.down_proj.data.mul_(20)
    graph = ls.discover(model)
    flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    writers = expert_writers(graph, experts(graph))
    found = gate_statistics(model, graph.gated, WINDOWS, batch=2, writers=writers)
    for layer in range(2):
        weight = model.model.layers[layer].mlp.experts.down_proj
        statistics = found[f"model.layers.{layer}.mlp:experts"]
        assert float(statistics.first.abs().max()) > 0.01
        assert statistics.samples == len(WINDOWS)
        for expert in range(6):
            derivatives = []
            for window in WINDOWS:
                with scaled(weight[expert], 1 + STEP):
                    more = loss(model, window)
                with scaled(weight[expert], 1 - STEP):
                    derivatives.append((more - loss(model, window)) / (2 * STEP))
            expected = torch.tensor(derivatives)
            assert float(statistics.first[expert]) == pytest.approx(float(expected.sum()), rel=0.01, abs=1e-4)
            assert float(statistics.second[expert]) == pytest.approx(float(expected.square().sum()), rel=0.01, abs=1e-7)
    assert flags == {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    assert all(parameter.grad is None for parameter in model.parameters())


def test_the_statistics_of_other_gates_do_not_change(pico_mixture: Pico) -> None:
    model = pico_mixture("mixtral")
    graph = ls.discover(model)
    alone = gate_statistics(model, graph.gated, WINDOWS, batch=2)
    beside = gate_statistics(model, graph.gated, WINDOWS, batch=2, writers=expert_writers(graph, experts(graph)))
    assert alone.keys() < beside.keys()
    for name, each in alone.items():
        torch.testing.assert_close(beside[name].second, each.second)


@pytest.mark.parametrize("make", MAKES)
def test_an_expert_that_nothing_is_sent_to_scores_lowest(pico_mixture: Pico, make: str) -> None:
    model = pico_mixture(make, experts=12, chosen=1)
    graph = ls.discover(model)
    window = WINDOWS[:1]  # seven tokens for twelve experts; nothing follows the last, so that it has no say
    sent: dict[int, set[int]] = {0: set(), 1: set()}
    for layer, numbers in sent.items():
        gate = model.model.layers[layer].mlp.gate
        gate.register_forward_pre_hook(
            lambda module, args, numbers=numbers: numbers.update(
                (args[0].flatten(0, -2)[:-1] @ module.weight.T).argmax(-1).tolist()
            )
        )
    kinds = ("heads", "experts")
    scores = METHODS["one-shot"].score(Scoring(model, graph, window, 1, None, 0, SaliencySettings(), kinds))
    for layer, numbers in sent.items():
        idle = sorted({*range(12)} - numbers)
        score = scores[f"model.layers.{layer}.mlp:experts"]
        assert 0 < len(idle) < 12
        assert bool((score[idle] == 0).all())
        assert bool((score[sorted(numbers)] > 0).all())


@pytest.mark.parametrize("method", ["one-shot", "magnitude", "random"])
def test_experts_are_scored_where_they_are_named(pico_mixture: Pico, method: str) -> None:
    model = pico_mixture("mixtral")
    graph = ls.discover(model)
    given = (model, graph, WINDOWS, 2, None, 0, SaliencySettings())
    gated = {group.name for group in graph.gated}
    assert METHODS[method].score(Scoring(*given)).keys() == gated
    named = METHODS[method].score(Scoring(*given, kinds=("experts",)))
    assert named.keys() == gated | {group.name for group in experts(graph)}
    assert bool((named["model.layers.1.mlp:experts"] >= 0).all())


def test_experts_without_a_matrix_of_their_own_are_refused(pico_mixture: Pico) -> None:
    graph = ls.discover(pico_mixture("mixtral"))
    assert graph.inference is not None
    graph.inference.sites.clear()
    with pytest.raises(ls.PlanError, match=r"layers\.0\.mlp:experts: no matrix product gives what its experts put out"):
        expert_writers(graph, experts(graph))
