"""Saliency criteria against slow references."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import PreTrainedModel

import lorashear as ls
from lorashear.analysis.saliency import random_scores, score
from lorashear.config import SaliencySettings
from lorashear.pruning.gates import GateStatistics, gate_statistics

Pico = Callable[..., PreTrainedModel]
TOKENS = torch.randint(0, 97, (4, 9), generator=torch.Generator().manual_seed(0))
ONLY_MAGNITUDE = SaliencySettings(taylor2=0.0, magnitude=1.0)


def adapted(pico_llama: Pico) -> Any:
    torch.manual_seed(3)
    return get_peft_model(pico_llama(), LoraConfig(r=3, target_modules="all-linear", init_lora_weights=False))


def test_magnitude_is_the_norm_of_the_composed_slices(pico_llama: Pico) -> None:
    model = adapted(pico_llama)
    graph = ls.discover(model)
    found = score(model, graph, {}, ONLY_MAGNITUDE)
    merged = adapted(pico_llama).merge_and_unload()
    weights = dict(merged.named_parameters())
    slow = {}
    for group in ls.discover(merged).gated:
        norms = []
        for structure in range(group.size):
            squares = 0.0
            for member in group.members:
                for row in member.rows[structure].tolist():
                    squares += float(weights[member.parameter].select(member.dim, row).square().sum())
            norms.append(squares**0.5)
        slow[group.name] = torch.tensor(norms)
    mean = torch.cat(list(slow.values())).mean()
    for name, expected in slow.items():
        torch.testing.assert_close(found[name], expected / mean, rtol=1e-4, atol=1e-5)


def slices(group: ls.NodeGroup, graph: ls.Graph, weights: dict[str, torch.Tensor], structure: int) -> torch.Tensor:
    """All entries of a structure in the model without adapters, one after another."""
    found = [
        weights[graph.canonical[member.parameter]].select(member.dim, row).flatten()
        for member in group.members
        if not member.adapter
        for row in member.rows[structure].tolist()
    ]
    return torch.cat(found)


def test_mean_magnitude_and_cosine_against_a_slow_loop(pico_llama: Pico) -> None:
    model, plain = adapted(pico_llama), dict(pico_llama().named_parameters())
    graph = ls.discover(model)
    merged = {name: p.detach() for name, p in adapted(pico_llama).merge_and_unload().named_parameters()}
    change = {name: weight - plain[name].detach() for name, weight in merged.items()}
    slow: dict[str, dict[str, torch.Tensor]] = {"mean_magnitude": {}, "cosine": {}}
    for group in graph.gated:
        pairs = [[slices(group, graph, weights, i) for weights in (merged, change)] for i in range(group.size)]
        slow["mean_magnitude"][group.name] = torch.stack([w.square().mean().sqrt() for w, _ in pairs])
        slow["cosine"][group.name] = torch.stack([1 - w @ d / (w.norm() * d.norm()) for w, d in pairs])
    for name, expected in slow.items():
        found = score(model, graph, {}, SaliencySettings(**{"taylor2": 0.0, name: 1.0}))
        mean = torch.cat(list(expected.values())).mean()
        for group_name, value in expected.items():
            torch.testing.assert_close(found[group_name], value / mean, rtol=1e-3, atol=1e-4)


def test_taylor_terms_come_from_the_statistics_and_are_divided_by_their_mean(pico_llama: Pico) -> None:
    model = pico_llama()
    graph = ls.discover(model)
    statistics = gate_statistics(model, graph.gated, TOKENS, batch=2)
    found = score(model, graph, statistics, SaliencySettings(taylor=2.0, taylor2=1.0))
    first = {name: each.first.abs() / each.samples for name, each in statistics.items()}
    second = {name: each.second / each.samples for name, each in statistics.items()}
    means = [torch.cat(list(values.values())).mean() for values in (first, second)]
    for name in found:
        torch.testing.assert_close(found[name], 2 * first[name] / means[0] + second[name] / means[1])


def test_cosine_tells_what_still_moves(pico_llama: Pico) -> None:
    """A structure whose adapters point along its weights is kept less than one that they turn."""
    model = pico_llama()
    with pytest.warns(UserWarning, match="cosine is not applied"):
        scores = score(model, ls.discover(model), {}, SaliencySettings(taylor2=0.0, cosine=1.0))
    assert all(bool((value == 0).all()) for value in scores.values())
    turned = score(adapted(pico_llama), ls.discover(adapted(pico_llama)), {}, SaliencySettings(taylor2=0.0, cosine=1.0))
    assert all(bool((value >= 0).all()) for value in turned.values())
    assert any(bool((value > 0).any()) for value in turned.values())


def test_without_adapters_the_cosine_is_that_of_the_step_down_the_gradient(pico_llama: Pico) -> None:
    model = pico_llama()
    graph = ls.discover(model)
    model(input_ids=TOKENS, labels=TOKENS).loss.backward()
    weights = {name: p.detach() for name, p in model.named_parameters()}
    steps = {name: -p.grad for name, p in model.named_parameters() if p.grad is not None}
    slow = {}
    for group in graph.gated:
        pairs = [[slices(group, graph, values, i) for values in (weights, steps)] for i in range(group.size)]
        slow[group.name] = torch.stack([1 - w @ d / (w.norm() * d.norm()) for w, d in pairs])
    found = score(model, graph, {}, SaliencySettings(taylor2=0.0, cosine=1.0))
    mean = torch.cat(list(slow.values())).mean()
    for name, expected in slow.items():
        torch.testing.assert_close(found[name], expected / mean, rtol=1e-3, atol=1e-4)
    magnitude = score(model, graph, {}, ONLY_MAGNITUDE)
    model.zero_grad()
    for name, expected in score(model, graph, {}, ONLY_MAGNITUDE).items():
        assert torch.equal(magnitude[name], expected)  # a gradient is no part of the weight


def test_taylor_without_samples_says_what_is_missing(pico_llama: Pico) -> None:
    model = pico_llama()
    graph = ls.discover(model)
    empty = {g.name: GateStatistics(torch.zeros(g.size), torch.zeros(g.size), 0) for g in graph.gated}
    for statistics in ({}, empty):
        with pytest.raises(ls.SettingsError, match="no sample was metered"):
            score(model, graph, statistics, SaliencySettings())


def test_random_scores_follow_the_seed(pico_llama: Pico) -> None:
    groups = ls.discover(pico_llama()).prunable
    a, b, c = (random_scores(groups, seed) for seed in (0, 0, 1))
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert any(not torch.equal(a[name], c[name]) for name in a)


def test_a_mix_of_nothing_is_refused() -> None:
    with pytest.raises(ls.SettingsError, match="all weights are 0"):
        SaliencySettings.from_mapping({"taylor2": 0.0})


def test_nothing_to_score_is_no_error(pico_llama: Callable[..., PreTrainedModel]) -> None:
    model = pico_llama()
    assert score(model, ls.discover(model), {}, SaliencySettings(), groups=[]) == {}
