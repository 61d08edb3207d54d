"""`verify`: what it compares, what it says, and that it finds a cut that is wrong."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM, MixtralConfig, MixtralForCausalLM, PreTrainedModel

import lorashear as ls
from lorashear.verify import MODULE_RUNS

module = sys.modules["lorashear.verify"]  # the name in the package is the function
Pico = Callable[..., PreTrainedModel]


def lively(model: PreTrainedModel) -> PreTrainedModel:
    """Weights large enough for every structure to matter."""
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data.normal_(0, 0.1, generator=generator)
        else:
            parameter.data.uniform_(0.5, 1.5, generator=generator)
    return model.eval()


def test_every_kind_of_a_llama_is_proved_by_replay_and_on_the_model(pico_llama: Pico) -> None:
    result = ls.verify(lively(pico_llama()), plans=2)
    assert result.equal
    ways = {(check.kind, check.how) for check in result.checks}
    for kind in ("heads", "query-slots", "ffn-channels", "residual", "all kinds"):
        assert {(kind, how) for how in ("replay", "replay, batch of 2", *MODULE_RUNS)} <= ways
    assert ("layers", "cache") in ways
    assert all(check.effect > 1e-3 for check in result.checks)
    assert set(result.not_checked) == {"head-dim"}
    assert 0.9 < result.prunable_share < 1


def test_experts_of_a_mixture_are_barred_and_cut() -> None:
    config = MixtralConfig(
        hidden_size=72, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        head_dim=20, vocab_size=97, num_local_experts=6, num_experts_per_tok=2,
    )  # fmt: skip
    model = lively(MixtralForCausalLM(config))
    graph = ls.discover(model)
    experts = graph["model.layers.0.mlp:experts"]
    assert (experts.size, experts.minimum, experts.settings) == (6, 2, ("num_local_experts",))
    result = ls.verify(model, graph, plans=1)
    assert result.equal
    assert {check.how for check in result.checks if check.kind == "experts"} >= {"replay", "plain", "cache"}
    with pytest.raises(ls.PlanError, match="at least 2 have to stay"):
        ls.cut_(model, graph, ls.Plan(removed={experts.name: range(5)}))


def test_a_barred_expert_is_never_chosen() -> None:
    config = MixtralConfig(
        hidden_size=72, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=97, num_local_experts=4, num_experts_per_tok=2,
    )  # fmt: skip
    model = lively(MixtralForCausalLM(config))
    tokens = torch.arange(16).unsqueeze(0)
    ls.zero_(model, ls.discover(model), ls.Plan(removed={"model.layers.0.mlp:experts": (0, 3)}))
    chosen: list[torch.Tensor] = []
    router = model.get_submodule("model.layers.0.mlp.gate")
    router.register_forward_hook(lambda _module, _args, out: chosen.append(out[2]))
    with torch.no_grad():
        model(tokens)
    assert set(chosen[0].flatten().tolist()) == {1, 2}


def test_a_wrong_cut_is_found(pico_llama: Pico, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(model: LlamaForCausalLM, graph: ls.Graph, plan: ls.Plan) -> None:
        ls.cut_(model, graph, plan)
        model.model.layers[0].input_layernorm.weight.data.mul_(1.1)

    monkeypatch.setattr(module, "cut_", broken)
    result = ls.verify(lively(pico_llama()), plans=1)
    assert not result.equal
    assert all(check.equal for check in result.checks if check.how == "replay")


def test_the_model_is_left_as_it_was(pico_llama: Pico) -> None:
    model = lively(pico_llama())
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    ls.verify(model, plans=1)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not any(each._forward_hooks for each in model.modules())


def test_a_model_without_weights_is_refused() -> None:
    with torch.device("meta"):
        model = MixtralForCausalLM(MixtralConfig(num_hidden_layers=1))
    with pytest.raises(ls.ModelError, match="has no weights"):
        ls.verify(model)


def test_too_little_memory_leaves_the_replay(pico_llama: Pico, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_room_for_copies", lambda _model: False)
    result = ls.verify(lively(pico_llama()), plans=1)
    assert result.equal
    assert not {check.how for check in result.checks} & set(MODULE_RUNS)
    assert "too little memory" in result.not_checked["heads"]


def test_verification_survives_as_plain_data(pico_llama: Pico) -> None:
    from lorashear.reporting.tables import verification_json, verification_table

    result = ls.verify(lively(pico_llama()), plans=1)
    described = json.loads(json.dumps(verification_json(result)))
    assert described["equal"] is True
    assert len(described["checks"]) == len(result.checks)
    assert verification_table(result).row_count == len({check.kind for check in result.checks})


def test_the_command_prints_and_exits(pico_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from lorashear import cli

    cli.verify(str(pico_folder), plans=1)
    assert "zeroed and cut models are equal" in capsys.readouterr().out
