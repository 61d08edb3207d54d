"""A refit comes nearer to the full model than compensation, which comes nearer than the bare cut, on any architecture."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    FalconConfig,
    FalconForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedModel,
)

import lorashear as ls
from lorashear.analysis.directions import principal_directions
from lorashear.graph.basis import basis_of
from lorashear.pruning.residual import residual_group
from lorashear.surgery import refit
from lorashear.surgery.compensate import compensate_
from lorashear.surgery.refit import refit_
from lorashear.surgery.rotate import rotate_
from lorashear.surgery.stepping import steppable

Pico = Callable[..., PreTrainedModel]
SMALL: dict[str, Any] = {"vocab_size": 97, "bos_token_id": 0, "eos_token_id": 0}


def windows(samples: int = 32) -> Tensor:
    return torch.randint(0, 97, (samples, 20), generator=torch.Generator().manual_seed(1))


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=windows()).logits


def ffn_plan(graph: ls.Graph) -> ls.Plan:
    return ls.Plan(removed={g.name: tuple(range(g.size // 4)) for g in graph.gated if "ffn" in g.name})


def built(name: str, pico_llama: Pico) -> PreTrainedModel:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, **SMALL}
    match name:
        case "llama":
            return pico_llama(layers=4, attention_bias=True)
        case "gpt2":  # Conv1D, biases
            return GPT2LMHeadModel(GPT2Config(n_embd=48, n_head=4, n_layer=3, n_positions=64, **SMALL))
        case "gpt-neox":  # attention and FFN side by side
            return GPTNeoXForCausalLM(GPTNeoXConfig(intermediate_size=112, **sizes))
        case "falcon":  # adds to what was written in place
            return FalconForCausalLM(FalconConfig(**sizes))
        case "opt":  # flattens batch and positions before its FFN
            opt = {"ffn_dim": 112, "dropout": 0.0, "word_embed_proj_dim": 64, "max_position_embeddings": 64}
            return OPTForCausalLM(OPTConfig(**opt, **sizes))
        case _:  # norms between what is written and the stream
            return Gemma2ForCausalLM(Gemma2Config(intermediate_size=112, head_dim=16, num_key_value_heads=2, **sizes))


@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt-neox", "falcon", "opt", "gemma2"])
def test_nearer_than_compensation(pico_llama: Pico, name: str) -> None:
    full = built(name, pico_llama)
    graph = ls.discover(full)
    plan, wanted = ffn_plan(graph), logits(full)
    distances = []
    for change in (None, compensate_, refit_):
        model = copy.deepcopy(full)
        if change:
            assert change(model, graph, plan, windows()) >= 3
        ls.cut_(model, ls.discover(model), plan)
        distances.append(float((logits(model) - wanted).norm()))
    bare, compensated, refitted = distances
    assert refitted < 0.95 * compensated < 0.95 * bare, distances


def test_the_stream_of_the_cut_model_is_the_one_that_was_refit_for(pico_llama: Pico, monkeypatch: Any) -> None:
    """What the walk over the layers takes for the cut model's stream is what the cut model has."""
    model = pico_llama(layers=3)
    graph = ls.discover(model)
    group = residual_group(graph)
    assert group is not None
    removed = {**ffn_plan(graph).removed, group.name: tuple(range(group.size - 8, group.size))}
    plan = ls.Plan(removed=removed)
    walks = []
    real = refit._Refit.__init__
    monkeypatch.setattr(refit._Refit, "__init__", lambda self, *a, **o: (walks.append(self), real(self, *a, **o))[1])
    refit_(model, graph, plan, windows(8), batch=8)
    ls.cut_(model, graph, plan)
    streams: list[Tensor] = []
    model.model.norm.register_forward_pre_hook(lambda _, args: streams.append(args[0]))  # type: ignore[union-attr, operator]
    with torch.no_grad():
        model.eval()(input_ids=windows(8))
    expected = walks[0].cut[0]
    assert not expected[..., -8:].any()
    kept = expected[..., :-8] * ((group.size - 8) / group.size) ** 0.5  # so that norms find the same mean square
    torch.testing.assert_close(streams[0], kept, rtol=1e-3, atol=1e-4)


def test_a_narrower_stream_is_refit_too(pico_llama: Pico) -> None:
    full = pico_llama(layers=3, tied=True)
    graph = ls.discover(full)
    group = residual_group(graph)
    assert group is not None
    basis = basis_of(graph, group)
    rotation, _ = principal_directions(full, basis, windows(), batch=8)
    rotate_(full, basis, rotation)
    wanted = logits(full)
    plan = ls.Plan(removed={group.name: tuple(range(48, group.size))})
    distances = []
    for change in (False, True):
        model = copy.deepcopy(full)
        if change:
            assert refit_(model, graph, plan, windows()) == 6  # attention and FFN of three layers
        ls.cut_(model, ls.discover(model), plan)
        distances.append(float((logits(model) - wanted).norm()))
    assert distances[1] < 0.95 * distances[0], distances


def test_without_drift_and_damping_it_is_least_squares(pico_llama: Pico) -> None:
    """In the first layer that loses something both answers are the same."""
    models = [pico_llama() for _ in "12"]
    graph = ls.discover(models[0])
    plan = ls.Plan(removed={"model.layers.1.mlp:ffn-channels": tuple(range(0, 112, 3))})
    for model, change in zip(models, (compensate_, refit_), strict=True):
        change(model, graph, plan, windows(), damping=1e-9)
        ls.cut_(model, ls.discover(model), plan)
    torch.testing.assert_close(logits(models[1]), logits(models[0]), rtol=1e-3, atol=1e-4)


def test_layers_that_need_more_than_each_others_output_are_compensated(
    pico_llama: Pico, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = pico_llama()
    graph = ls.discover(model)
    assert steppable(model.eval(), graph.layers_path, [], [windows(4), windows(4)]) is not None
    layers = model.get_submodule(graph.layers_path)
    real = layers[1].forward  # type: ignore[index]
    noise = iter(range(100))
    monkeypatch.setattr(layers[1], "forward", lambda *a, **o: real(*a, **o) * (1 + next(noise)))  # type: ignore[index]
    assert steppable(model, graph.layers_path, [], [windows(4), windows(4)]) is None
    called = []
    monkeypatch.setattr(refit, "compensate_", lambda *_a, **_o: called.append(torch.is_autocast_enabled("cpu")) or 7)
    assert refit_(model, graph, ffn_plan(graph), windows(), dtype=torch.bfloat16) == 7
    assert called == [False]  # its sums need all their digits, too


def test_sums_keep_their_digits_under_autocast(pico_llama: Pico) -> None:
    """Passes in bfloat16 cost next to nothing; sums in it, or casts of weights that have changed since, cost a lot."""
    full = pico_llama(layers=4)
    graph = ls.discover(full)
    plan, wanted = ffn_plan(graph), logits(full)
    distances = []
    for dtype in (None, torch.bfloat16):
        model = copy.deepcopy(full)
        refit_(model, graph, plan, windows(64), dtype=dtype)
        ls.cut_(model, ls.discover(model), plan)
        distances.append(float((logits(model) - wanted).norm()))
    assert distances[1] < 1.02 * distances[0], distances
