"""The pruning stage from end to end: the budget is met, the walk's zeros are the plan, stopped is never stopped."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

import lorashear as ls
from lorashear.analysis.saliency import score
from lorashear.config import CompressSettings, PruneSettings, SaliencySettings
from lorashear.data.packing import TokenData, TokenSource
from lorashear.pruning import prune as stage
from lorashear.pruning.gates import StructureGates
from lorashear.pruning.methods import METHODS
from lorashear.pruning.prune import LEAST_STEPS, PeriodChooser, PruneResult, prune_model, walk_steps
from lorashear.surgery.refit import refit_

Pico = Callable[..., PreTrainedModel]
STEPS, WINDOW, BATCH = 8, 10, 4
IN_LAYERS = ("heads", "query-slots", "ffn-channels")
FFN = "model.layers.0.mlp:ffn-channels"
WALKS = [
    ("adapters", "gates", "uniform", False),
    ("adapters", "slices", "per-layer", False),
    ("all", "gates", "per-layer", False),
    ("all", "slices", "uniform", False),
    ("adapters", "gates", "per-layer", True),
    ("all", "gates", "uniform", True),
]


@pytest.fixture(scope="module")
def graph(pico_llama: Pico) -> ls.Graph:
    """Of the model that most tests cut; it knows nothing of the weights."""
    return ls.discover(pico_llama())


@pytest.fixture(autouse=True, scope="module")
def _known_graphs() -> Iterator[None]:
    """Discovery, most of a run's time here, is done once with adapters and once without; tested by itself elsewhere."""
    known: dict[type, ls.Graph] = {}

    def discover(model: Any) -> ls.Graph:
        if type(model) not in known:
            known[type(model)] = ls.discover(model)
        return known[type(model)]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stage, "discover", discover)
        yield


def settings(**prune: Any) -> CompressSettings:
    return CompressSettings.from_mapping(
        {
            "batch": BATCH, "micro_batch": 2, "lora": {"rank": 2}, "data": {"calibration_windows": 4},
            "prune": {
                "ratio": 0.3, "periods": 3, "warmup": 0.25, "round_to": 8, "train": "adapters", "kinds": IN_LAYERS,
                "compensate": False, **prune
            },
        }
    )  # fmt: skip


def data() -> TokenData:
    generator = torch.Generator().manual_seed(7)

    def source(name: str, windows: int) -> TokenSource:
        train, valid = (torch.randint(0, 97, (n, WINDOW), generator=generator) for n in (windows, 2))
        return TokenSource(name, "text", train, valid)

    return TokenData((source("a", 20), source("b", 7)), separator_id=0, window=WINDOW)


def run(model: PreTrainedModel, out: Path, chosen: CompressSettings, **options: Any) -> PruneResult:
    return prune_model(model, data(), settings=chosen, steps=STEPS, out=out, progress=False, **options)


def same_weights(one: PreTrainedModel, other: PreTrainedModel) -> bool:
    pairs = zip(one.named_parameters(), other.named_parameters(), strict=True)
    return all(a == b and torch.equal(x, y) for (a, x), (b, y) in pairs)


def logits(model: PreTrainedModel) -> Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=data().sources[0].valid, use_cache=False).logits


def check_shapes(result: PruneResult, graph: ls.Graph) -> None:
    """The cut model has the planned widths, and `net` is what a count of its parameters gives."""
    result.plan.check(graph)
    expected = {info.name: [axis.size for axis in info.axes] for info in graph.parameters.values()}
    for name, dim, mask in graph.keep_masks(result.plan.removed):
        expected[name][dim] = int(mask.sum())
    assert {name: list(p.shape) for name, p in result.model.named_parameters()} == expected
    left = sum(p.numel() for p in result.model.parameters())
    assert result.net == pytest.approx(1 - left / graph.num_parameters)
    assert result.net == pytest.approx(0.3, abs=0.02)
    for group in graph.gated:
        if group.kind == "ffn-channels":
            assert (group.size - len(result.plan.removed.get(group.name, ()))) % 8 == 0


