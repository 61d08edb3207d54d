"""What the terminal shows of a model, a profile and a result, and the node groups as JSON."""

from __future__ import annotations

import json

import pytest
import torch
from rich.console import Console, RenderableType
from transformers import LlamaConfig, LlamaForCausalLM

from lorashear.analysis.profile import Profile, ProfileEntry
from lorashear.config import AnalysisSettings
from lorashear.graph.discover import discover
from lorashear.graph.groups import Graph
from lorashear.reporting.tables import ResultRow, groups_json, groups_table, profile_table, result_table

LAYERS, HIDDEN, HEADS, KV, HEAD_DIM, FFN, VOCABULARY = 3, 20, 4, 2, 6, 14, 31
LAYER = 2 * HIDDEN * HEADS * HEAD_DIM + 2 * HIDDEN * KV * HEAD_DIM + 3 * HIDDEN * FFN + 2 * HIDDEN
WHOLE = LAYERS * LAYER + 2 * VOCABULARY * HIDDEN + HIDDEN


@pytest.fixture(scope="module")
def graph() -> Graph:
    with torch.device("meta"):
        return discover(
            LlamaForCausalLM(
                LlamaConfig(
                    hidden_size=HIDDEN,
                    intermediate_size=FFN,
                    num_hidden_layers=LAYERS,
                    num_attention_heads=HEADS,
                    num_key_value_heads=KV,
                    head_dim=HEAD_DIM,
                    vocab_size=VOCABULARY,
                )
            )
        )


def shown(table: RenderableType, width: int = 200) -> str:
    console = Console(width=width)
    with console.capture() as capture:
        console.print(table)
    return capture.get()


def line_with(text: str, *words: str) -> list[str]:
    """Cells of the one line that holds all the words."""
    (line,) = [line for line in text.splitlines() if all(word in line for word in words)]
    return [cell.strip() for cell in line.strip("│┃ ").replace("┃", "│").split("│")]


def test_equal_groups_of_all_layers_are_one_row(graph):
    text = shown(groups_table(graph))
    name, structures, each, share, prunable = line_with(text, "ffn-channels")
    assert (name, structures, prunable) == ("model.layers.{0-2}.mlp: ffn-channels", f"3 x {FFN}", "yes")
    assert each == str(3 * HIDDEN)
    assert share == f"{100 * LAYERS * FFN * 3 * HIDDEN / WHOLE:.1f} %"
    assert f"{LAYERS} decoder layers" in text


@pytest.mark.parametrize("width", [80, 140])
def test_each_reason_is_said_once_below_the_groups_table_by_number(graph, width):
    text = shown(groups_table(graph), width)
    assert all(len(line) <= width for line in text.splitlines())
    verdict, number = line_with(text, "lm_head")[-1].split()
    assert verdict == "no"
    assert line_with(text, f"{number} ", "output") == [f"{number} reaches the model's output"]
    reasons = {group.reason for group in graph if group.reason}
    numbered = [line.split()[0] for line in text.splitlines() if line.lstrip().startswith("(")]
    assert numbered == [f"({at})" for at in range(1, len(reasons) + 1)]


def test_a_narrow_terminal_breaks_the_names_of_groups_between_words(graph):
    text = shown(groups_table(graph), width=80)
    cells = [line.strip("│ ").split("│")[0].strip() for line in text.splitlines() if "self_attn" in line]
    assert set(cells) == {"model.layers.{0-2}.self_attn:"}


def test_groups_for_machines_carry_every_group_and_member(graph):
    found = groups_json(graph)
    assert json.loads(json.dumps(found)) == found
    assert found["parameters"] == WHOLE
    assert found["decoder_parameters"] == LAYERS * LAYER
    assert [entry["name"] for entry in found["groups"]] == [group.name for group in graph]
    channels = next(entry for entry in found["groups"] if entry["kind"] == "ffn-channels" and entry["layer"] == 1)
    assert channels["size"] == FFN
    assert channels["prunable"]
    members = {(member["parameter"], member["dim"]) for member in channels["members"]}
    mlp = "model.layers.1.mlp"
    assert members == {(f"{mlp}.gate_proj.weight", 0), (f"{mlp}.up_proj.weight", 0), (f"{mlp}.down_proj.weight", 1)}
    assert all(entry["reason"] for entry in found["groups"] if not entry["prunable"])


