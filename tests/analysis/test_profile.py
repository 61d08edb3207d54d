"""The knowledge profile against naive probing, and the cost that cached prefixes save."""

from __future__ import annotations

import json
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from lorashear.analysis.prefix import record, replay_starts, replayed
from lorashear.analysis.profile import NATS, Profile, analyze
from lorashear.analysis.saliency import score
from lorashear.config import AnalysisSettings, SaliencySettings
from lorashear.errors import DataError, ModelError, SettingsError
from lorashear.graph.axes import Axis, product
from lorashear.graph.discover import discover
from lorashear.graph.groups import Consumer, Exactness, Graph, Kind, Member, NodeGroup, ParameterInfo

LAYERS, HIDDEN, HEADS, KV, HEAD_DIM, FFN, VOCABULARY = 3, 20, 4, 2, 6, 14, 31
SETTINGS = AnalysisSettings(probe=0.3, windows=3, unprunable=0.34)


@dataclass
class Source:
    name: str
    valid: Tensor


@dataclass
class Data:
    sources: list[Source]


def pico_model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=HIDDEN,
        intermediate_size=FFN,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=KV,
        head_dim=HEAD_DIM,
        vocab_size=VOCABULARY,
        initializer_range=0.4,
    )
    return LlamaForCausalLM(config)


def group(name: str, kind: Kind, layer: int | None, leaf: Axis, *inputs: tuple[str, Axis]) -> NodeGroup:
    """A prunable group of which only the consumers matter here."""
    consumers = tuple(Consumer(module, f"{module}.weight", axis, leaf) for module, axis in inputs)
    members = tuple(Member(c.parameter, 1, False, False, c.axis, leaf) for c in consumers)
    return NodeGroup(name, kind, leaf.size, members, consumers, Exactness.EXACT, True, "", layer, name)


