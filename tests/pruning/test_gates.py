"""Structure gates: gate 0 is a zeroed structure, and the metered derivative is the true one."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, OPTConfig, PreTrainedModel, Qwen2MoeConfig

import lorashear as ls
from lorashear.graph.axes import Axis
from lorashear.graph.groups import Consumer, Exactness, Kind, NodeGroup
from lorashear.pruning.gates import StructureGates, fold_gates_, gate_statistics

Pico = Callable[..., PreTrainedModel]
TOKENS = torch.randint(0, 97, (4, 9), generator=torch.Generator().manual_seed(0))


def build(pico_llama: Pico, lora: bool) -> Any:
    model: Any = pico_llama()
    if lora:
        model = get_peft_model(model, LoraConfig(r=3, target_modules="all-linear", init_lora_weights=False))
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data.normal_(0, 0.15)
    return model.eval()


def group_of(graph: ls.Graph, kind: str) -> ls.NodeGroup:
    return next(group for group in graph.gated if group.kind == kind)


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("kind", ["heads", "query-slots", "ffn-channels"])
def test_gate_0_equals_zeroed_slices(pico_llama: Pico, lora: bool, kind: str) -> None:
    model = build(pico_llama, lora)
    graph = ls.discover(model)
    group = group_of(graph, kind)
    zeroed = copy.deepcopy(model)
    ls.zero_(zeroed, graph, ls.Plan(removed={group.name: (1,)}))
    gates = StructureGates(model, graph.gated)
    with torch.no_grad():
        whole = model(TOKENS).logits
        gates.set_(group.name, torch.tensor([1]), 0.0)
        gated = model(TOKENS).logits
        expected = zeroed(TOKENS).logits
        assert (gated - expected).abs().max() <= 1e-5 * expected.abs().max()
        assert (gated - whole).abs().max() > 1e-3 * whole.abs().max()
        gates.set_(group.name, torch.tensor([1]), 1.0)
        assert torch.equal(model(TOKENS).logits, whole)
        gates.remove()
        assert torch.equal(model(TOKENS).logits, whole)


def derivatives_by_finite_differences(model: Any, graph: ls.Graph, group: ls.NodeGroup) -> torch.Tensor:
    """`(samples, structures)`: the slow obvious version; norms and softmax stay float32, so it is good to about 1e-4."""
    gates = StructureGates(model, graph.gated)
    step = 2.0**-10  # exact in the gates' float32
    result = torch.zeros(len(TOKENS), group.size, dtype=torch.float64)
    for structure in range(group.size):
        for sample, tokens in enumerate(TOKENS):
            losses = []
            for value in (1 + step, 1 - step):
                gates.set_(group.name, torch.tensor([structure]), value)
                with torch.no_grad():
                    losses.append(cross_entropy(model(tokens[None]).logits[0, :-1], tokens[1:]))
            gates.set_(group.name, torch.tensor([structure]), 1.0)
            result[sample, structure] = (losses[0] - losses[1]) / (2 * step)
    gates.remove()
    return result


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("kind", ["heads", "query-slots"])
def test_metered_derivatives_are_the_true_ones(pico_llama: Pico, lora: bool, kind: str) -> None:
    model = build(pico_llama, lora).double()
    graph = ls.discover(model)
    group = group_of(graph, kind)
    expected = derivatives_by_finite_differences(model, graph, group)
    found = gate_statistics(model, graph.gated, TOKENS, batch=2)[group.name]
    assert found.samples == len(TOKENS)
    torch.testing.assert_close(found.first.double(), expected.sum(0), rtol=1e-2, atol=1e-3)
    torch.testing.assert_close(found.second.double(), expected.square().sum(0), rtol=1e-2, atol=1e-4)


def test_statistics_do_not_depend_on_the_micro_batch_or_accumulation(pico_llama: Pico) -> None:
    model = build(pico_llama, False)
    graph = ls.discover(model)
    name = group_of(graph, "ffn-channels").name
    one, four = (gate_statistics(model, graph.gated, TOKENS, batch=batch)[name] for batch in (1, 4))
    torch.testing.assert_close(one.second, four.second)
    gates = StructureGates(model, graph.gated)
    gates.accumulation = 2
    with gates.metered():
        for part in TOKENS.split(2):
            (model(part, labels=part).loss / 2).backward()
    torch.testing.assert_close(gates.statistics()[name].second, four.second)
    gates.remove()


@pytest.mark.parametrize("make", ["opt", "qwen2_moe"])
def test_layers_that_flatten_batch_and_positions(make: str) -> None:
    """OPT's FFN and Qwen2-MoE's shared expert see `(batch * seq, features)`: samples are told apart all the same."""
    torch.manual_seed(0)
    config: Any = (
        OPTConfig(hidden_size=24, ffn_dim=40, num_hidden_layers=1, num_attention_heads=2, vocab_size=97, dropout=0.0,
                  word_embed_proj_dim=24, max_position_embeddings=32)
        if make == "opt"
        else Qwen2MoeConfig(hidden_size=24, shared_expert_intermediate_size=40, moe_intermediate_size=16, num_experts=4,
                            num_experts_per_tok=2, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2,
                            vocab_size=97)
    )  # fmt: skip
    model: Any = AutoModelForCausalLM.from_config(config).eval()
    graph = ls.discover(model)
    name = next(group.name for group in graph.gated if group.size == 40)
    one, four = (gate_statistics(model, graph.gated, TOKENS, batch=batch)[name] for batch in (1, 4))
    assert one.samples == four.samples == len(TOKENS)
    assert float(one.second.min()) > 0.0
    torch.testing.assert_close(one.second, four.second, rtol=1e-3, atol=1e-9)


def test_bfloat16_autocast_gives_about_the_same(pico_llama: Pico) -> None:
    model = build(pico_llama, True)
    graph = ls.discover(model)
    exact = gate_statistics(model, graph.gated, TOKENS, batch=4)
    rough = gate_statistics(model, graph.gated, TOKENS, batch=4, dtype=torch.bfloat16)
    for name, each in exact.items():
        assert rough[name].second.dtype == torch.float32
        error = (rough[name].second - each.second).abs().sum() / each.second.sum()
        assert 0 < error < 0.1


def test_gates_and_meters_work_together(pico_llama: Pico) -> None:
    """With a gate below 1 the meter shows gate times d loss / d gate."""
    model = build(pico_llama, False)
    graph = ls.discover(model)
    group = group_of(graph, "ffn-channels")
    scaled = copy.deepcopy(model)
    scaled.model.layers[0].mlp.down_proj.weight.data[:, 5] *= 0.25
    gates = StructureGates(model, graph.gated)
    gates.set_(group.name, torch.tensor([5]), 0.25)
    with gates.metered():
        model(TOKENS, labels=TOKENS).loss.backward()
    found, expected = gates.statistics()[group.name], gate_statistics(scaled, graph.gated, TOKENS, batch=4)
    torch.testing.assert_close(found.first, expected[group.name].first, rtol=1e-3, atol=1e-5)
    with torch.no_grad():  # not metered: nothing flows back
        model(TOKENS)
    assert gates.statistics()[group.name].samples == len(TOKENS)
    gates.remove()


def test_consumers_of_one_tensor_are_metered_apart() -> None:
    """A hook on a tensor sees the gradients of all that take it in."""

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.left, self.right, self.other = (nn.Linear(6, 3) for _ in range(3))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return (self.left(x).square() + self.right(x) + self.other(x)).mean()

    torch.manual_seed(0)
    model, axis = Two(), Axis(6)
    consumers = tuple(Consumer(name, f"{name}.weight", axis, axis) for name in ("left", "right"))
    group = NodeGroup("g", Kind.CHANNELS, 6, (), consumers, Exactness.EXACT, True, "", 0, "g")
    x = torch.randn(2, 4, 6, requires_grad=True)
    gates = StructureGates(model, [group])
    with gates.metered():
        model(x).backward()
    gates.remove()
    factor = torch.ones(6, requires_grad=True)
    loss = (model.left(x * factor).square() + model.right(x * factor) + model.other(x)).mean()
    loss.backward()
    found = gates.statistics()["g"]
    assert found.samples == 2
    torch.testing.assert_close(found.first / found.samples, factor.grad)


def test_folded_gates_give_what_the_gates_gave(pico_llama: Pico) -> None:
    """Heads and query slots meet in one consumer."""
    model = build(pico_llama, False)
    graph = ls.discover(model)
    generator = torch.Generator().manual_seed(1)
    values = {group.name: torch.rand(group.size, generator=generator) + 0.5 for group in graph.gated}
    gates = StructureGates(model, graph.gated)
    with torch.no_grad():
        whole = model(TOKENS).logits
        gates.follow(values)
        gated = model(TOKENS).logits
        gates.remove()
        fold_gates_(model, graph, values)
        assert torch.allclose(model(TOKENS).logits, gated, rtol=1e-4, atol=1e-5)
        assert not torch.allclose(gated, whole, atol=1e-3)


def test_followed_gates_have_gradients(pico_llama: Pico) -> None:
    """Those that the meter sums up, at gate 1."""
    model = build(pico_llama, False)
    graph = ls.discover(model)
    metered = gate_statistics(model, graph.gated, TOKENS, batch=4)
    gates = StructureGates(model, graph.gated)
    values = {group.name: torch.ones(group.size, requires_grad=True) for group in graph.gated}
    gates.follow(values)
    model(TOKENS, labels=TOKENS).loss.backward()
    gates.remove()
    for name, value in values.items():
        torch.testing.assert_close(value.grad, metered[name].first / len(TOKENS), rtol=1e-3, atol=1e-6)


def test_a_group_without_a_consumer_is_refused(pico_llama: Pico) -> None:
    group = NodeGroup("g", Kind.CHANNELS, 6, (), (), Exactness.EXACT, True, "", 0, "g")
    with pytest.raises(ls.ModelError, match="no consumer"):
        StructureGates(pico_llama(), [group])


def test_metering_leaves_the_model_as_it_was(pico_llama: Pico) -> None:
    model = build(pico_llama, True)
    flags = [parameter.requires_grad for parameter in model.parameters()]
    before = [parameter.clone() for parameter in model.parameters()]
    graph = ls.discover(model)
    gate_statistics(model, graph.gated, TOKENS, batch=2)
    assert [parameter.requires_grad for parameter in model.parameters()] == flags
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_earlier_statistics_can_be_made_to_count_less(pico_llama: Pico) -> None:
    model = build(pico_llama, False)
    graph = ls.discover(model)
    statistics = gate_statistics(model, graph.gated, TOKENS, batch=4)
    gates = StructureGates(model, graph.gated)
    gates.set_statistics(statistics, share=0.5)
    name = graph.gated[0].name
    faded = gates.statistics()[name]
    assert faded.samples == 2
    torch.testing.assert_close(faded.first / faded.samples, statistics[name].first / statistics[name].samples)