def test_parameters_per_structure_are_those_that_a_cut_saves(graph):
    for entry in groups_json(graph)["groups"]:
        saved = graph.num_parameters - graph.kept_parameters({entry["name"]: [0]})
        assert entry["parameters_per_structure"] == saved, entry["name"]


def test_the_prunable_share_keeps_one_structure_of_every_group(graph):
    removed = {group.name: list(range(1, group.size)) for group in graph.gated}
    share = groups_json(graph)["gated_share"]
    assert share == pytest.approx(1 - graph.kept_parameters(removed) / WHOLE)
    left = LAYERS * (4 * HIDDEN * HEAD_DIM + 3 * HIDDEN + 2 * HIDDEN) + 2 * VOCABULARY * HIDDEN + HIDDEN
    assert share == pytest.approx(1 - left / WHOLE)
    assert share < groups_json(graph)["prunable_share"] < 1


def profile_of(sources: list[str]) -> Profile:
    entries = []
    for layer in range(3):
        deviation = {source: layer + k / 10 for k, source in enumerate(sources)}
        macro = sum(deviation.values()) / len(deviation)
        entries.append(
            ProfileEntry(
                group=f"layers.{layer}[x]",
                kind="heads",
                layer=layer,
                size=8,
                probed=2,
                deviation=deviation,
                macro=macro,
            )
        )
    return Profile(
        entries=tuple(entries),
        base=dict.fromkeys(sources, 2.5),
        unprunable=("layers.2[x]",),
        settings=AnalysisSettings(),
    )


def test_the_profile_is_sorted_by_what_is_lost():
    text = shown(profile_table(profile_of(["wiki", "math"])))
    rows = [line for line in text.splitlines() if "layers." in line]
    assert [next(i for i in range(3) if f"layers.{i}[x]" in row) for row in rows] == [2, 1, 0]
    cells = line_with(text, "layers.2[x]")
    assert cells == ["layers.2[x]", "2 of 8", "+2.050", "+2.000", "+2.100", "unprunable"]
    assert "2.500 nats/token" in text


def test_many_sources_show_the_extremes_only():
    text = shown(profile_table(profile_of(["wiki", "math", "code", "web", "chat"])))
    assert line_with(text, "layers.1[x]")[2:5] == ["+1.200", "chat +1.400", "wiki +1.000"]


DENSE = ResultRow(
    label="dense",
    parameters=135_000_000,
    bytes_on_disk=269_000_000,
    perplexity={"wiki": 20.0},
    macro_perplexity=9.0,
    prefill_tokens_per_second=1234.0,
)
PRUNED = ResultRow(label="pruned", parameters=108_000_000, perplexity={"wiki": 30.0, "math": 40000.0})


def test_results_stand_side_by_side_with_the_change():
    text = shown(result_table([DENSE, PRUNED]))
    assert line_with(text, "dense") == ["dense", "pruned"]
    assert line_with(text, "parameters")[1:] == ["135 M", "108 M (-20.0%)"]
    assert line_with(text, "size on disk")[1:] == ["269 MB", "-"]
    assert line_with(text, "perplexity, wiki")[1:] == ["20.00", "30.00"]
    assert line_with(text, "perplexity, math")[1:] == ["-", "4.0e+04"]
    assert line_with(text, "prefill (tokens/s)")[1:] == ["1,234", "-"]
    assert "decode" not in text


def test_a_single_model_is_a_result_too():
    assert line_with(shown(result_table([PRUNED])), "parameters")[1:] == ["108 M"]
