"""Compensation is the least-squares answer, for every layout of the consumer's weight."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedModel

import lorashear as ls
from lorashear.config import LoraSettings
from lorashear.surgery import compensate
from lorashear.surgery.compensate import compensate_
from lorashear.training import attach_lora, merge_lora

Pico = Callable[..., PreTrainedModel]
FFN, HEADS = "model.layers.1.mlp:ffn-channels", "model.layers.1.self_attn:heads"


def windows() -> Tensor:
    return torch.randint(0, 97, (12, 20), generator=torch.Generator().manual_seed(1))


def inputs_of(model: nn.Module, path: str) -> Tensor:
    seen: list[Tensor] = []
    hook = model.get_submodule(path).register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        model(input_ids=windows())
    hook.remove()
    return seen[0].flatten(0, 1)


def test_least_squares(pico_llama: Pico) -> None:
    """Without damping, the output that is left is the projection onto what the kept features span."""
    model = pico_llama().eval()
    graph = ls.discover(model)
    path = "model.layers.1.mlp.down_proj"
    features, weight = inputs_of(model, path).double(), model.get_submodule(path).weight.detach().double().clone()  # type: ignore[union-attr, operator]
    gone = tuple(range(0, 112, 3))
    kept = [channel for channel in range(112) if channel not in gone]
    assert compensate_(model, graph, ls.Plan(removed={FFN: gone}), windows(), batch=5, damping=1e-9) == 1
    changed = model.get_submodule(path).weight.detach().double()  # type: ignore[union-attr, operator]
    best = torch.linalg.lstsq(features[:, kept], features @ weight.T).solution
    error = float((features[:, kept] @ changed[:, kept].T - features[:, kept] @ best).norm())
    assert error < 1e-3 * float((features @ weight.T).norm())
    assert torch.equal(changed[:, list(gone)], weight[:, list(gone)])  # those are cut next


def gpt2() -> PreTrainedModel:
    return GPT2LMHeadModel(
        GPT2Config(n_embd=48, n_head=4, n_layer=2, vocab_size=97, n_positions=64, bos_token_id=0, eos_token_id=0)
    )


def test_ffn_of_conv1d_and_linear(pico_llama: Pico) -> None:
    """Both ways a weight can lie: the cut model comes nearer to the full one with it than without."""
    for build in (lambda: pico_llama(seed=4), gpt2):
        torch.manual_seed(0)
        full = build().eval()
        with torch.no_grad():
            wanted = full(input_ids=windows()).logits
        distances = []
        for with_it in (False, True):
            torch.manual_seed(0)
            model = build().eval()
            graph = ls.discover(model)
            removed = {g.name: tuple(range(g.size // 4)) for g in graph.gated if "ffn" in g.name}
            plan = ls.Plan(removed=removed)
            if with_it:
                assert compensate_(model, graph, plan, windows()) == len(removed) == 2
            ls.cut_(model, graph, plan)
            with torch.no_grad():
                distances.append(float((model(input_ids=windows()).logits - wanted).norm()))
        assert distances[1] < distances[0], distances


def test_passes_give_what_one_gives(pico_llama: Pico, monkeypatch: pytest.MonkeyPatch) -> None:
    models = [pico_llama().eval() for _ in "12"]
    graph = ls.discover(models[0])
    plan = ls.Plan(removed={FFN: (1, 2, 3), HEADS: (0,), "model.layers.0.mlp:ffn-channels": (5,)})
    for model, room in zip(models, (compensate.MOMENT_BYTES, 1), strict=True):
        monkeypatch.setattr(compensate, "MOMENT_BYTES", room)
        assert compensate_(model, graph, plan, windows()) == 3
    # a later pass sees the earlier consumers' new weights, so only the first of them agrees to the digit
    first = [model.get_submodule(next(iter(plan.removed)).replace(":ffn-channels", ".down_proj")) for model in models]
    assert torch.allclose(first[0].weight, first[1].weight, atol=1e-6)  # type: ignore[arg-type]


def test_with_adapters_the_base_weight_takes_over_for_both(pico_llama: Pico) -> None:
    """An adapted model is compensated as its merged copy is."""
    adapted = attach_lora(pico_llama(), LoraSettings(rank=2), seed=0).eval()
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    merged = merge_lora(copy.deepcopy(adapted)).eval()
    removed = {FFN: tuple(range(20)), HEADS: (1,)}
    outputs = []
    for model in (adapted, merged):
        graph = ls.discover(model)
        compensate_(model, graph, ls.Plan(removed=removed), windows())
        ls.cut_(model, graph, ls.Plan(removed=removed))
        with torch.no_grad():
            outputs.append(model(input_ids=windows()).logits)
    assert torch.allclose(outputs[0], outputs[1], atol=1e-4)