@pytest.mark.parametrize(("learns", "shrink", "shape", "compensate"), WALKS)
def test_a_walk_ends_at_the_plan_and_is_cut_there(
    pico_llama: Pico,
    graph: ls.Graph,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    learns: str,
    shrink: str,
    shape: str,
    compensate: bool,
) -> None:
    walked: list[PreTrainedModel] = []

    def cut(model: PreTrainedModel, graph: ls.Graph, plan: ls.Plan) -> None:
        walked.append(copy.deepcopy(model))
        ls.cut_(model, graph, plan)

    monkeypatch.setattr(stage, "cut_", cut)
    model = pico_llama()
    dense = copy.deepcopy(model)
    result = run(
        model, tmp_path, settings(train=learns, shrink=shrink, shape=shape, compensate=compensate), checkpoint_every=3
    )
    check_shapes(result, graph)
    assert result.tokens == STEPS * BATCH * WINDOW
    assert result.plan.shape == shape
    zeroed = copy.deepcopy(walked[0])
    ls.zero_(zeroed, graph, result.plan)
    assert same_weights(zeroed, walked[0])
    assert (logits(result.model) - logits(zeroed)).abs().max() <= 1e-5 * logits(zeroed).abs().max()
    assert not same_weights(dense, walked[0])
    assert all(p.requires_grad and p.dtype == torch.float32 for p in result.model.parameters())
    assert not any(module._forward_pre_hooks for module in result.model.modules())


@pytest.mark.parametrize(
    "method", [name for name, each in METHODS.items() if not each.trains and name not in ("slicegpt", "depth")]
)
def test_one_shot_methods_cut_without_training(pico_llama: Pico, graph: ls.Graph, tmp_path: Path, method: str) -> None:
    model = pico_llama()
    dense = copy.deepcopy(model)
    result = run(model, tmp_path, settings(method=method))
    check_shapes(result, graph)
    assert result.tokens == 0
    ls.zero_(dense, graph, result.plan)
    assert (logits(result.model) - logits(dense)).abs().max() <= 1e-5 * logits(dense).abs().max()


def test_depth_takes_out_layers_that_might_as_well_hand_their_input_on(pico_llama: Pico, tmp_path: Path) -> None:
    model = pico_llama(layers=5)
    for layer, factor in enumerate((9.0, 0.2, 5.0, 0.1, 7.0)):
        model.model.layers[layer].mlp.down_proj.weight.data *= factor
        model.model.layers[layer].self_attn.o_proj.weight.data *= factor
    dense = copy.deepcopy(model)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stage, "discover", ls.discover)
        chosen = settings(method="depth", kinds=None, ratio=0.4, ratio_of="decoder", compensate=None)
        result = run(model, tmp_path, chosen)
    assert result.plan.removed == {"model.layers:layers": (1, 3)}
    assert result.net == pytest.approx(0.4)
    assert result.tokens == 0
    assert result.model.config.num_hidden_layers == 3
    for layer in (1, 3):
        dense.model.layers[layer].forward = lambda hidden, *_, **__: hidden
    torch.testing.assert_close(logits(result.model), logits(dense))


@pytest.mark.parametrize("make", ["mixtral", "qwen3_moe"])
@pytest.mark.parametrize("method", ["one-shot", "magnitude"])
@pytest.mark.parametrize("shape", ["uniform", "per-layer"])
def test_whole_experts_go_and_the_rest_is_what_it_was(
    pico_mixture: Pico, tmp_path: Path, make: str, method: str, shape: str
) -> None:
    model = pico_mixture(make, experts=8)
    dense = copy.deepcopy(model)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stage, "discover", ls.discover)
        chosen = settings(method=method, kinds=("experts", "heads"), ratio=0.35, shape=shape, compensate=None)
        result = run(model, tmp_path, chosen)
    removed = {name: rows for name, rows in result.plan.removed.items() if name.endswith(":experts")}
    left = [8 - len(rows) for rows in removed.values()]
    assert result.net == pytest.approx(1 - result.model.num_parameters() / dense.num_parameters())
    assert result.net == pytest.approx(0.35, abs=0.03)
    assert min(left) >= 2
    ls.zero_(dense, ls.discover(dense), ls.Plan(removed=removed))  # no router can choose them
    if len(removed) == len(result.plan.removed):
        torch.testing.assert_close(logits(result.model), logits(dense))
    result.model.save_pretrained(tmp_path / "small")
    again = ls.load(tmp_path / "small")
    torch.testing.assert_close(logits(again), logits(result.model))
    if shape == "uniform":
        assert left[0] == left[1] == again.config.num_local_experts
        assert type(AutoModelForCausalLM.from_pretrained(tmp_path / "small")) is type(dense)


