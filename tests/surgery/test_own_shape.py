"""Cuts that no configuration can tell: the model's modules run with them, and `lorashear.load` builds them."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, BloomConfig, BloomForCausalLM, GPT2Config, GPT2LMHeadModel

import lorashear as ls

IDS = torch.arange(9).unsqueeze(0)


def gpt2() -> Any:
    torch.manual_seed(0)
    config = GPT2Config(n_embd=48, n_head=4, n_layer=3, n_inner=112, vocab_size=97, n_positions=32)
    return GPT2LMHeadModel(config).eval()


def bloom() -> Any:
    torch.manual_seed(0)
    return BloomForCausalLM(BloomConfig(hidden_size=48, n_head=4, n_layer=2, vocab_size=97)).eval()


@pytest.mark.parametrize(
    ("build", "removed"),
    [
        (gpt2, {"transformer.h.0.attn:heads": (1,), "transformer.h.2.attn:heads": (0, 3)}),
        (
            gpt2,
            {"transformer.h.1.attn:heads": (2,), "transformer.h.1:ffn-channels": (4, 5), "transformer.h:layers": (0,)},
        ),
        (bloom, {"transformer.h.0.mlp:ffn-channels": tuple(range(0, 192, 3))}),
    ],
)
def test_cut_saved_and_loaded(build: Any, removed: dict[str, tuple[int, ...]], tmp_path: Path) -> None:
    model = build()
    graph = ls.discover(model)
    removed = {name: rows for name, rows in removed.items() if name in {group.name for group in graph}}
    assert len(removed) >= 1
    zeroed, cut = copy.deepcopy(model), copy.deepcopy(model)
    ls.zero_(zeroed, graph, ls.Plan(removed=removed))
    ls.cut_(cut, graph, ls.Plan(removed=removed))
    cut.save_pretrained(tmp_path)
    again = ls.load(tmp_path).eval()
    with torch.no_grad():
        expected = zeroed(IDS).logits
        torch.testing.assert_close(cut(IDS).logits, expected, rtol=1e-4, atol=1e-5)
        assert torch.equal(again(IDS).logits, cut(IDS).logits)
    assert sum(p.numel() for p in again.parameters()) == graph.kept_parameters(removed)


def test_a_uniform_plan_refuses_what_stock_tools_could_not_load() -> None:
    model = gpt2()
    graph = ls.discover(model)
    removed = {f"transformer.h.{layer}.attn:heads": (0,) for layer in range(3)}
    with pytest.raises(
        ls.PlanError, match=r"no value of the configuration sets the width of transformer.h.\*.attn:heads"
    ):
        ls.cut_(model, graph, ls.Plan(removed=removed, shape="uniform"))
    assert model.transformer.h[0].attn.c_attn.weight.shape == (48, 144)


def test_ffn_channels_of_gpt2_stay_a_plain_checkpoint(tmp_path: Path) -> None:
    model = gpt2()
    graph = ls.discover(model)
    removed = {group.name: (0, 7) for group in graph if group.kind == "ffn-channels"}
    ls.cut_(model, graph, ls.Plan(removed=removed, shape="uniform"))
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert again.config.n_inner == 110
    with torch.no_grad():
        assert torch.equal(again(IDS).logits, model(IDS).logits)


def test_the_configuration_tells_what_is_equal_in_all_layers(tmp_path: Path) -> None:
    """Beside heads that no value sets, widths that one does set stay in the configuration: module code may read it."""
    model = gpt2()
    graph = ls.discover(model)
    removed = {group.name: (0, 7) for group in graph if group.kind == "ffn-channels"}
    removed["transformer.h.1.attn:heads"] = (2,)
    ls.cut_(model, graph, ls.Plan(removed=removed))
    assert (model.config.n_inner, model.config.lorashear["per_layer"]) == (110, {})
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(ls.load(tmp_path).eval()(IDS).logits, model(IDS).logits)
