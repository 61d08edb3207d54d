from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedModel, Qwen3MoeConfig, Qwen3MoeForCausalLM

from lorashear.config import LoraSettings
from lorashear.errors import ModelError
from lorashear.training import adapter_targets, attach_lora, merge_lora

Build = Callable[..., PreTrainedModel]
INPUT_IDS = torch.arange(24).view(2, 12)
SETTINGS = LoraSettings(rank=3, alpha=5.0)


def pico_gpt2() -> PreTrainedModel:
    torch.manual_seed(0)
    sizes = {"n_embd": 24, "n_inner": 40, "n_layer": 2, "n_head": 3, "vocab_size": 97, "n_positions": 32}
    return GPT2LMHeadModel(GPT2Config(**sizes, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0))


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    return model.eval()(input_ids=INPUT_IDS).logits


def factors(model: nn.Module, which: str) -> dict[str, nn.Parameter]:
    return {name: value for name, value in model.named_parameters() if f"lora_{which}" in name}


def test_targets_are_the_linear_layers_of_the_decoder_in_order(pico_llama: Build) -> None:
    targets = adapter_targets(pico_llama())
    assert len(targets) == 2 * 7
    assert targets[:2] == ["model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.k_proj"]
    assert not [name for name in targets if "lm_head" in name]
    assert adapter_targets(pico_llama(), layers_path="model.layers.1") == targets[7:]
    assert adapter_targets(pico_gpt2())[:2] == ["transformer.h.0.attn.c_attn", "transformer.h.0.attn.c_proj"]


def test_lists_inside_the_layers_are_not_taken_for_them() -> None:
    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.experts = nn.ModuleList(nn.Linear(5, 7) for _ in range(3))

    model = nn.Module()
    model.small = nn.ModuleList([nn.Linear(2, 2)])
    model.blocks = nn.ModuleList([Layer()])  # holds exactly what its experts hold
    model.head = nn.Linear(5, 90)
    assert adapter_targets(model) == [f"blocks.0.experts.{index}" for index in range(3)]


def test_models_that_cannot_be_adapted() -> None:
    with pytest.raises(ModelError, match="has no list of decoder layers"):
        adapter_targets(nn.Sequential(nn.Linear(3, 3)))
    with pytest.raises(ModelError, match=r"no linear layer lies under 0 of Sequential.* train all weights"):
        adapter_targets(nn.Sequential(nn.ModuleList([nn.LayerNorm(3)])))


@pytest.mark.parametrize("kind", ["linear", "transposed"])
def test_fresh_adapters_change_nothing_and_learn_alone(pico_llama: Build, kind: str) -> None:
    plain = pico_llama() if kind == "linear" else pico_gpt2()
    before, targets = logits(plain), adapter_targets(plain)
    model = attach_lora(plain, SETTINGS)
    assert torch.equal(logits(model), before)
    adapters = factors(model, "A") | factors(model, "B")
    assert len(adapters) == 2 * len(targets)
    assert {name for name, value in model.named_parameters() if value.requires_grad} == adapters.keys()
    assert {min(value.shape) for value in adapters.values()} == {3}
    assert not any(value.any() for value in factors(model, "B").values())


@pytest.mark.parametrize("kind", ["linear", "transposed"])
def test_merged_is_adapted(pico_llama: Build, kind: str) -> None:
    plain = pico_llama() if kind == "linear" else pico_gpt2()
    before, names = logits(plain), [name for name, _ in plain.named_parameters()]
    model = attach_lora(plain, SETTINGS)
    for value in factors(model, "B").values():
        nn.init.normal_(value, std=0.3)
    adapted = logits(model)
    assert not torch.allclose(adapted, before, atol=1e-2)
    merged = merge_lora(model)
    assert type(merged) is type(plain)
    torch.testing.assert_close(logits(merged), adapted, atol=1e-5, rtol=1e-4)
    assert [name for name, _ in merged.named_parameters()] == names
    assert all(value.requires_grad for value in merged.parameters())
    assert not hasattr(merged, "peft_config")


def test_only_the_given_targets_are_adapted(pico_llama: Build) -> None:
    model = attach_lora(pico_llama(), SETTINGS, ["model.layers.1.mlp.up_proj"])
    assert list(factors(model, "A")) == ["base_model.model.model.layers.1.mlp.up_proj.lora_A.default.weight"]


def test_the_seed_decides_and_the_global_generator_is_left_alone(pico_llama: Build) -> None:
    plain = [pico_llama() for _ in range(3)]
    torch.manual_seed(4)
    wanted = torch.rand(3)
    torch.manual_seed(4)
    adapted = [attach_lora(model, SETTINGS, seed=seed) for model, seed in zip(plain, (1, 1, 2), strict=True)]
    one, same, other = (factors(model, "A") for model in adapted)
    assert torch.equal(torch.rand(3), wanted)
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not any(torch.equal(one[name], other[name]) for name in one)


def test_what_does_not_merge_is_named(pico_llama: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    model = attach_lora(pico_llama(), SETTINGS)
    monkeypatch.setattr(model.base_model, "merge_and_unload", lambda *_, **__: model)
    with pytest.raises(ModelError, match=r"modules still belong to peft after merging \(the first: "):
        merge_lora(model)


def test_a_dense_layer_of_a_mixture_has_its_own_adapters() -> None:
    config = Qwen3MoeConfig(
        hidden_size=24, intermediate_size=40, moe_intermediate_size=8, num_experts=3, num_experts_per_tok=2,
        num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, head_dim=10, vocab_size=97,
        mlp_only_layers=[0],
    )  # fmt: skip
    model = attach_lora(Qwen3MoeForCausalLM(config), SETTINGS)
    adapted = [name for name in factors(model, "A") if ".mlp." in name]
    prefix = "base_model.model.model.layers.0.mlp"
    assert adapted == [f"{prefix}.{name}.lora_A.default.weight" for name in ("gate_proj", "up_proj", "down_proj")]
    assert model.config.model_type == "qwen3_moe"
    assert model.config.to_dict()["model_type"] == "qwen3_moe"
