"""Node groups of Llama-shaped models, with and without adapters."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
)

import lorashear as ls
from lorashear.graph.groups import Exactness, Kind
from lorashear.verify import verify

Pico = Callable[..., PreTrainedModel]


def members(group: ls.NodeGroup) -> dict[tuple[str, int], list[list[int]]]:
    return {(m.parameter, m.dim): m.rows.tolist() for m in group.members}


def test_ffn_channel_is_a_row_of_gate_and_up_and_a_column_of_down(pico_llama: Pico) -> None:
    group = ls.discover(pico_llama())["model.layers.1.mlp:ffn-channels"]
    mlp = "model.layers.1.mlp"
    each = [[i] for i in range(112)]
    assert members(group) == {
        (f"{mlp}.gate_proj.weight", 0): each,
        (f"{mlp}.up_proj.weight", 0): each,
        (f"{mlp}.down_proj.weight", 1): each,
    }
    assert (group.kind, group.layer, group.size, group.prunable) == (Kind.CHANNELS, 1, 112, True)
    assert [consumer.module for consumer in group.consumers] == [f"{mlp}.down_proj"]


def test_a_head_is_one_key_value_head_with_its_queries(pico_llama: Pico) -> None:
    group = ls.discover(pico_llama())["model.layers.0.self_attn:heads"]
    attention = "model.layers.0.self_attn"
    queries = [list(range(40)), list(range(40, 80))]
    keys = [list(range(20)), list(range(20, 40))]
    assert members(group) == {
        (f"{attention}.q_proj.weight", 0): queries,
        (f"{attention}.k_proj.weight", 0): keys,
        (f"{attention}.v_proj.weight", 0): keys,
        (f"{attention}.o_proj.weight", 1): queries,
    }


def test_a_query_slot_is_the_same_query_of_every_key_value_head(pico_llama: Pico) -> None:
    group = ls.discover(pico_llama())["model.layers.0.self_attn:query-slots"]
    slots = [[*range(20), *range(40, 60)], [*range(20, 40), *range(60, 80)]]
    assert members(group) == {
        ("model.layers.0.self_attn.q_proj.weight", 0): slots,
        ("model.layers.0.self_attn.o_proj.weight", 1): slots,
    }


def test_bias_belongs_to_its_rows(pico_llama: Pico) -> None:
    group = ls.discover(pico_llama(attention_bias=True))["model.layers.0.self_attn:heads"]
    named = {(m.parameter.split(".")[-2], m.parameter.split(".")[-1], m.dim) for m in group.members}
    assert {("q_proj", "bias", 0), ("k_proj", "bias", 0), ("v_proj", "bias", 0)} <= named
    assert ("o_proj", "bias", 0) not in named


def test_what_is_pinned_says_why(pico_llama: Pico) -> None:
    graph = ls.discover(pico_llama(tied=True))
    reasons = {group.kind: group.reason for group in graph if not group.prunable}
    assert "embedding in model.embed_tokens" in reasons[Kind.VOCABULARY]
    assert "no value of the model's configuration" in reasons[Kind.HEAD_DIM]
    assert all(group.prunable or group.reason for group in graph)


def test_the_residual_is_exact_after_rescaling_and_says_what_averages_over_it(pico_llama: Pico) -> None:
    (group,) = [g for g in ls.discover(pico_llama()) if g.kind is Kind.RESIDUAL]
    assert group.exactness is Exactness.RESCALED
    assert group.settings == ("hidden_size",)
    assert "mean in model." in group.reason


def test_whole_layers_are_structures(pico_llama: Pico) -> None:
    group = ls.discover(pico_llama())["model.layers:layers"]
    assert (group.kind, group.size, group.settings) == (Kind.DEPTH, 2, ("num_hidden_layers",))
    assert group.layers[1].module == "model.layers.1"
    assert "model.layers.1.mlp.down_proj.weight" in group.layers[1].parameters


def test_rotary_pairs_lie_in_one_group_over_all_layers(pico_llama: Pico) -> None:
    (group,) = [g for g in ls.discover(pico_llama()) if any("inv_freq" in m.parameter for m in g.members)]
    rows = {m.parameter: m.rows[3].tolist() for m in group.members}
    assert rows["model.layers.0.self_attn.k_proj.weight"] == [3, 13, 23, 33]
    assert "model.layers.1.self_attn.q_proj.weight" in rows


def test_counts_agree_with_the_model(pico_llama: Pico) -> None:
    model = pico_llama(tied=True)
    graph = ls.discover(model)
    assert graph.num_parameters == sum(p.numel() for p in model.parameters())
    assert graph.num_decoder_parameters == sum(p.numel() for p in model.model.layers.parameters())
    assert graph.aliases == {"lm_head.weight": "model.embed_tokens.weight"}


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "down_proj"], ["o_proj", "gate_proj"]])
def test_every_adapter_slice_lands_in_the_group_of_its_base_weight(pico_llama: Pico, targets: Any) -> None:
    plain = ls.discover(pico_llama())
    model = get_peft_model(pico_llama(), LoraConfig(r=3, target_modules=targets))
    graph = ls.discover(model)
    assert [(g.name, g.prunable, g.size, g.role) for g in graph.prunable] == [
        (g.name, g.prunable, g.size, g.role) for g in plain.prunable
    ]
    adapted = {name for name, module in model.named_modules() if hasattr(module, "lora_A")}
    assert adapted
    where = {(m.parameter, m.dim): g for g in graph for m in g.members if not g.name.endswith("head-dim")}
    for path in adapted:
        base_out, base_in = (where[f"{path}.base_layer.weight", dim] for dim in (0, 1))
        assert where[f"{path}.lora_B.default.weight", 0] is base_out
        assert where[f"{path}.lora_A.default.weight", 1] is base_in
        rank = where[f"{path}.lora_A.default.weight", 0]
        assert rank is where[f"{path}.lora_B.default.weight", 1]
        assert (rank.kind, rank.size, rank.prunable) == (Kind.RANK, 3, False)
        assert {m.parameter for m in rank.members} == {f"{path}.lora_{x}.default.weight" for x in "AB"}


def test_a_gate_sits_on_the_adapter_wrapper(pico_llama: Pico) -> None:
    model = get_peft_model(pico_llama(), LoraConfig(r=3, target_modules=["down_proj"]))
    (consumer,) = ls.discover(model)["model.layers.0.mlp:ffn-channels"].consumers
    assert hasattr(model.get_submodule(consumer.module), "lora_A")


def test_real_and_meta_models_give_the_same_groups_and_weights_stay_untouched(pico_llama: Pico) -> None:
    model = pico_llama()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with torch.device("meta"):
        empty = LlamaForCausalLM(model.config)
    names = [[(g.name, g.kind, g.size, g.prunable) for g in ls.discover(m)] for m in (model, empty)]
    assert names[0] == names[1]
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_no_weight_is_read(pico_llama: Pico) -> None:
    """Weights that would poison any computation do not."""
    model = pico_llama()
    for parameter in model.parameters():
        parameter.data.fill_(float("nan"))
    assert len(ls.discover(model).gated) == 6


def test_attention_implementation_and_mode_come_back(pico_llama: Pico) -> None:
    model = pico_llama()
    model.set_attn_implementation("sdpa")
    model.train()
    ls.discover(model)
    assert model.config._attn_implementation == "sdpa"
    assert model.training


def test_another_family_needs_no_code_of_its_own() -> None:
    """Norms inside the heads (Qwen3) do not stand in the way of heads, FFN channels, residual and whole layers."""
    config = Qwen3Config(
        hidden_size=72, intermediate_size=112, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        head_dim=20, vocab_size=97,
    )  # fmt: skip
    with torch.device("meta"):
        graph = ls.discover(Qwen3ForCausalLM(config))
    assert {g.kind for g in graph.gated} == {Kind.HEADS, Kind.QUERY_SLOTS, Kind.CHANNELS}
    assert {g.kind for g in graph.prunable} - {g.kind for g in graph.gated} == {Kind.RESIDUAL, Kind.DEPTH}


def test_single_key_value_head_leaves_the_queries_as_heads() -> None:
    config = LlamaConfig(
        hidden_size=72, intermediate_size=112, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=1,
        head_dim=20, vocab_size=97,
    )  # fmt: skip
    with torch.device("meta"):
        graph = ls.discover(LlamaForCausalLM(config))
    assert graph["model.layers.0.self_attn:heads"].size == 4


class Odd(nn.Module):
    """A model with an operator that has no rule between two linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(19, 6)
        self.up, self.down, self.head = nn.Linear(6, 10), nn.Linear(10, 6), nn.Linear(6, 19)

    def forward(self, input_ids: torch.Tensor, use_cache: bool = False) -> torch.Tensor:  # noqa: ARG002
        hidden = self.up(self.table(input_ids))
        return self.head(self.down(torch.fft.fft(hidden, dim=-1).real))


