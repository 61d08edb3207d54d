"""Whole layers as structures."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from transformers import Gemma3ForCausalLM, Gemma3TextConfig, PreTrainedModel

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


class Stack(nn.Module):
    """Layers of which one is no residual branch."""

    def __init__(self, plain: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(residual=at != plain) for at in range(3))
        self.head = nn.Linear(6, 5)

    def forward(self, hidden: Tensor) -> Tensor:
        for layer in self.layers:
            hidden = layer(hidden)
        return self.head(hidden)


class Layer(nn.Module):
    def __init__(self, *, residual: bool) -> None:
        super().__init__()
        self.up, self.down, self.residual = nn.Linear(6, 8), nn.Linear(8, 6), residual

    def forward(self, hidden: Tensor) -> Tensor:
        branch = self.down(torch.relu(self.up(hidden)))
        return hidden + branch if self.residual else branch


@pytest.mark.parametrize(("plain", "exact"), [(9, True), (1, False)])
def test_a_layer_that_does_not_hand_its_input_on_is_none(plain: int, exact: bool) -> None:
    graph = ls.discover(Stack(plain), inputs={"hidden": torch.ones(1, 3, 6)})
    (group,) = [g for g in graph if g.kind is Kind.DEPTH]
    assert group.exact is exact
    assert exact or "layers.1 changes its input" in group.reason
