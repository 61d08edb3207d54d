"""The test of truth: zeroed and cut models give the same logits, for random configurations and random plans."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from functools import partial
from math import lcm
from random import Random
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)

import lorashear as ls
from lorashear.config import LoraSettings
from lorashear.graph.base import base_model
from lorashear.graph.groups import Kind
from lorashear.training import attach_lora

Configuration = Callable[[], PreTrainedConfig]
Style = Callable[[st.DrawFn], Configuration]
TOLERANCE = 1e-4
VOCABULARY = 97
LAYERS = st.integers(1, 3)
GROUPED = 4
"""Grouped matrix products of experts want widths that are multiples of 16 bytes."""


def grouped_queries(draw: st.DrawFn) -> dict[str, Any]:
    """Sizes of the models whose queries share keys and values; heads need not fill the hidden size."""
    key_values = draw(st.integers(1, 3))
    heads = key_values * draw(st.integers(1, 3))
    multiple = lcm(2 * GROUPED, heads)  # Llama wants heads that could fill the hidden size
    return {
        "hidden_size": multiple * draw(st.integers(-(-24 // multiple), 72 // multiple)),
        "num_key_value_heads": key_values,
        "num_attention_heads": heads,
        "head_dim": 2 * draw(st.integers(3, 10)),
        "num_hidden_layers": draw(LAYERS),
        "intermediate_size": draw(st.integers(5, 90)),
        "tie_word_embeddings": draw(st.booleans()),
        "vocab_size": VOCABULARY,
    }


def llama(draw: st.DrawFn) -> Configuration:
    return partial(
        LlamaConfig, **grouped_queries(draw), attention_bias=draw(st.booleans()), mlp_bias=draw(st.booleans())
    )


def qwen2(draw: st.DrawFn) -> Configuration:
    """Biases of queries, keys and values, none of the output; the first layers may have a window."""
    sizes = grouped_queries(draw)
    window = {"sliding_window": 5, "max_window_layers": draw(LAYERS)} if draw(st.booleans()) else {}
    return partial(Qwen2Config, **sizes, **window, use_sliding_window=bool(window))


def qwen3(draw: st.DrawFn) -> Configuration:
    return partial(Qwen3Config, **grouped_queries(draw), attention_bias=draw(st.booleans()))


def qwen3_moe(draw: st.DrawFn) -> Configuration:
    """All layers with experts, or the first without."""
    chosen = draw(st.integers(1, 3))
    return partial(
        Qwen3MoeConfig,
        **grouped_queries(draw),
        attention_bias=draw(st.booleans()),
        moe_intermediate_size=GROUPED * draw(st.integers(2, 14)),
        num_experts_per_tok=chosen,
        num_experts=max(2, chosen + draw(st.integers(0, 5))),
        norm_topk_prob=draw(st.booleans()),
        mlp_only_layers=draw(st.sampled_from([[], [0]])),
    )


def gpt2(draw: st.DrawFn) -> Configuration:
    heads = draw(st.integers(1, 5))
    return partial(
        GPT2Config,
        n_head=heads,
        n_embd=heads * draw(st.integers(6, 16)),
        n_layer=draw(LAYERS),
        n_inner=draw(st.none() | st.integers(5, 90)),
        n_positions=32,
        vocab_size=VOCABULARY,
        tie_word_embeddings=draw(st.booleans()),
        scale_attn_by_inverse_layer_idx=draw(st.booleans()),
    )


def gpt_neox(draw: st.DrawFn) -> Configuration:
    heads = draw(st.integers(1, 5))
    return partial(
        GPTNeoXConfig,
        num_attention_heads=heads,
        hidden_size=heads * 8 * draw(st.integers(1, 2)),
        num_hidden_layers=draw(LAYERS),
        intermediate_size=draw(st.integers(5, 90)),
        vocab_size=VOCABULARY,
        rotary_pct=draw(st.sampled_from([0.25, 0.5, 1.0])),
        use_parallel_residual=draw(st.booleans()),
        attention_bias=draw(st.booleans()),
        tie_word_embeddings=draw(st.booleans()),
    )


STYLES: tuple[Style, ...] = (llama, qwen2, qwen3, qwen3_moe, gpt2, gpt_neox)


def build(config: Configuration, lora: bool) -> nn.Module:
    """A model of random weights in which every parameter matters (LoRA factors, norms and biases too)."""
    torch.manual_seed(0)
    model: nn.Module = AutoModelForCausalLM.from_config(config(), attn_implementation="eager")
    if lora:
        model = attach_lora(model, LoraSettings(rank=3))
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data.normal_(0, 0.2)
        else:
            parameter.data.uniform_(0.5, 1.5)
    return model.eval()


def draw_plan(graph: ls.Graph, data: st.DataObject) -> ls.Plan:
    """Any structures of some of the kinds; equal counts in all layers where the shape is to be uniform."""
    shape = data.draw(st.sampled_from(["uniform", "per-layer"]), label="shape")
    found = sorted({group.kind for group in graph.prunable})
    kinds = data.draw(st.sets(st.sampled_from(found), min_size=1) if found else st.just(set()), label="kinds")
    grouped = any(group.kind is Kind.EXPERTS for group in graph)
    chance = Random(data.draw(st.integers(0, 99), label="seed of the structures"))
    counts: dict[str, int] = {}
    removed: dict[str, tuple[int, ...]] = {}
    for group in (group for group in graph.prunable if group.kind in kinds):
        key = group.role if shape == "uniform" else group.name
        step = GROUPED if grouped and group.size % GROUPED == 0 and group.kind in WIDTHS else 1
        if key not in counts:
            counts[key] = step * data.draw(st.integers(0, (group.size - group.minimum) // step), label=key)
        removed[group.name] = tuple(chance.sample(range(group.size), counts[key]))
    return ls.Plan(removed=removed, shape=shape)


WIDTHS = (Kind.CHANNELS, Kind.RESIDUAL)
REFUSALS = (
    "multiple of the number of attention heads",
    "no value of the configuration sets the width",
    "differ in width",
)
"""What a uniform plan may be refused for: the result would be no plain checkpoint."""


def runs(model: Any) -> dict[str, Tensor]:
    """Logits in all the ways in which a model is used, `(batch, length, vocabulary)`."""
    base = base_model(model)
    cache = "cache" if "cache" in inspect.signature(base.forward).parameters else "past_key_values"
    tokens = torch.randint(0, VOCABULARY, (2, 9), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        eager = {"batch": model(tokens).logits, "longer": model(tokens.reshape(1, 18)).logits}
        base.set_attn_implementation("sdpa")
        start = model(tokens[:, :6], use_cache=True)
        rest = model(tokens[:, 6:], use_cache=True, **{cache: getattr(start, cache)}).logits
        return eager | {"sdpa": model(tokens).logits, "cache": torch.cat([start.logits, rest], dim=1)}


def check(config: Configuration, lora: bool, data: st.DataObject) -> None:
    model = build(config, lora)
    graph = ls.discover(model)
    plan = draw_plan(graph, data)
    zeroed, cut = copy.deepcopy(model), copy.deepcopy(model)
    ls.zero_(zeroed, graph, plan)
    try:
        ls.cut_(cut, graph, plan)
    except ls.PlanError as error:
        assert plan.shape == "uniform", error  # noqa: PT017
        assert any(refusal in str(error) for refusal in REFUSALS), error  # noqa: PT017
        return
    found = runs(cut)
    for way, expected in runs(zeroed).items():
        assert (expected - found[way]).abs().max() <= TOLERANCE * expected.abs().max(), way
    base = [p.numel() for name, p in cut.named_parameters() if "lora_" not in name]
    assert sum(base) == graph.kept_parameters(plan.removed)


SOME = settings(
    deadline=None,
    phases=[Phase.reuse, Phase.generate],  # a failure is small as it is, and shrinking it takes minutes
    suppress_health_check=[HealthCheck.too_slow],
)


@pytest.mark.parametrize("style", STYLES)
@settings(SOME, max_examples=4)
@given(lora=st.booleans(), data=st.data())
def test_zeroed_equals_cut(style: Style, lora: bool, data: st.DataObject) -> None:
    check(data.draw(st.composite(style)(), label="configuration"), lora, data)


@pytest.mark.slow
@pytest.mark.parametrize("style", STYLES)
@settings(SOME, max_examples=40)
@given(lora=st.booleans(), data=st.data())
def test_zeroed_equals_cut_at_length(style: Style, lora: bool, data: st.DataObject) -> None:
    check(data.draw(st.composite(style)(), label="configuration"), lora, data)
