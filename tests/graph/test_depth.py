"""Whole layers as structures."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    PreTrainedModel,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

import lorashear as ls
from lorashear.graph.groups import Kind

Pico = Callable[..., PreTrainedModel]
IDS = torch.arange(9).unsqueeze(0)


def test_a_model_without_some_layers_equals_one_where_they_are_zero(pico_llama: Pico, tmp_path: object) -> None:
    model = pico_llama(layers=5).eval()
    graph = ls.discover(model)
    plan = ls.Plan(removed={"model.layers:layers": (0, 3), "model.layers.1.mlp:ffn-channels": (5, 6)})
    zeroed, cut = copy.deepcopy(model), copy.deepcopy(model)
    ls.zero_(zeroed, graph, plan)
    ls.cut_(cut, graph, plan)
    with torch.no_grad():
        torch.testing.assert_close(zeroed(IDS).logits, cut(IDS).logits)
    assert cut.config.num_hidden_layers == 3
    assert [layer.self_attn.layer_idx for layer in cut.model.layers] == [0, 1, 2]
    cut.save_pretrained(str(tmp_path))
    again = ls.load(str(tmp_path))
    with torch.no_grad():
        assert torch.equal(again(IDS).logits, cut(IDS).logits)


def test_lists_of_one_value_a_layer_follow() -> None:
    kinds = ["sliding_attention", "full_attention", "sliding_attention"]
    config = Gemma3TextConfig(
        hidden_size=72, intermediate_size=112, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
        head_dim=20, vocab_size=97, layer_types=kinds, sliding_window=4,
    )  # fmt: skip
    torch.manual_seed(0)
    model = Gemma3ForCausalLM(config).eval()
    graph = ls.discover(model)
    zeroed, cut = copy.deepcopy(model), copy.deepcopy(model)
    plan = ls.Plan(removed={"model.layers:layers": (0,)}, shape="uniform")
    ls.zero_(zeroed, graph, plan)
    ls.cut_(cut, graph, plan)
    assert cut.config.layer_types == kinds[1:]
    with torch.no_grad():
        torch.testing.assert_close(zeroed(IDS).logits, cut(IDS).logits)


def qwen3_moe(**dense: Any) -> PreTrainedModel:
    config = Qwen3MoeConfig(
        hidden_size=72, intermediate_size=20, moe_intermediate_size=16, num_experts=3, num_experts_per_tok=1,
        num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, head_dim=20, vocab_size=97, **dense,
    )  # fmt: skip
    torch.manual_seed(0)
    return Qwen3MoeForCausalLM(config).eval()


@pytest.mark.parametrize(
    ("dense", "gone", "after"), [([0], (0,), []), ([0], (1,), [0]), ([1, 2], (0,), [0, 1]), ([2], (0, 1), [0])]
)
def test_layers_of_two_kinds_stay_what_they_are(
    dense: list[int], gone: tuple[int, ...], after: list[int], tmp_path: Path
) -> None:
    """The norms are rescaled where they belong and the configuration names the dense layers anew, as layers move up."""
    model = qwen3_moe(mlp_only_layers=dense)
    graph = ls.discover(model)
    zeroed, cut = copy.deepcopy(model), copy.deepcopy(model)
    removed = {"model.layers:layers": gone, "model:residual": tuple(range(0, 72, 2))}
    plan = ls.Plan(removed=removed, shape="uniform")
    ls.zero_(zeroed, graph, plan)
    ls.cut_(cut, graph, plan)
    assert cut.config.mlp_only_layers == after
    cut.save_pretrained(tmp_path)
    with torch.no_grad():
        expected = cut(IDS).logits
        torch.testing.assert_close(zeroed(IDS).logits, expected)
        torch.testing.assert_close(AutoModelForCausalLM.from_pretrained(tmp_path)(IDS).logits, expected)


def test_a_configuration_that_cannot_name_the_layers_that_stay_is_refused() -> None:
    model = qwen3_moe(decoder_sparse_step=2)  # every second layer has experts, whichever is gone
    before = model.state_dict().keys()
    with pytest.raises(ls.PlanError, match="without layers 0 the configuration would build others"):
        ls.cut_(model, ls.discover(model), ls.Plan(removed={"model.layers:layers": (0,)}))
    assert model.state_dict().keys() == before


class Stack(nn.Module):
    """Layers of which one may be of another make."""

    def __init__(self, odd: type[Layer]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(odd() if each == 1 else Layer() for each in range(3))
        self.head = nn.Linear(6, 5)

    def forward(self, hidden: Tensor) -> Tensor:
        for layer in self.layers:
            hidden = layer(hidden)
        return self.head(hidden)


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(6, 8), nn.Linear(8, 6)

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden + self.branch(hidden)

    def branch(self, hidden: Tensor) -> Tensor:
        return self.down(torch.relu(self.up(hidden)))


class AddedInPlace(Layer):
    def forward(self, hidden: Tensor) -> Tensor:
        result = hidden.clone()
        result += self.branch(hidden)
        return result


class NoResidual(Layer):
    def forward(self, hidden: Tensor) -> Tensor:
        return self.branch(hidden)


class SomeWrittenInPlace(Layer):
    def forward(self, hidden: Tensor) -> Tensor:
        more = torch.zeros_like(hidden)
        more[..., :3] = hidden[..., :3]
        return hidden + self.branch(hidden) + more


class ChangedInPlace(Layer):
    def forward(self, hidden: Tensor) -> Tensor:
        result = hidden.clone()
        result[..., :3] = 1
        return result + self.branch(hidden)


class DividedByItsLength(Layer):
    """Zero over zero is no zero."""

    def forward(self, hidden: Tensor) -> Tensor:
        branch = self.branch(hidden)
        return hidden + branch / branch.norm(dim=-1, keepdim=True)


class NormedBranch(Layer):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(6)

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden + self.norm(self.branch(hidden))


@pytest.mark.parametrize(
    ("odd", "exact"),
    [
        (Layer, True), (AddedInPlace, True), (NormedBranch, True), (NoResidual, False), (SomeWrittenInPlace, False),
        (ChangedInPlace, False), (DividedByItsLength, False),
    ],
)  # fmt: skip
def test_a_layer_that_does_not_hand_its_input_on_is_none(odd: type[Layer], exact: bool) -> None:
    graph = ls.discover(Stack(odd), inputs={"hidden": torch.ones(1, 3, 6)})
    (group,) = [g for g in graph if g.kind is Kind.DEPTH]
    assert group.exact is exact
    assert exact or "layers.1 changes its input" in group.reason
