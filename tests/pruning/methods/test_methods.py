"""Published criteria on a pico model, against the formulas written out for one layer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

import lorashear as ls
from lorashear.config import CompressSettings, PruneSettings, SaliencySettings
from lorashear.errors import SettingsError
from lorashear.pruning.methods import METHODS, Scoring, method_kinds, probing_method, wants_profile

FFN, HEADS = "model.layers.1.mlp:ffn-channels", "model.layers.1.self_attn:heads"
LAYER = "model.layers.1"
GROUPS, HEAD_DIM, QUERIES = 2, 20, 2  # key/value groups, and query heads in each


@pytest.fixture(scope="module")
def scoring(pico_llama: Callable[..., PreTrainedModel]) -> Scoring:
    model = pico_llama().eval()
    windows = torch.randint(0, 97, (6, 12), generator=torch.Generator().manual_seed(0))
    return Scoring(model, ls.discover(model), windows, 2, None, 0, SaliencySettings())


def inputs_of(scoring: Scoring, path: str) -> Tensor:
    """`(tokens, features)` of a module over the calibration windows."""
    seen: list[Tensor] = []
    hook = scoring.model.get_submodule(path).register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        scoring.model(input_ids=scoring.windows)
    hook.remove()
    return seen[0].flatten(0, 1)


def per_head(features: Tensor) -> Tensor:
    """Features of `o_proj`'s input -> sums over a key/value group's query heads."""
    return features.view(GROUPS, QUERIES * HEAD_DIM).sum(1)


def weight(scoring: Scoring, name: str) -> Tensor:
    return scoring.model.get_submodule(f"{LAYER}.{name}").weight.detach()  # type: ignore[union-attr, return-value, operator]


def gradients(scoring: Scoring) -> dict[str, Tensor]:
    scoring.model.zero_grad()
    scoring.model(input_ids=scoring.windows, labels=scoring.windows).loss.backward()
    found = {name: parameter.grad.clone() for name, parameter in scoring.model.named_parameters()}  # type: ignore[union-attr]
    scoring.model.zero_grad()
    return found


@pytest.mark.parametrize("method", sorted(METHODS.keys() - {"slicegpt", "depth"}))
def test_scores_fit_the_groups_and_leave_the_model_as_it_was(scoring: Scoring, method: str) -> None:
    before = {name: value.clone() for name, value in scoring.model.state_dict().items()}
    scores = METHODS[method].score(scoring)
    assert scores.keys() == {group.name for group in scoring.graph.gated}
    for group in scoring.graph.gated:
        assert scores[group.name].shape == (group.size,)
        assert bool((scores[group.name] >= 0).all())
        assert bool(scores[group.name].isfinite().all())
    assert all(torch.equal(value, before[name]) for name, value in scoring.model.state_dict().items())
    assert all(parameter.requires_grad and parameter.grad is None for parameter in scoring.model.parameters())


def test_wanda_sp(scoring: Scoring) -> None:
    scores = METHODS["wanda-sp"].score(scoring)
    norm = inputs_of(scoring, f"{LAYER}.mlp.down_proj").square().mean(0).sqrt()
    assert torch.allclose(scores[FFN], weight(scoring, "mlp.down_proj").abs().mean(0) * norm, rtol=1e-4)
    norm = inputs_of(scoring, f"{LAYER}.self_attn.o_proj").square().mean(0).sqrt()
    assert torch.allclose(scores[HEADS], per_head(weight(scoring, "self_attn.o_proj").abs().mean(0) * norm), rtol=1e-4)


def test_flap_orders_by_fluctuation(scoring: Scoring) -> None:
    scores = METHODS["flap"].score(scoring)
    for name, consumer, fold in ((FFN, "mlp.down_proj", lambda x: x), (HEADS, "self_attn.o_proj", per_head)):
        variance = inputs_of(scoring, f"{LAYER}.{consumer}").var(0, unbiased=False)
        metric = fold(variance * weight(scoring, consumer).square().sum(0))
        assert scores[name].argsort().tolist() == metric.argsort().tolist()


def test_flap_compares_layers_by_how_far_a_structure_stands_out(scoring: Scoring) -> None:
    """Standardised in its layer: layers whose activations are larger by a factor do not win by that."""
    scores = METHODS["flap"].score(scoring)
    ffn = torch.stack([scores[f"model.layers.{layer}.mlp:ffn-channels"] for layer in range(2)]).double()
    assert torch.allclose(ffn[0].mean(), ffn[1].mean(), rtol=1e-3)
    assert torch.allclose(ffn[0].std(), ffn[1].std(), rtol=1e-3)


def test_taylor_element_and_vector(scoring: Scoring) -> None:
    found = gradients(scoring)
    slices = {"gate_proj": 0, "up_proj": 0, "down_proj": 1}
    products = [
        (weight(scoring, f"mlp.{name}") * found[f"{LAYER}.mlp.{name}.weight"]).movedim(dim, 0)
        for name, dim in slices.items()
    ]
    element, vector = (METHODS[name].score(scoring)[FFN] for name in ("taylor", "taylor-vector"))
    assert torch.allclose(element, torch.stack([p.abs().sum(1) for p in products]).sum(0), rtol=1e-3, atol=1e-7)
    assert torch.allclose(vector, torch.stack([p.sum(1).abs() for p in products]).sum(0), rtol=1e-3, atol=1e-7)


def test_block_influence_is_how_far_a_layer_turns_its_input(pico_llama: Callable[..., PreTrainedModel]) -> None:
    """Against the hidden states that transformers reports; the last ones are those before the final norm."""
    model = pico_llama(layers=3).eval()
    model.model.layers[1].mlp.down_proj.weight.data *= 30
    windows = torch.randint(0, 97, (5, 12), generator=torch.Generator().manual_seed(0))
    scores = METHODS["depth"].score(Scoring(model, ls.discover(model), windows, 2, None, 0, SaliencySettings()))
    assert not any(layer._forward_hooks or layer._forward_pre_hooks for layer in model.model.layers)
    last: list[Tensor] = []
    model.model.norm.register_forward_pre_hook(lambda _, args: last.append(args[0]))
    with torch.no_grad():
        states = [*model(windows, output_hidden_states=True).hidden_states[:-1], last[0]]
    for layer, found in enumerate(scores["model.layers:layers"].tolist()):
        before, after = states[layer].double(), states[layer + 1].double()
        cosine = (before * after).sum(-1) / (before.norm(dim=-1) * after.norm(dim=-1))
        assert found == pytest.approx(1 - float(cosine.mean()), abs=1e-6)
    assert scores["model.layers:layers"].argmax() == 1


def test_the_knowledge_profile_goes_by_scores_of_what_lies_in_the_layers() -> None:
    assert probing_method(PruneSettings(method="flap")).name == "flap"
    assert probing_method(PruneSettings(method="depth")).name == "one-shot"


@pytest.mark.parametrize(
    ("prune", "wanted"),
    [
        ({"method": "lhspg"}, True),
        ({"method": "grasprune"}, True),
        ({"method": "depth"}, False),
        ({"method": "one-shot", "kinds": ["residual"]}, False),
        ({"method": "one-shot", "kinds": ["experts"]}, False),
        ({"method": "one-shot", "kinds": ["experts", "heads"]}, True),
    ],
)
def test_the_profile_decides_nothing_for_what_is_not_inside_the_layers(prune: dict[str, Any], wanted: bool) -> None:
    given = {"prune": {"shape": "per-layer", **prune}, "analysis": {"unprunable": 0.1}}
    assert wants_profile(CompressSettings.from_mapping(given)) is wanted


def test_kinds_are_those_of_the_method() -> None:
    assert "residual" in method_kinds(PruneSettings())
    assert "residual" not in method_kinds(PruneSettings(method="flap"))
    assert method_kinds(PruneSettings(method="slicegpt")) == ("residual",)
    assert method_kinds(PruneSettings(method="depth")) == ("layers",)
    assert method_kinds(PruneSettings(kinds=("heads",))) == ("heads",)
    with pytest.raises(SettingsError, match="slicegpt cannot cut heads"):
        method_kinds(PruneSettings(method="slicegpt", kinds=("heads", "residual")))
    assert "experts" not in method_kinds(PruneSettings(method="one-shot"))
    assert method_kinds(PruneSettings(method="one-shot", kinds=("experts",))) == ("experts",)
    with pytest.raises(SettingsError, match="lhspg cannot cut experts, only heads"):
        method_kinds(PruneSettings(kinds=("heads", "experts")))
    with pytest.raises(SettingsError, match="experts and residual cannot go in one run"):
        method_kinds(PruneSettings(method="one-shot", kinds=("experts", "residual")))
