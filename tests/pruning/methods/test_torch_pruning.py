"""Criteria beside those of an installed peer, Torch-Pruning, on the same weights and gradients.

Its `reduction="sum"` without a normaliser adds up what the weights of a group say. Its magnitude is the square of our norm;
its Taylor terms are ours, element by element or, where `multivariable`, one a parameter.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

import lorashear as ls
from lorashear.config import SaliencySettings
from lorashear.pruning.methods import METHODS, Scoring


@pytest.fixture(scope="module")
def peer() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip("torch_pruning")


@pytest.fixture(scope="module")
def scoring(pico_llama: Callable[..., PreTrainedModel]) -> Scoring:
    model = pico_llama().eval()
    windows = torch.randint(0, 97, (6, 12), generator=torch.Generator().manual_seed(0))
    return Scoring(model, ls.discover(model), windows, 6, None, 0, SaliencySettings())


@pytest.fixture(scope="module")
def peer_groups(peer: Any, scoring: Scoring) -> dict[str, Any]:
    """Our group's name -> all FFN channels of a layer, with the gradients of the calibration windows in the weights."""
    model: Any = scoring.model
    model.config.use_cache = False
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        graph = peer.DependencyGraph().build_dependency(
            model, example_inputs=scoring.windows[:1], output_transform=lambda output: output.logits, verbose=False
        )
    return {
        f"model.layers.{at}.mlp:ffn-channels": graph.get_pruning_group(
            layer.mlp.gate_proj, peer.prune_linear_out_channels, list(range(layer.mlp.gate_proj.out_features))
        )
        for at, layer in enumerate(model.model.layers)
    }


def theirs(scoring: Scoring, groups: dict[str, Any], importance: Any) -> dict[str, Tensor]:
    scoring.model.zero_grad()
    scoring.model(input_ids=scoring.windows, labels=scoring.windows).loss.backward()
    try:
        return {name: importance(group) for name, group in groups.items()}
    finally:
        scoring.model.zero_grad()


@pytest.mark.parametrize("method", ["magnitude", "taylor", "taylor-vector"])
def test_ffn_channels_rank_as_in_torch_pruning(
    peer: Any, scoring: Scoring, peer_groups: dict[str, Any], method: str
) -> None:
    plain = {"group_reduction": "sum", "normalizer": None}
    importance = {
        "magnitude": lambda: peer.importance.GroupMagnitudeImportance(p=2, **plain),
        "taylor": lambda: peer.importance.GroupTaylorImportance(multivariable=False, **plain),
        "taylor-vector": lambda: peer.importance.GroupTaylorImportance(multivariable=True, **plain),
    }[method]()
    expected = theirs(scoring, peer_groups, importance)
    scores = METHODS[method].score(scoring)
    ours = {name: scores[name].square() if method == "magnitude" else scores[name] for name in expected}
    joined, wanted = torch.cat(list(ours.values())), torch.cat(list(expected.values()))
    torch.testing.assert_close(joined / joined.mean(), wanted / wanted.mean(), rtol=1e-3, atol=1e-5)
    for name, each in expected.items():
        assert ours[name].argsort().tolist() == each.argsort().tolist()


def test_the_criteria_are_told_apart(peer: Any, scoring: Scoring, peer_groups: dict[str, Any]) -> None:
    """So that the test above could fail."""
    element, vector = (
        theirs(
            scoring,
            peer_groups,
            peer.importance.GroupTaylorImportance(multivariable=multi, group_reduction="sum", normalizer=None),
        )
        for multi in (False, True)
    )
    scores = METHODS["taylor"].score(scoring)
    for name in element:
        assert scores[name].argsort().tolist() != vector[name].argsort().tolist()
