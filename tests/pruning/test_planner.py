"""Spending a parameter budget on structures."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from types import SimpleNamespace

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from transformers import (
    AutoModelForCausalLM,
    GPTNeoXJapaneseConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

import lorashear as ls
from lorashear.graph.groups import Exactness, Kind
from lorashear.pruning.uniform import _combinations
from lorashear.surgery.changes import layer_overrides

Pico = Callable[..., PreTrainedModel]


@cache
def llama_graph() -> ls.Graph:
    config = LlamaConfig(
        hidden_size=96, intermediate_size=256, num_hidden_layers=4, num_attention_heads=6, num_key_value_heads=3,
        head_dim=20, vocab_size=97,
    )  # fmt: skip
    with torch.device("meta"):
        return ls.discover(LlamaForCausalLM(config))


@pytest.fixture
def graph() -> ls.Graph:
    return llama_graph()


def scores(graph: ls.Graph, seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {group.name: torch.rand(group.size, generator=generator) for group in graph.gated}


def removed_share(graph: ls.Graph, plan: ls.Plan, ratio_of: str) -> float:
    lost = graph.num_parameters - graph.kept_parameters(plan.removed)
    return lost / (graph.num_parameters if ratio_of == "model" else graph.num_decoder_parameters)


@settings(max_examples=40, deadline=None)
@given(
    ratio=st.floats(0.05, 0.8), shape=st.sampled_from(["uniform", "per-layer"]), seed=st.integers(0, 9),
    ratio_of=st.sampled_from(["model", "decoder"]),
)  # fmt: skip
@example(ratio=0.125, shape="per-layer", seed=2, ratio_of="model")  # a head stands where the budget ends
def test_the_net_ratio_is_met_within_a_point(ratio: float, shape: str, seed: int, ratio_of: str) -> None:
    graph = llama_graph()  # no fixture: hypothesis would print it
    plan = ls.plan(graph, ratio=ratio, ratio_of=ratio_of, shape=shape, scores=scores(graph, seed), round_to=4)
    plan.check(graph)
    assert removed_share(graph, plan, ratio_of) == pytest.approx(ratio, abs=0.01)
    for group in graph.gated:
        left = group.size - len(plan.removed.get(group.name, ()))
        assert left >= 1
        assert group.kind is not Kind.CHANNELS or left % 4 == 0
    if shape == "uniform":
        widths = {(g.role, len(plan.removed.get(g.name, ()))) for g in graph.gated}
        assert len(widths) == len({role for role, _ in widths})
        overrides = layer_overrides(graph, plan)
        assert graph.geometry is not None
        assert graph.geometry.refusal(overrides[0]) == ""


def test_the_least_salient_go_first(graph: ls.Graph) -> None:
    given_scores = scores(graph, 0)
    plan = ls.plan(graph, ratio=0.2, scores=given_scores)
    for name, rows in plan.removed.items():
        gone = given_scores[name][list(rows)]
        left = given_scores[name][[i for i in range(graph[name].size) if i not in rows]]
        assert gone.max() <= left.min()


def test_precious_heads_are_left_and_worthless_ones_go(graph: ls.Graph) -> None:
    precious = {g.name: torch.ones(g.size) * (1.0 if g.kind is Kind.CHANNELS else 1e6) for g in graph.gated}
    kinds = {graph[name].kind for name in ls.plan(graph, ratio=0.2, scores=precious).removed}
    assert kinds == {Kind.CHANNELS}
    worthless = {g.name: torch.ones(g.size) * (1.0 if g.kind is Kind.CHANNELS else 1e-6) for g in graph.gated}
    kinds = {graph[name].kind for name in ls.plan(graph, ratio=0.2, scores=worthless).removed}
    assert Kind.HEADS in kinds or Kind.QUERY_SLOTS in kinds


def test_per_layer_follows_the_scores_and_spares_the_unprunable(graph: ls.Graph) -> None:
    precious_heads = {g.name: 1.0 if g.kind is Kind.CHANNELS else 1e6 for g in graph.gated}
    by_layer = {g.name: torch.full((g.size,), precious_heads[g.name] * (1 + (g.layer or 0))) for g in graph.gated}
    plan = ls.plan(graph, ratio=0.2, shape="per-layer", scores=by_layer)
    lost = [len(plan.removed.get(f"model.layers.{i}.mlp:ffn-channels", ())) for i in range(4)]
    assert lost[0] > lost[3]
    spared = "model.layers.0.mlp:ffn-channels"
    assert spared not in ls.plan(graph, ratio=0.2, shape="per-layer", scores=by_layer, unprunable=[spared]).removed


def test_structures_taken_before_stay_taken(graph: ls.Graph) -> None:
    name = "model.layers.2.mlp:ffn-channels"
    taken = {name: torch.tensor([5, 77])}
    for shape in ("uniform", "per-layer"):
        plan = ls.plan(graph, ratio=0.3, shape=shape, scores=scores(graph, 3), taken=taken)
        assert {5, 77} <= set(plan.removed[name])


@pytest.mark.parametrize("shape", ["uniform", "per-layer"])
def test_a_ratio_out_of_reach_says_how_far_it_goes(graph: ls.Graph, shape: str) -> None:
    with pytest.raises(ls.PlanError, match=r"99.0% cannot be reached: the prunable groups give at most \d\d\.\d%"):
        ls.plan(graph, ratio=0.99, ratio_of="decoder", shape=shape)


@pytest.mark.parametrize("ratio", [0.2, 0.3, 0.5, 0.7])
@pytest.mark.parametrize("shape", ["uniform", "per-layer"])
def test_whole_layers_come_as_near_as_half_a_layer(graph: ls.Graph, ratio: float, shape: str) -> None:
    given_scores = {"model.layers:layers": torch.tensor([3.0, 1.0, 2.0, 0.5])}
    plan = ls.plan(graph, ratio=ratio, ratio_of="decoder", shape=shape, scores=given_scores, kinds=["layers"])
    count = round(4 * ratio)
    assert plan.removed == {"model.layers:layers": tuple(sorted([3, 1, 2][:count]))}
    assert plan.shape == shape
    assert removed_share(graph, plan, "decoder") == pytest.approx(count / 4)


def test_layers_of_their_own_sizes_are_counted_each() -> None:
    """Two layers are a tenth of the third: without them hardly anything is gone."""
    config = Qwen3MoeConfig(
        hidden_size=72, intermediate_size=20, moe_intermediate_size=16, num_experts=24, num_experts_per_tok=1,
        num_hidden_layers=4, num_attention_heads=2, num_key_value_heads=1, head_dim=20, vocab_size=97,
        mlp_only_layers=[0, 1],
    )  # fmt: skip
    with torch.device("meta"):
        graph = ls.discover(Qwen3MoeForCausalLM(config))
    given_scores = {"model.layers:layers": torch.tensor([1.0, 2.0, 3.0, 4.0])}
    plan = ls.plan(graph, ratio=0.5, ratio_of="decoder", scores=given_scores, kinds=["layers"])
    assert plan.removed == {"model.layers:layers": (0, 1, 2)}
    assert removed_share(graph, plan, "decoder") == pytest.approx(0.5, abs=0.12)


def test_what_whole_layers_cannot_give_is_said(graph: ls.Graph) -> None:
    with pytest.raises(ls.PlanError, match=r"95.0% cannot be reached: whole layers give at most 75.0% .* ask for less"):
        ls.plan(graph, ratio=0.95, ratio_of="decoder", kinds=["layers"])
    with pytest.raises(ls.PlanError, match=r"5.0% is less than half of one layer, and a layer is 25.0%"):
        ls.plan(graph, ratio=0.05, ratio_of="decoder", kinds=["layers"])
    with pytest.raises(ls.SettingsError, match="whole layers cannot go together with other kinds"):
        ls.plan(graph, ratio=0.2, kinds=["layers", "heads"])
    pinned = replace(graph, groups=tuple(replace(g, exactness=Exactness.PINNED, reason="so") for g in graph))
    with pytest.raises(ls.PlanError, match="no whole layer can be removed: so; prune other kinds"):
        ls.plan(pinned, ratio=0.2, kinds=["layers"])


@pytest.mark.parametrize("shape", ["uniform", "per-layer"])
@pytest.mark.parametrize("count", [8, 80])  # every count is tried; by blocks
def test_experts_go_where_they_are_named(pico_mixture: Pico, shape: str, count: int) -> None:
    graph = ls.discover(pico_mixture("mixtral", experts=count))
    groups = [group for group in graph if group.kind is Kind.EXPERTS]
    given_scores = {group.name: torch.rand(group.size) for group in graph.candidates(["experts"])}
    plan = ls.plan(graph, ratio=0.5, ratio_of="decoder", shape=shape, scores=given_scores, kinds=["heads", "experts"])
    plan.check(graph)
    assert removed_share(graph, plan, "decoder") == pytest.approx(0.5, abs=0.03)
    lost = [plan.removed[group.name] for group in groups]
    assert shape == "per-layer" or len(lost[0]) == len(lost[1]) > 0
    for group, rows in zip(groups, lost, strict=True):
        assert {*rows} == {*given_scores[group.name].argsort()[: len(rows)].tolist()}
    heads = {f"model.layers.{layer}.self_attn:heads": (0,) for layer in range(2)}
    unnamed = ls.plan(graph, ratio=removed_share(graph, ls.Plan(removed=heads), "model"), shape=shape)
    assert unnamed.removed == heads


@pytest.mark.parametrize("shape", ["uniform", "per-layer"])
@pytest.mark.parametrize("count", [6, 70])
def test_as_many_experts_stay_as_a_token_is_sent_to(pico_mixture: Pico, shape: str, count: int) -> None:
    graph = ls.discover(pico_mixture("qwen3_moe", experts=count, chosen=4))
    names = [group.name for group in graph if group.kind is Kind.EXPERTS]
    most = {name: tuple(range(count - 4)) for name in names}
    furthest = removed_share(graph, ls.Plan(removed=most), "model")
    plan = ls.plan(graph, ratio=furthest, shape=shape, kinds=["experts"])
    assert [len(plan.removed[name]) for name in names] == [count - 4, count - 4]
    with pytest.raises(ls.PlanError, match=r"cannot be reached: .* as many experts as a token is sent to"):
        ls.plan(graph, ratio=furthest + 0.06, shape=shape, kinds=["experts"])


@pytest.mark.parametrize("ratio", [0.0, 1.0, 1.5, -0.1])
def test_a_ratio_outside_0_and_1_is_refused(graph: ls.Graph, ratio: float) -> None:
    with pytest.raises(ls.SettingsError, match="between 0 and 1"):
        ls.plan(graph, ratio=ratio)


def test_plan_survives_a_file(graph: ls.Graph, tmp_path: object) -> None:
    plan = ls.plan(graph, ratio=0.2)
    path = f"{tmp_path}/plan.json"
    plan.save(path)
    assert ls.Plan.read(path) == plan
    with pytest.raises(ls.PlanError, match="not a plan"):
        ls.Plan.read(f"{tmp_path}/nothing.json")


def test_equal_scores_give_equal_plans(graph: ls.Graph) -> None:
    assert ls.plan(graph, ratio=0.37, scores=scores(graph, 1)) == ls.plan(graph, ratio=0.37, scores=scores(graph, 1))


def test_many_roles_of_two_structures_come_to_an_end() -> None:
    roles = SimpleNamespace(members={name: [SimpleNamespace(size=2, minimum=1)] for name in "abcdefghijk"})
    found = list(_combinations(roles, [*roles.members]))  # type: ignore[arg-type]
    assert len(found) == 2**11


def test_a_width_that_is_a_multiple_of_another_goes_by_what_the_configuration_takes() -> None:
    """The FFN of GPT-NeoX-Japanese is `intermediate_multiple_size` times as wide as the stream."""
    config = GPTNeoXJapaneseConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        vocab_size=97,
        intermediate_multiple_size=4,
        bos_token_id=0,
        eos_token_id=0,
    )
    model = AutoModelForCausalLM.from_config(config).eval()
    graph = ls.discover(model)
    channels = tuple(group for group in graph.gated if group.kind is Kind.CHANNELS)
    found = ls.plan(graph, ratio=0.1, scores=scores(graph, 0)).removed
    assert {len(found[group.name]) for group in channels} == {32}
    ls.cut_(model, graph, ls.Plan(removed=found))
    assert model.config.intermediate_multiple_size == 3


def test_a_narrowed_stream_may_not_take_more_than_the_whole_budget(graph: ls.Graph) -> None:
    stream = next(group for group in graph if group.kind is Kind.RESIDUAL)
    fixed = {stream.name: tuple(range(stream.size // 2, stream.size))}
    with pytest.raises(ls.PlanError, match=r"a ratio of 5\.0% cannot be met within half a point"):
        ls.plan(graph, ratio=0.05, shape="per-layer", scores=scores(graph, 0), fixed=fixed)