def test_what_is_cut_at_once_is_refit(pico_llama: Pico, graph: ls.Graph, tmp_path: Path) -> None:
    """The plan is that of the dense model; the weights are those that `refit_` finds for it."""
    result = run(pico_llama(), tmp_path, settings(method="wanda-sp", compensate=True))
    dense = pico_llama()
    refit_(dense, graph, result.plan, data().calibration(12), batch=2)
    ls.cut_(dense, ls.discover(dense), result.plan)
    assert torch.allclose(logits(result.model), logits(dense), atol=1e-5)


def test_magnitude_takes_the_smallest(pico_llama: Pico, graph: ls.Graph, tmp_path: Path) -> None:
    model = pico_llama()
    norms = score(model, graph, {}, SaliencySettings(taylor2=0.0, magnitude=1.0))
    removed = run(model, tmp_path, settings(method="magnitude", kinds=("ffn-channels",))).plan.removed
    for name, rows in removed.items():
        assert set(rows) == set(norms[name].argsort()[: len(rows)].tolist())


@pytest.mark.parametrize("method", ["one-shot", "taylor", "flap", "hesso", "depth"])
def test_what_a_source_weighs_steers_every_score(pico_llama: Pico, graph: ls.Graph, method: str) -> None:
    """A source of weight 0 has no say: scores are those of the others alone."""
    a, b = data().sources

    def scores(*sources: TokenSource) -> dict[str, Tensor]:
        given = TokenData(sources, separator_id=0, window=WINDOW)
        return stage.calibration_scores(pico_llama(), graph, given, settings=settings(method=method, kinds=None))

    alone, without_b, both = scores(a), scores(a, dataclasses.replace(b, weight=0.0)), scores(a, b)
    assert all(torch.equal(alone[name], without_b[name]) for name in alone)
    assert not all(torch.equal(alone[name], both[name]) for name in alone)


def test_equal_seeds_give_equal_models_and_others_do_not(pico_llama: Pico, tmp_path: Path) -> None:
    chosen = settings(train="adapters")
    one, two = (run(pico_llama(), tmp_path / name, chosen) for name in ("one", "two"))
    assert one.plan == two.plan
    assert same_weights(one.model, two.model)
    other = run(pico_llama(), tmp_path / "other", chosen.model_copy(update={"seed": 1}))
    assert not (one.plan == other.plan and same_weights(one.model, other.model))


@pytest.mark.parametrize(
    ("learns", "shrink", "shape", "compensate", "epsilon"),
    [(*walk, epsilon) for walk, epsilon in zip(WALKS, (0.0, 0.5, 0.5, 0.0, 0.0, 0.0), strict=True)],
)
def test_killed_and_resumed_is_never_killed(
    pico_llama: Pico,
    tmp_path: Path,
    learns: str,
    shrink: str,
    shape: str,
    compensate: bool,
    epsilon: float,
    kill_at: Any,
) -> None:
    chosen = settings(train=learns, shrink=shrink, shape=shape, compensate=compensate, epsilon=epsilon)
    whole = run(pico_llama(), tmp_path / "whole", chosen)
    # the last checkpoint, of step 5, lies within the second period
    with kill_at(stage, 6), pytest.raises(KeyboardInterrupt):
        run(pico_llama(), tmp_path / "parts", chosen, checkpoint_every=5)
    assert [item.name for item in (tmp_path / "parts/checkpoints/prune").iterdir()] == ["checkpoint-5"]
    parts = run(pico_llama(), tmp_path / "parts", chosen, checkpoint_every=5, resume=True)
    assert parts.plan == whole.plan
    assert same_weights(parts.model, whole.model)


def test_unprunable_groups_stay_whole(pico_llama: Pico, tmp_path: Path) -> None:
    result = run(pico_llama(), tmp_path, settings(ratio=0.15, shape="per-layer"), unprunable=[FFN])
    assert FFN not in result.plan.removed
    assert result.net == pytest.approx(0.15, abs=0.02)


def test_a_ratio_of_the_decoder(pico_llama: Pico, graph: ls.Graph, tmp_path: Path) -> None:
    result = run(pico_llama(), tmp_path, settings(method="random", ratio_of="decoder"))
    lost = graph.num_parameters - sum(p.numel() for p in result.model.parameters())
    assert result.net == pytest.approx(lost / graph.num_decoder_parameters)
    assert result.net == pytest.approx(0.3, abs=0.03)