def pico_graph() -> Graph:
    groups, parameters = [], {}
    for i in range(LAYERS):
        kv, ffn = Axis(KV), Axis(FFN)
        features = product([kv, Axis(HEADS // KV), Axis(HEAD_DIM)])
        groups.append(group(f"layers.{i}.heads", Kind.HEADS, i, kv, (f"model.layers.{i}.self_attn.o_proj", features)))
        groups.append(group(f"layers.{i}.ffn", Kind.CHANNELS, i, ffn, (f"model.layers.{i}.mlp.down_proj", ffn)))
        for name in (f"model.layers.{i}.self_attn.o_proj.weight", f"model.layers.{i}.mlp.down_proj.weight"):
            parameters[name] = ParameterInfo(name, (Axis(HIDDEN), ffn), False, True)
    return Graph(tuple(groups), parameters, {}, "model.layers", LAYERS)


@pytest.fixture
def model() -> LlamaForCausalLM:
    return pico_model()


@pytest.fixture
def graph() -> Graph:
    return pico_graph()


@pytest.fixture
def data() -> Data:
    tokens = torch.randint(VOCABULARY, (2, 4, 24), generator=torch.Generator().manual_seed(1))
    return Data([Source("wiki", tokens[0]), Source("math", tokens[1])])


@pytest.fixture
def scores(graph: Graph) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(2)
    return {g.name: torch.rand(g.size, generator=generator) for g in graph}


def loss_of(model: nn.Module, tokens: Tensor) -> float:
    with torch.no_grad():
        return float(model(input_ids=tokens, labels=tokens).loss)


def cut_by_hand(graph: Graph, name: str, structures: list[int], model: nn.Module) -> LlamaForCausalLM:
    """A fresh model whose consumer weights have the structures' columns zeroed: the slow, obvious probe."""
    probed = pico_model()
    probed.load_state_dict(model.state_dict())
    for consumer in graph[name].consumers:
        columns = consumer.rows[structures].flatten()
        probed.get_parameter(consumer.parameter).data[:, columns] = 0
    return probed


def count_layer_runs(model: LlamaForCausalLM) -> list[int]:
    runs: list[int] = []
    for i, layer in enumerate(model.model.layers):
        layer.mlp.register_forward_hook(lambda *_, i=i: runs.append(i))
    return runs


def test_deviations_equal_those_of_weights_zeroed_by_hand(model, graph, data, scores):
    profile = analyze(model, graph, data, scores=scores, settings=SETTINGS, progress=False)

    assert profile.unit == NATS
    assert [entry.group for entry in profile.entries] == [g.name for g in graph]
    for source in data.sources:
        tokens = source.valid[: SETTINGS.windows]
        assert profile.base[source.name] == pytest.approx(loss_of(model, tokens), abs=1e-6)
        for entry in profile.entries:
            removed = scores[entry.group].argsort()[: entry.probed].tolist()
            probed = loss_of(cut_by_hand(graph, entry.group, removed, model), tokens)
            assert entry.deviation[source.name] == pytest.approx(probed - loss_of(model, tokens), abs=2e-6)
            assert entry.deviation[source.name] != 0


def test_probes_remove_at_least_one_structure_and_never_all(model, graph, data, scores):
    probed = {
        share: {
            entry.kind: entry.probed
            for entry in analyze(
                model, graph, data, scores=scores, settings=SETTINGS.model_copy(update={"probe": share}), progress=False
            ).entries
        }
        for share in (0.01, 0.3, 0.99)
    }
    assert probed[0.01] == {Kind.HEADS: 1, Kind.CHANNELS: 1}
    assert probed[0.3] == {Kind.HEADS: 1, Kind.CHANNELS: 4}
    assert probed[0.99] == {Kind.HEADS: KV - 1, Kind.CHANNELS: FFN - 1}


def test_cached_prefixes_change_no_bit_and_cost_half(model, graph, data, scores, monkeypatch):
    runs = count_layer_runs(model)
    cached = analyze(model, graph, data, scores=scores, settings=SETTINGS, progress=False)
    cached_runs = len(runs)

    monkeypatch.setattr("lorashear.analysis.profile.replay_starts", lambda layers, _run: [0] * len(layers))
    runs.clear()
    naive = analyze(model, graph, data, scores=scores, settings=SETTINGS, progress=False)

    assert cached == naive  # floats included: the same operations on the same numbers
    batches, kinds = 1, 2  # both sources share a pass
    assert len(runs) == batches * (LAYERS + kinds * LAYERS * LAYERS)
    trial = LAYERS + LAYERS * (LAYERS - 1) // 2
    assert cached_runs == trial + batches * (LAYERS + kinds * LAYERS * (LAYERS + 1) // 2)


def test_the_result_does_not_depend_on_how_windows_are_batched(model, graph, data, scores, monkeypatch):
    whole = analyze(model, graph, data, scores=scores, settings=SETTINGS, progress=False)
    monkeypatch.setattr("lorashear.analysis.profile.windows_per_pass", lambda _model, _window: 4)  # of both sources
    split = analyze(model, graph, data, scores=scores, settings=SETTINGS, progress=False)
    for a, b in zip(whole.entries, split.entries, strict=True):
        assert a.deviation == pytest.approx(b.deviation, abs=1e-6)


def test_a_group_of_several_consumers_is_removed_at_all_of_them(model, data):
    residual = Axis(HIDDEN)
    both = ("model.layers.2.mlp.gate_proj", residual), ("model.layers.2.mlp.up_proj", residual)
    spanning = group("residual", Kind.RESIDUAL, None, residual, *both)
    graph = Graph((spanning,), {}, {}, "model.layers", LAYERS)
    scores = {"residual": torch.arange(float(HIDDEN))}
    profile = analyze(model, graph, data, scores=scores, settings=SETTINGS, progress=False)

    assert profile["residual"].probed == 6
    tokens = data.sources[0].valid[:3]
    expected = loss_of(cut_by_hand(graph, "residual", list(range(6)), model), tokens) - loss_of(model, tokens)
    assert profile["residual"].deviation["wiki"] == pytest.approx(expected, abs=2e-6)


def test_the_model_is_left_as_it_was(model, graph, data, scores):
    model.train()
    tokens = data.sources[0].valid
    before = loss_of(model, tokens)
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    analyze(model, graph, data, scores=scores, settings=SETTINGS, progress=False)

    assert model.training
    assert loss_of(model, tokens) == before
    assert all(torch.equal(weights[name], value) for name, value in model.state_dict().items())
    assert all("forward" not in module.__dict__ for module in model.modules())
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())


@pytest.mark.filterwarnings("ignore::FutureWarning")  # peft still calls what transformers renames
def test_adapters_are_part_of_the_probed_model(model, graph, data, scores):
    from peft import LoraConfig, get_peft_model

    wrapped = get_peft_model(model, LoraConfig(r=2, target_modules="all-linear"))
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.3)
    adapted = analyze(wrapped, graph, data, scores=scores, settings=SETTINGS, progress=False)
    merged = analyze(wrapped.merge_and_unload(), graph, data, scores=scores, settings=SETTINGS, progress=False)
    for a, b in zip(adapted.entries, merged.entries, strict=True):
        assert a.deviation == pytest.approx(b.deviation, abs=1e-4)


def test_groups_that_cannot_be_probed_have_no_entry(model, graph, data, scores):
    single = group("single", Kind.HEADS, 0, Axis(1), ("model.layers.0.self_attn.o_proj", Axis(HIDDEN)))
    free = NodeGroup("free", Kind.OTHER, 5, (), (), Exactness.EXACT, True, "", 0, "free")
    pinned = NodeGroup("pinned", Kind.OTHER, 5, (), (), Exactness.PINNED, False, "an operator", None, "pinned")
    more = Graph((single, free, pinned, *graph.groups), {}, {}, "model.layers", LAYERS)
    profile = analyze(model, more, data, scores=scores, settings=SETTINGS, progress=False)
    assert [entry.group for entry in profile.entries] == [g.name for g in graph]


def test_the_groups_that_deviate_most_are_unprunable(model, graph, data, scores):
    profile = analyze(model, graph, data, scores=scores, settings=SETTINGS, progress=False)
    ranked = sorted(profile.entries, key=lambda entry: -entry.macro)
    assert profile.unprunable == tuple(entry.group for entry in ranked[:2])  # 34 % of six
    assert ranked[0].macro == pytest.approx(sum(ranked[0].deviation.values()) / 2)


def test_a_metric_of_the_user_takes_the_place_of_the_loss(model, graph, data, scores):
    tokens = data.sources[0].valid
    alone = analyze(
        model, graph, data, scores=scores, settings=SETTINGS, metric=lambda m: loss_of(m, tokens), progress=False
    )
    assert alone.sources == ("metric",)
    assert alone.unit == "metric"
    named = analyze(
        model, graph, data, scores=scores, settings=SETTINGS, metric=lambda m: {"a": loss_of(m, tokens)}, progress=False
    )
    assert [entry.deviation["a"] for entry in named.entries] == [entry.macro for entry in alone.entries]
    removed = scores["layers.1.ffn"].argsort()[:4].tolist()
    expected = loss_of(cut_by_hand(graph, "layers.1.ffn", removed, model), tokens) - loss_of(model, tokens)
    assert alone["layers.1.ffn"].macro == pytest.approx(expected, abs=2e-6)


def test_a_metric_must_name_the_same_sources_each_time(model, graph, data, scores):
    names = iter("abcdefgh")
    with pytest.raises(SettingsError, match=r"metric.*\['b'\].*\['a'\]"):
        analyze(model, graph, data, scores=scores, metric=lambda _: {next(names): 1.0}, progress=False)


def test_a_metric_needs_no_data(model, graph, data, scores):
    tokens = data.sources[0].valid
    with_data = analyze(model, graph, data, scores=scores, metric=lambda m: loss_of(m, tokens), progress=False)
    assert analyze(model, graph, scores=scores, metric=lambda m: loss_of(m, tokens), progress=False) == with_data
    with pytest.raises(SettingsError, match="nothing to measure the model on; give data, or a metric"):
        analyze(model, graph, scores=scores, progress=False)


def test_without_scores_the_smallest_weights_go(pico_llama):
    model = pico_llama()
    graph = discover(model)
    norms = score(model, graph, {}, SaliencySettings(taylor2=0.0, magnitude=1.0))
    tokens = torch.arange(48).view(2, 24)

    def metric(probed):
        return loss_of(probed, tokens)

    by_itself = analyze(model, graph, metric=metric, progress=False)
    assert by_itself == analyze(model, graph, metric=metric, scores=norms, progress=False)


def test_weights_decide_what_knows_most(model, graph, data, scores):
    plain, heavy = (
        analyze(model, graph, data, scores=scores, settings=SETTINGS, weights=weights, progress=False)
        for weights in (None, {"math": 3.0})
    )
    for a, b in zip(plain.entries, heavy.entries, strict=True):
        assert a.deviation == b.deviation
        assert b.macro == pytest.approx((b.deviation["wiki"] + 3 * b.deviation["math"]) / 4)
    ranked = sorted(heavy.entries, key=lambda entry: -entry.macro)
    assert heavy.unprunable == tuple(entry.group for entry in ranked[:2])
    with pytest.raises(SettingsError, match=r'weights: no source "maths" was measured; did you mean "math"'):
        analyze(model, graph, data, scores=scores, weights={"maths": 2.0}, progress=False)
    with pytest.raises(SettingsError, match="one source above 0"):
        analyze(model, graph, data, scores=scores, weights={"math": 0.0, "wiki": 0.0}, progress=False)


def test_half_precision_tells_the_same_story(model, graph, data, scores):
    full, half = (
        analyze(model, graph, data, scores=scores, settings=SETTINGS, dtype=dtype, progress=False)
        for dtype in (None, torch.bfloat16)
    )
    largest = max(abs(entry.macro) for entry in full.entries)
    gaps = [abs(a.macro - b.macro) for a, b in zip(full.entries, half.entries, strict=True)]
    assert 0 < max(gaps) < 0.05 * largest


def test_a_profile_survives_its_file(model, graph, data, scores, tmp_path):
    profile = analyze(model, graph, data, scores=scores, settings=SETTINGS, progress=False)
    profile.save(tmp_path / "profile.json")
    assert Profile.read(tmp_path / "profile.json") == profile


@pytest.mark.parametrize(
    ("text", "why"),
    [(None, "No such file"), ("{", "JSON"), ('{"entries": [], "bases": {}}', "base")],
)
def test_reading_something_else_says_what_and_how(text, why, tmp_path):
    path = tmp_path / "profile.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(DataError, match=rf"profile\.json: not a profile .*{why}.*lorashear analyze"):
        Profile.read(path)


def test_a_profile_file_is_readable_by_anyone(model, graph, data, scores, tmp_path):
    analyze(model, graph, data, scores=scores, settings=SETTINGS, progress=False).save(tmp_path / "p.json")
    entry = json.loads((tmp_path / "p.json").read_text())["entries"][1]
    assert (entry["group"], entry["kind"], entry["layer"], entry["size"]) == ("layers.0.ffn", "ffn-channels", 0, FFN)


def test_mistakes_are_named(model, graph, data, scores):
    with pytest.raises(
        SettingsError, match=r"scores of layers\.0\.heads: none, expected one saliency for each of its 2"
    ):
        analyze(model, graph, data, scores={}, progress=False)
    with pytest.raises(SettingsError, match=r"shape \(3,\)"):
        analyze(model, graph, data, scores={**scores, "layers.1.ffn": torch.ones(3)}, progress=False)
    with pytest.raises(DataError, match="source empty has no held-out window"):
        analyze(model, graph, Data([Source("empty", torch.empty(0, 24))]), scores=scores, progress=False)
    with pytest.raises(DataError, match="no sources"):
        analyze(model, graph, Data([]), scores=scores, progress=False)
    with pytest.warns(UserWarning, match=r"analysis\.windows = 9 is not reached.*'wiki': 4"):
        analyze(model, graph, data, scores=scores, settings=AnalysisSettings(windows=9), progress=False)
    model.lm_head.weight.data[0] = float("nan")
    with pytest.raises(ModelError, match="whole model: the loss on wiki is nan"):
        analyze(model, graph, data, scores=scores, settings=SETTINGS, progress=False)


class Chain(nn.Module):
    """Layers that run in order, where the last may also read what the first wrote elsewhere."""

    def __init__(self, shared: bool, *, twice: bool = False) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Link() for _ in range(4))
        self.shared, self.twice = shared, twice

    def forward(self, x: Tensor) -> Tensor:
        side: dict[str, Tensor] = {}
        for i, layer in enumerate(self.layers):
            x = layer(x, side, writes=i == 1, reads=self.shared and i == 3)[0]
        return self.layers[0](x, side, writes=False, reads=False)[0] if self.twice else x


class Link(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(5, 5)

    def forward(self, x: Tensor, side: dict[str, Tensor], *, writes: bool, reads: bool) -> tuple[Tensor, None]:
        x += self.inner(x)  # in place: a record must not change under the hands of the next layer
        if writes:
            side["kept"] = x
        return (x + side["kept"] if reads else x), None


def test_a_replay_runs_the_later_layers_only():
    chain, x = Chain(shared=False), torch.randn(2, 5)
    expected, outputs = record(chain.layers, lambda: chain(x.clone()))
    runs: list[int] = []
    for i, layer in enumerate(chain.layers):
        layer.inner.register_forward_hook(lambda *_, i=i: runs.append(i))
    for start in range(4):
        for _ in range(2):
            runs.clear()
            with replayed(chain.layers, outputs, start):
                assert torch.equal(chain(x.clone()), expected)
            assert runs == list(range(start, 4))


def test_a_replay_starts_where_side_channels_allow():
    x = torch.randn(2, 5)
    chain = Chain(shared=False)
    assert replay_starts(chain.layers, lambda: chain(x.clone())) == [0, 1, 2, 3]
    sharing = Chain(shared=True)
    with pytest.warns(UserWarning, match=r"layers \[0, 1\] only"):
        assert replay_starts(sharing.layers, lambda: sharing(x.clone())) == [0, 1, 1, 1]


def test_layers_that_run_twice_are_not_replayed():
    chain, x = Chain(shared=False, twice=True), torch.randn(2, 5)
    with pytest.warns(UserWarning, match="once each"):
        assert replay_starts(chain.layers, lambda: chain(x.clone())) == [0, 0, 0, 0]


def test_a_forward_override_is_put_back():
    chain, x = Chain(shared=False), torch.randn(2, 5)
    layer = chain.layers[0]
    own = layer.forward
    layer.forward = own
    _, outputs = record(chain.layers, lambda: chain(x.clone()))
    with replayed(chain.layers, outputs, 2):
        assert layer.forward is not own
    assert layer.forward is own
