"""Which configuration values set which widths, found by building the model with others."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    MambaConfig,
    MambaForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
)

import lorashear as ls
from lorashear.graph.geometry import Geometry, Setting
from lorashear.graph.groups import Kind

Pico = Callable[..., PreTrainedModel]
HEADS, SLOTS, CHANNELS = (
    f"model.layers.*.{name}" for name in ("self_attn:heads", "self_attn:query-slots", "mlp:ffn-channels")
)


def geometry_of(model: torch.nn.Module) -> Geometry:
    geometry = ls.discover(model).geometry
    assert geometry is not None
    return geometry


def test_finds_the_keys_of_a_llama(pico_llama: Pico) -> None:
    geometry = geometry_of(pico_llama())
    assert geometry.affects["intermediate_size"] == {
        (f"model.layers.{layer}.mlp.{name}.weight", dim)
        for layer in (0, 1)
        for name, dim in (("gate_proj", 0), ("up_proj", 0), ("down_proj", 1))
    }
    assert ("model.layers.0.self_attn.k_proj.weight", 0) in geometry.affects["num_key_value_heads"]
    assert "num_hidden_layers" not in geometry.affects
    assert geometry.depth_key == "num_hidden_layers"


def test_fewer_heads_are_not_narrower_heads(pico_llama: Pico) -> None:
    """Two heads of 20 and four of 10 give equal shapes; only the trace tells them apart."""
    geometry = geometry_of(pico_llama())
    assert geometry.solve({HEADS: 1}) == {"num_attention_heads": 2, "num_key_value_heads": 1}
    assert geometry.solve({SLOTS: 1}) == {"num_attention_heads": 2}


def test_kinds_are_solved_together(pico_llama: Pico) -> None:
    geometry = geometry_of(pico_llama())
    wanted = {"num_attention_heads": 1, "num_key_value_heads": 1, "intermediate_size": 90, "hidden_size": 61}
    assert geometry.solve({HEADS: 1, SLOTS: 1, CHANNELS: 90, "model:residual": 61}) == wanted
    assert geometry.solve({HEADS: 2, CHANNELS: 112}) == {}


def test_a_deep_model_is_asked_through_a_shallow_one(pico_llama: Pico) -> None:
    geometry = geometry_of(pico_llama(layers=5))
    assert geometry.shallow == {"num_hidden_layers": 2}
    assert not any(name.startswith("model.layers.2") for name, _ in geometry.sizes)
    assert len(geometry.build({"intermediate_size": 64}).model.layers) == 5  # type: ignore[union-attr, arg-type]


def test_refusal_repeats_what_the_configuration_class_says(pico_llama: Pico) -> None:
    geometry = geometry_of(pico_llama())
    assert "not a multiple" in geometry.refusal({"num_attention_heads": 5})
    assert geometry.refusal({"num_attention_heads": 2}) == ""


def test_what_the_configuration_leaves_to_be_derived_is_made_explicit() -> None:
    """Without `head_dim`, fewer heads would be wider ones."""
    config = Qwen2Config(
        hidden_size=72, intermediate_size=112, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=97,
    )  # fmt: skip
    with torch.device("meta"):
        geometry = geometry_of(Qwen2ForCausalLM(config))
    assert geometry.solve({HEADS: 1})["head_dim"] == 18  # type: ignore[index]


def test_a_value_that_the_code_asks_for_in_vain_can_be_given() -> None:
    """Phi-3's configuration has no `head_dim`, its code looks for one."""
    config = Phi3Config(
        hidden_size=72, intermediate_size=112, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=97, pad_token_id=0,
    )  # fmt: skip
    with torch.device("meta"):
        geometry = geometry_of(Phi3ForCausalLM(config))
    assert geometry.derived == {"head_dim": 18}
    assert geometry.solve({HEADS: 1}) == {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 18}


def test_a_width_that_is_derived_is_left_to_attributes() -> None:
    """GPT-2's heads divide the hidden size; its modules keep two numbers of equal value that are two things."""
    config = GPT2Config(n_embd=48, n_head=4, n_layer=2, n_inner=112, vocab_size=97, n_positions=32)
    with torch.device("meta"):
        graph = ls.discover(GPT2LMHeadModel(config))
    heads = graph["transformer.h.0.attn:heads"]
    assert (heads.prunable, heads.plain) == (True, False)
    assert graph.geometry is not None
    assert graph.geometry.solve({heads.role: 3}) is None
    found = graph.geometry.attributes_of(heads.role)
    assert found is not None
    assert {(each.module, each.name) for each in found} == {("attn", "split_size"), ("attn.c_attn", "nf")}
    assert next(g for g in graph if g.kind is Kind.CHANNELS).settings == ("n_inner",)


@pytest.mark.parametrize(
    ("change", "old", "size", "kept", "new"),
    [
        ("times", 12, 4, 3, 9),
        ("times", 10, 4, 3, None),
        ("less", 10, 4, 3, 9),
        ("less", 2, 4, 1, None),
        ("times", [8, 16], 4, 2, [4, 8]),
    ],
)
def test_how_a_value_follows(change: str, old: object, size: int, kept: int, new: object) -> None:
    assert Setting("any", change).after(old, size, kept) == new  # type: ignore[arg-type]


def test_a_module_without_a_configuration_has_none() -> None:
    graph = ls.discover(torch.nn.Linear(2, 2), inputs={"input": torch.zeros(1, 2)})
    assert graph.geometry is None


def test_models_are_built_with_their_weights_tied(pico_llama: Pico) -> None:
    """An embedding that is the head as well has one name, in the model and in those built to ask questions of."""
    for tied in (False, True):
        built = geometry_of(pico_llama(tied=tied)).build({})
        names = {name for name, _ in built.named_parameters()}
        assert ("lm_head.weight" in names) is not tied


def test_the_residual_of_a_model_whose_head_lies_outside_of_it_is_found_again() -> None:
    """Untied, the residual's parameters would reach further up than in the model, under another role."""
    config = MambaConfig(vocab_size=211, hidden_size=36, state_size=5, time_step_rank=3, num_hidden_layers=2)
    (residual,) = [group for group in ls.discover(MambaForCausalLM(config)) if group.kind is Kind.RESIDUAL]
    assert residual.settings == ("hidden_size",)
