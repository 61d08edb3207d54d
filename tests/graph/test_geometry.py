"""Which configuration values set which widths, found by building the model with others."""

from __future__ import annotations

from collections.abc import Callable

import torch
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedModel

import lorashear as ls
from lorashear.graph.geometry import probe_geometry

Pico = Callable[..., PreTrainedModel]


def test_finds_the_keys_of_a_llama(pico_llama: Pico) -> None:
    geometry = probe_geometry(pico_llama())
    assert geometry is not None
    assert geometry.affects["intermediate_size"] == {
        (f"model.layers.{layer}.mlp.{name}.weight", dim)
        for layer in (0, 1)
        for name, dim in (("gate_proj", 0), ("up_proj", 0), ("down_proj", 1))
    }
    assert ("model.layers.0.self_attn.k_proj.weight", 0) in geometry.affects["num_key_value_heads"]
    assert "num_hidden_layers" not in geometry.affects


def test_solves_for_fewer_heads_where_narrower_heads_would_have_the_same_sizes(pico_llama: Pico) -> None:
    """Two heads of 20 and four of 10 give equal shapes; only the trace tells them apart."""
    graph = ls.discover(pico_llama())
    assert graph.geometry is not None
    forms = graph.cut_forms({f"model.layers.{layer}.self_attn:heads": (0,) for layer in (0, 1)})
    assert graph.geometry.solve(forms) == {"num_attention_heads": 2, "num_key_value_heads": 1}
    del forms["model.layers.1.self_attn.o_proj.weight", 1]
    assert graph.geometry.solve(forms) is None


def test_a_deep_model_is_asked_through_a_shallow_one(pico_llama: Pico) -> None:
    model = pico_llama(layers=5)
    geometry = probe_geometry(model, layers_path="model.layers", num_layers=5)
    assert geometry is not None
    assert geometry.shallow == {"num_hidden_layers": 2}
    assert not any(name.startswith("model.layers.2") for name, _ in geometry.sizes)
    assert len(geometry.build({"intermediate_size": 64}).model.layers) == 5  # type: ignore[union-attr, arg-type]


def test_refusal_repeats_what_the_configuration_class_says(pico_llama: Pico) -> None:
    geometry = probe_geometry(pico_llama())
    assert geometry is not None
    assert "not a multiple" in geometry.refusal({"num_attention_heads": 5})
    assert geometry.refusal({"num_attention_heads": 2}) == ""


def test_a_width_that_is_derived_has_no_answer() -> None:
    """GPT-2's head count does not set a width: its heads divide the hidden size."""
    with torch.device("meta"):
        model = GPT2LMHeadModel(GPT2Config(n_embd=48, n_head=4, n_layer=2, n_inner=112, vocab_size=97, n_positions=32))
    geometry = probe_geometry(model)
    assert geometry is not None
    assert geometry.solve({("transformer.h.0.attn.c_attn.weight", 1): 108}) is None
    assert "n_inner" in geometry.affects


def test_a_module_without_a_configuration_has_none() -> None:
    assert probe_geometry(torch.nn.Linear(2, 2)) is None
