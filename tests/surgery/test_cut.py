"""Cutting beside zeroing: what a cut model is, does and keeps, and which plans are refused."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

import lorashear as ls

Pico = Callable[..., PreTrainedModel]


@cache
def model_and_graph(tied: bool = True) -> tuple[Any, ls.Graph]:
    """A Llama of random weights in which every parameter matters (norms too)."""
    config = LlamaConfig(
        hidden_size=72, intermediate_size=112, num_hidden_layers=3, num_attention_heads=6, num_key_value_heads=3,
        head_dim=20, vocab_size=97, tie_word_embeddings=tied,
    )  # fmt: skip
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data.normal_(0, 0.2)
        else:
            parameter.data.uniform_(0.5, 1.5)
    return model.eval(), ls.discover(model)


def test_zeroing_changes_the_model_at_all() -> None:
    """Guards "zeroed equals cut" against plans that do nothing."""
    model, graph = model_and_graph()
    tokens = torch.arange(9).unsqueeze(0)
    with torch.no_grad():
        before = model(tokens).logits
        for group in graph.prunable:
            zeroed = copy.deepcopy(model)
            ls.zero_(zeroed, graph, ls.Plan(removed={group.name: (0,)}))
            assert (zeroed(tokens).logits - before).abs().max() > 1e-3 * before.abs().max(), group.name


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_the_cut_model_generates_with_its_cache(attention: str) -> None:
    model, graph = model_and_graph(tied=False)
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
    model, graph = model_and_graph()
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
    model, graph = model_and_graph()
    cut = copy.deepcopy(model)
    ls.cut_(cut, graph, ls.plan(graph, ratio=0.3))
    assert cut.lm_head.weight is cut.model.embed_tokens.weight


def test_the_cut_model_trains_after_a_backward_pass_of_the_whole_one() -> None:
    """Autograd remembers the shapes of gradients it has seen."""
    model, graph = model_and_graph()
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


def test_there_are_never_two_models(monkeypatch: pytest.MonkeyPatch) -> None:
    model, graph = (copy.deepcopy(each) for each in model_and_graph(tied=False))
    cut_to: dict[str, int] = {}
    before = {name: weakref.ref(parameter) for name, parameter in model.named_parameters()}
    index_select = torch.Tensor.index_select

    def counted(tensor: torch.Tensor, dim: int, index: torch.Tensor) -> torch.Tensor:
        if tensor.device.type == "cpu":
            cut_to["alive"] = sum(ref() is not None for ref in before.values())
        return index_select(tensor, dim, index)

    monkeypatch.setattr(torch.Tensor, "index_select", counted)
    ls.cut_(model, graph, ls.Plan(removed={group.name: (0,) for group in graph.prunable if group.layers == ()}))
    assert cut_to["alive"] <= 2  # the one that is being cut, and a norm of the heads' size that stays whole