def test_an_operator_without_a_rule_pins_what_it_touches_and_says_so() -> None:
    graph = ls.discover(Odd())
    (group,) = [g for g in graph if any(m.parameter == "up.weight" and m.dim == 0 for m in g.members)]
    assert not group.prunable
    assert "no rule for" in group.reason
    assert "fft" in group.reason


def test_a_model_that_does_not_take_token_ids_is_refused_with_the_cause() -> None:
    with pytest.raises(ls.ModelError, match="Linear does not run on made-up input_ids alone"):
        ls.discover(nn.Linear(3, 3))


def test_graph_names_the_nearest_group(pico_llama: Pico) -> None:
    with pytest.raises(ls.PlanError, match=r'did you mean "model.layers.1.mlp:ffn-channels"'):
        ls.discover(pico_llama())["model.layers.1.mlp:ffn-chanels"]


def test_heads_that_are_numbered_by_the_code_are_exact_but_not_realisable() -> None:
    """ALiBi: the cut trace keeps the slopes of the heads that stay, the model's own code gives them those of the first."""
    model = BloomForCausalLM(BloomConfig(vocab_size=211, hidden_size=72, n_layer=2, n_head=4))
    (heads,) = [group for group in ls.discover(model) if group.kind is Kind.HEADS]
    assert (heads.exactness, heads.realisable) == (Exactness.EXACT, False)
    assert "arange in transformer" in heads.reason
    checks = [check for check in verify(model).checks if check.kind == "heads"]
    assert checks
    assert all(check.equal and check.effect > 0 for check in checks)
