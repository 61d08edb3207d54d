"""The worked example of docs/how-it-works.md is what the code does."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

from peft import LoraConfig, get_peft_model
from transformers import PreTrainedModel

import lorashear as ls

DOCUMENT = Path(__file__).parents[2] / "docs" / "how-it-works.md"


def test_the_axes_in_the_document_are_those_of_the_trace(pico_llama: Callable[..., PreTrainedModel]) -> None:
    text = DOCUMENT.read_text(encoding="utf-8").split("### A worked example")[1].split("```mermaid")[0]
    rows = re.findall(r"^\| `(\w+)` \| (?:`([\w.]*)` )?\| `(.*)` \|$", text, re.MULTILINE)
    assert len(rows) == 12
    graph = ls.discover(get_peft_model(pico_llama(), LoraConfig(r=3, target_modules=["q_proj"])), realisable=False)
    assert graph.inference is not None
    start = "base_model.model.model.layers.0.self_attn"
    found = [
        (node.name, node.module.removeprefix(start).removeprefix("."), repr(graph.inference.dims[node.outs[0]]))
        for node in graph.inference.trace.nodes
        if node.module.startswith(start)
    ]
    at = 0
    for row in rows:  # in the order of the run
        at = found.index(row, at) + 1


def test_the_structures_in_the_document_are_those_of_the_graph(pico_llama: Callable[..., PreTrainedModel]) -> None:
    graph = ls.discover(get_peft_model(pico_llama(), LoraConfig(r=3, target_modules=["q_proj"])), realisable=False)
    rows = {
        kind: {
            m.parameter.split("self_attn.")[1]: m.rows[0].tolist()
            for m in graph[f"model.layers.0.self_attn:{kind}"].members
        }
        for kind in ("heads", "query-slots")
    }
    heads, slots = rows["heads"], rows["query-slots"]
    assert heads["q_proj.base_layer.weight"] == heads["q_proj.lora_B.default.weight"] == list(range(40))
    assert heads["k_proj.weight"] == heads["v_proj.weight"] == list(range(20))
    assert heads["o_proj.weight"] == list(range(40))
    assert slots["q_proj.base_layer.weight"] == slots["o_proj.weight"] == [*range(20), *range(40, 60)]
