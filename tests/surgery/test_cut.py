"""The test of truth: zeroed and cut models give the same logits, for random plans."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

import lorashear as ls

Pico = Callable[..., PreTrainedModel]
TOLERANCE = 1e-4


@cache
def model_and_graph(tied: bool, bias: bool, lora: bool, repeats: int) -> tuple[Any, ls.Graph]:
    """A Llama of random weights in which every parameter matters (LoRA factors, norms and biases too)."""
    config = LlamaConfig(
        hidden_size=72, intermediate_size=112, num_hidden_layers=3, num_attention_heads=3 * repeats,
        num_key_value_heads=3, head_dim=20, vocab_size=97, tie_word_embeddings=tied, attention_bias=bias, mlp_bias=bias,
    )  # fmt: skip
    torch.manual_seed(0)
    model: nn.Module = LlamaForCausalLM(config)
    if lora:
        model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data.normal_(0, 0.2)
        else:
            parameter.data.uniform_(0.5, 1.5)
    return model.eval(), ls.discover(model)


def draw_plan(graph: ls.Graph, shape: str, data: st.DataObject) -> ls.Plan:
    counts: dict[str, int] = {}
    removed: dict[str, tuple[int, ...]] = {}
    for group in graph.prunable:
        key = group.role if shape == "uniform" else group.name
        if key not in counts:
            counts[key] = data.draw(st.integers(0, group.size - 1), label=key)
        order = data.draw(st.permutations(range(group.size)), label=group.name)
        removed[group.name] = tuple(order[: counts[key]])
    return ls.Plan(removed=removed, shape=shape)


@settings(max_examples=12, deadline=None)
@pytest.mark.parametrize("shape", ["uniform", "per-layer"])
@pytest.mark.parametrize("lora", [False, True])
@given(tied=st.booleans(), bias=st.booleans(), repeats=st.sampled_from([1, 2]), data=st.data())
def test_zeroed_equals_cut(shape: str, lora: bool, tied: bool, bias: bool, repeats: int, data: st.DataObject) -> None:
    model, graph = model_and_graph(tied, bias, lora, repeats)
    plan = draw_plan(graph, shape, data)
    zeroed, cut = copy.deepcopy(model), copy.deepcopy(model)
    ls.zero_(zeroed, graph, plan)
    try:
        ls.cut_(cut, graph, plan)
    except ls.PlanError as error:
        assert shape == "uniform", error  # noqa: PT017
        assert "multiple of the number of attention heads" in str(error)  # noqa: PT017
        return
    tokens = torch.randint(0, 97, (2, 9), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected, got = zeroed(tokens).logits, cut(tokens).logits
    assert (expected - got).abs().max() <= TOLERANCE * expected.abs().max()
    base = [p.numel() for name, p in cut.named_parameters() if "lora_" not in name]
    assert sum(base) == graph.kept_parameters(plan.removed)


def test_zeroing_changes_the_model_at_all() -> None:
    """Guards the property above against a plan that does nothing."""
    model, graph = model_and_graph(True, False, False, 2)
    tokens = torch.arange(9).unsqueeze(0)
    with torch.no_grad():
        before = model(tokens).logits
        for group in graph.prunable:
            zeroed = copy.deepcopy(model)
            ls.zero_(zeroed, graph, ls.Plan(removed={group.name: (0,)}))
            assert (zeroed(tokens).logits - before).abs().max() > 1e-3 * before.abs().max(), group.name


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_the_cut_model_generates_with_its_cache(attention: str) -> None:
    model, graph = model_and_graph(False, False, False, 2)
    plan = ls.plan(graph, ratio=0.4, shape="per-layer", round_to=1, scores=random_scores(graph))
    zeroed, cut = copy.deepcopy(model), copy.deepcopy(model)
    ls.zero_(zeroed, graph, plan)
    ls.cut_(cut, graph, plan)
    tokens = torch.arange(7).unsqueeze(0)
    answers = []
    for each, cached in ((zeroed, True), (cut, True), (cut, False)):
        each.set_attn_implementation(attention)
        answers.append(each.generate(tokens, max_new_tokens=8, do_sample=False, use_cache=cached, pad_token_id=0))
    assert torch.equal(answers[0], answers[1])
    assert torch.equal(answers[1], answers[2])


def random_scores(graph: ls.Graph) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {group.name: torch.rand(group.size, generator=generator) for group in graph.prunable}


def test_cut_model_traces_as_the_plan_says() -> None:
    """The second trace: sizes, groups and attributes of the cut model are those of a model built that way."""
    model, graph = model_and_graph(True, False, False, 2)
    plan = ls.plan(graph, ratio=0.3, scores=random_scores(graph))
    cut = copy.deepcopy(model)
    ls.cut_(cut, graph, plan)
    again = ls.discover(cut)
    for group in graph.prunable:
        left = group.size - len(plan.removed.get(group.name, ()))
        if left > 1:
            assert again[group.name].size == left
    fresh = LlamaForCausalLM(cut.config)
    shapes = [{name: tuple(p.shape) for name, p in m.named_parameters()} for m in (cut, fresh)]
    assert shapes[0] == shapes[1]
    attention = cut.model.layers[0].self_attn
    assert attention.num_key_value_groups == fresh.model.layers[0].self_attn.num_key_value_groups
    assert cut.model.layers[0].mlp.down_proj.in_features == fresh.model.layers[0].mlp.down_proj.in_features


def test_ties_survive() -> None:
    model, graph = model_and_graph(True, False, False, 2)
    cut = copy.deepcopy(model)
    ls.cut_(cut, graph, ls.plan(graph, ratio=0.3))
    assert cut.lm_head.weight is cut.model.embed_tokens.weight


def test_the_cut_model_trains_after_a_backward_pass_of_the_whole_one() -> None:
    """Autograd remembers the shapes of gradients it has seen."""
    model, graph = model_and_graph(True, False, False, 2)
    cut = copy.deepcopy(model)
    tokens = torch.arange(9).unsqueeze(0)
    before = cut(tokens, labels=tokens).loss
    before.backward()
    ls.cut_(cut, graph, ls.plan(graph, ratio=0.3))
    cut(tokens, labels=tokens).loss.backward()
    assert all(p.grad is None or p.grad.shape == p.shape for p in cut.parameters())
    assert cut.model.layers[0].mlp.up_proj.weight.grad is not None


def test_a_uniform_plan_the_configuration_refuses_leaves_the_model_whole() -> None:
    config = LlamaConfig(
        hidden_size=72, intermediate_size=112, num_hidden_layers=2, num_attention_heads=8, num_key_value_heads=8,
        head_dim=20, vocab_size=97,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    graph = ls.discover(model)
    before = {name: tuple(p.shape) for name, p in model.named_parameters()}
    removed = {g.name: (0,) for g in graph.gated if g.kind == "heads"}
    with pytest.raises(ls.PlanError, match="multiple of the number of attention heads"):
        ls.cut_(model, graph, ls.Plan(removed=removed, shape="uniform"))
    assert {name: tuple(p.shape) for name, p in model.named_parameters()} == before
    assert model.config.num_attention_heads == 8


def test_a_graph_of_another_model_is_refused(pico_llama: Pico) -> None:
    model = pico_llama()
    adapted = get_peft_model(pico_llama(), LoraConfig(r=3, target_modules="all-linear"))
    graph = ls.discover(adapted)
    plan = ls.Plan(removed={"model.layers.0.mlp:ffn-channels": (0,)})
    with pytest.raises(ls.PlanError, match="call discover on this one"):
        ls.zero_(model, graph, plan)
    own = ls.discover(model)
    ls.cut_(model, own, plan)
    with pytest.raises(ls.PlanError, match="was cut already"):
        ls.cut_(model, own, plan)


@pytest.mark.parametrize(
    ("removed", "message"),
    [
        ({"model.layers.0.mlp:ffn-channels": range(112)}, "at least one has to stay"),
        ({"model.layers.0.mlp:ffn-channels": (112,)}, "which has 112"),
        ({"model.embed_tokens:vocabulary": (0,)}, "not prunable: read by index"),
        ({"model.layers.7.mlp:ffn-channels": (0,)}, "no node group"),
    ],
)
def test_plans_that_do_not_fit_are_refused(pico_llama: Pico, removed: Any, message: str) -> None:
    model = pico_llama()
    with pytest.raises(ls.PlanError, match=message):
        ls.cut_(model, ls.discover(model), ls.Plan(removed=removed))