def test_a_ratio_out_of_reach_is_refused(pico_llama: Pico, tmp_path: Path) -> None:
    with pytest.raises(ls.PlanError, match="cannot be reached"):
        run(pico_llama(), tmp_path, settings(method="random", ratio=0.98))


@pytest.mark.parametrize("shape", ["uniform", "per-layer"])
def test_periods_share_the_budget_and_what_is_gone_stays_gone(
    pico_llama: Pico, monkeypatch: pytest.MonkeyPatch, shape: str
) -> None:
    """Scores that are drawn anew each period would change the widths under what is already gone."""
    model = pico_llama(layers=3)
    graph = ls.discover(model)
    for seed in range(6):
        generator = torch.Generator().manual_seed(seed)

        def scores(*_: Any, generator: torch.Generator = generator) -> dict[str, Tensor]:
            scale = float(10 ** (4 * torch.rand((), generator=generator) - 2.5))
            return {
                group.name: torch.rand(group.size, generator=generator) * (scale if group.size > 9 else 1.0)
                for group in graph.gated
            }

        monkeypatch.setattr(stage, "score", scores)
        gates = StructureGates(model, graph.gated)
        choose = PeriodChooser(model, graph, gates, settings(shape=shape), (), periods=4)
        redundant = {group.name: torch.empty(0, dtype=torch.long) for group in graph.gated}
        for period in range(4):
            for name, rows in choose(period, redundant).items():
                assert not set(rows.tolist()) & set(redundant[name].tolist())
                redundant[name] = torch.cat([redundant[name], rows])
        gates.remove()
        removed = {name: rows.tolist() for name, rows in redundant.items()}
        for group in graph.gated:
            assert group.kind != "ffn-channels" or (group.size - len(removed[group.name])) % 8 == 0
        net = 1 - graph.kept_parameters(removed) / graph.num_parameters
        assert net == pytest.approx(0.3, abs=0.03)


def test_gradients_that_are_no_numbers_are_named(pico_llama: Pico) -> None:
    model = pico_llama()
    graph = ls.discover(model)
    gates = StructureGates(model, graph.gated)
    statistics = gates.statistics()
    statistics[graph.gated[0].name].second.fill_(float("nan"))
    gates.set_statistics(statistics)
    choose = PeriodChooser(model, graph, gates, settings(), (), periods=4)
    with pytest.raises(ls.TrainingError, match="gradients of prune are not finite before period 2"):
        choose(1, {group.name: torch.empty(0, dtype=torch.long) for group in graph.gated})


def test_a_walk_too_short_for_its_periods_says_so(caplog: pytest.LogCaptureFixture) -> None:
    schedule = stage._schedule(PruneSettings(warmup=0.5, periods=5), 6)
    assert (schedule.warmup, schedule.periods, schedule.total) == (3, 3, 6)
    assert "prune.periods = 5 is not applied" in caplog.text


def test_a_budget_too_small_for_a_walk_is_refused() -> None:
    assert walk_steps(PruneSettings(share=0.25), 100) == 25
    assert walk_steps(PruneSettings(share=0.01), LEAST_STEPS) == LEAST_STEPS // 2
    with pytest.raises(ls.SettingsError, match="give more tokens"):
        walk_steps(PruneSettings(), LEAST_STEPS - 1)


@pytest.mark.parametrize(
    ("chosen", "handed"),
    [
        ({"train": "all", "compensate": None}, True),
        ({"train": "all", "compensate": None, "shrink": "slices"}, False),
        ({"train": "all", "compensate": None, "epsilon": 0.1}, False),
        ({"train": "all", "compensate": False}, False),
        ({"train": "adapters", "compensate": None}, False),
        ({"train": "adapters", "compensate": True}, True),
    ],
)
def test_when_a_walk_hands_its_structures_over(
    pico_llama: Pico, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chosen: dict[str, Any], handed: bool
) -> None:
    calls = []
    for name in ("refit_", "compensate_"):
        real = getattr(stage, name)
        monkeypatch.setattr(stage, name, lambda *a, real=real, **o: (calls.append(a), real(*a, **o))[1])
    run(pico_llama(), tmp_path, settings(kinds=("heads", "ffn-channels"), **chosen))
    assert bool(calls) is handed
