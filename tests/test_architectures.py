"""The same code on many architectures: a fixed set here, every registered type in the slow run."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import (
    BertConfig,
    BertModel,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
)

import lorashear as ls
from lorashear.config import CompressSettings
from lorashear.data.packing import TokenData, TokenSource
from lorashear.graph.basis import basis_of
from lorashear.graph.groups import Kind
from lorashear.pruning.prune import prune_model
from lorashear.surgery.rotate import rotate_

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


def load_script(name: str) -> ModuleType:
    if str(BENCHMARKS) not in sys.path:  # where a script finds its siblings
        sys.path.append(str(BENCHMARKS))
    spec = importlib.util.spec_from_file_location(f"benchmarks_{name}", BENCHMARKS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


zoo: Any = load_script("zoo")

ALL = "heads ffn-channels residual layers"
EXPECTED = {
    "llama": ALL,
    "qwen3": ALL,  # norms inside the heads
    "mistral": ALL,
    "gemma3_text": ALL,  # 1 + weight, an embedding scale, two kinds of layers
    "phi3": ALL,  # fused qkv and gate_up
    "glm4": ALL,  # partial interleaved rotary, norms after the branches
    "granite": ALL,  # multipliers
    "smollm3": ALL,  # layers without rotary
    "cohere": "heads ffn-channels layers",  # parallel branches, LayerNorm
    "gpt2": "heads ffn-channels layers",  # Conv1D
    "gpt_neox": "heads ffn-channels layers",  # qkv stacked inside each head
    "falcon": "heads ffn-channels layers",  # queries, key and value of a group side by side
    "bloom": "ffn-channels layers",  # ALiBi: the code would number the heads that stay anew
    "mpt": "ffn-channels layers",
    "opt": "heads ffn-channels layers",
    "bert": "heads ffn-channels",
    "gpt_bigcode": "heads ffn-channels layers",  # one key/value head
    "mixtral": f"{ALL} experts",
    "qwen3_moe": f"{ALL} experts",
    "gpt_oss": f"{ALL} experts",  # attention sinks, interleaved gate and up, biases of experts
    "deepseek_v3": f"{ALL} experts latent-channels",  # latent attention, a router with a bias
    "qwen3_next": "heads residual layers experts",  # gated delta nets
    "mamba2": "mixer-channels layers",
    "falcon_mamba": "layers residual",
    "diffllama": "heads",  # values in two halves, each for all heads
    "llama4_text": f"{ALL} experts",  # all experts run, on inputs that are zero but for the chosen ones
    "inkling2_text": "heads experts",  # four values set the heads of two kinds of layers
    "zamba2": "heads",  # layers that share weights
}


def kinds(graph: ls.Graph) -> set[str]:
    return {group.kind.value for group in graph.prunable}


@pytest.mark.parametrize("model_type", EXPECTED)
def test_zeroed_equals_cut_on(model_type: str) -> None:
    model = zoo.tiny_model(model_type)
    graph = ls.discover(model)
    assert set(EXPECTED[model_type].split()) <= kinds(graph)
    result = ls.verify(model, graph, plans=1)
    assert result.equal, [check for check in result.checks if not check.equal]
    assert {check.kind for check in result.checks if check.how == "plain"} >= set(EXPECTED[model_type].split())


WALKED = {  # type -> shape: where the code derives FFN widths from others, layers need widths of their own
    "opt": "uniform",  # flattens batch and positions before its FFN
    "qwen2_moe": "uniform",  # the same, before its shared expert
    "ctrl": "per-layer",  # changes the embedding's output in place
    "gpt2": "uniform",
    "gpt_neox": "uniform",
    "gemma3_text": "uniform",
    "phi3": "uniform",
    "mixtral": "uniform",
    "bloom": "per-layer",
}


@pytest.mark.parametrize("method", ["one-shot", "lhspg"])
@pytest.mark.parametrize(
    "model_type",
    [pytest.param(name, marks=() if name in ("opt", "qwen2_moe") else pytest.mark.slow) for name in WALKED],
)
def test_structures_are_scored_and_walked_to_zero_on(model_type: str, method: str, tmp_path: Path) -> None:
    model = zoo.tiny_model(model_type)
    prune = {"method": method, "ratio": 0.05, "shape": WALKED[model_type], "round_to": 4, "periods": 2}
    settings = CompressSettings.from_mapping(
        {"dtype": "float32", "batch": 4, "micro_batch": 2, "prune": prune, "data": {"calibration_windows": 8}}
    )
    windows = torch.randint(3, 60, (44, 16), generator=torch.Generator().manual_seed(0))
    data = TokenData((TokenSource("a", "text", windows[:40], windows[40:]),), separator_id=0, window=16)
    before = model.num_parameters()
    result = prune_model(model, data, settings=settings, steps=6, out=tmp_path, progress=False)
    assert 1 - result.model.num_parameters() / before == pytest.approx(0.05, abs=0.03)
    assert torch.isfinite(result.model(input_ids=windows[:2]).logits).all()


@pytest.mark.slow
@pytest.mark.parametrize("model_type", sorted(set(zoo.TYPES) - set(zoo.UNUSABLE) - set(EXPECTED)))
def test_nothing_is_silently_wrong_on(model_type: str) -> None:
    coverage: Any = load_script("coverage")
    row = coverage._in_process(zoo, model_type, 1)
    assert "error" not in row, row
    assert not coverage._wrong(row), row


@pytest.mark.parametrize(
    ("model_type", "targets"),
    [
        ("gpt2", ["c_attn", "c_proj", "c_fc"]),
        ("phi3", "all-linear"),
        ("mixtral", ["q_proj", "v_proj", "o_proj"]),
        ("deepseek_v3", ["q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"]),
        ("mamba2", ["in_proj"]),
    ],
)
def test_adapters_change_no_group(model_type: str, targets: Any) -> None:
    """Every adapter's slices land in the groups of the base weights, whatever their layout."""
    plain = ls.discover(zoo.tiny_model(model_type), realisable=False)
    options: dict[str, Any] = {"fan_in_fan_out": True} if model_type == "gpt2" else {}
    adapted = get_peft_model(zoo.tiny_model(model_type), LoraConfig(r=3, target_modules=targets, **options))
    graph = ls.discover(adapted, realisable=False)
    ranks = [group for group in graph if group.kind is Kind.RANK]
    assert ranks
    assert not any(group.exact for group in ranks)
    found = {(group.name, group.size, group.exactness) for group in graph if group.kind is not Kind.RANK}
    assert found == {(group.name, group.size, group.exactness) for group in plain}


def bert() -> tuple[PreTrainedModel, set[str]]:
    config = BertConfig(
        vocab_size=97, hidden_size=72, num_hidden_layers=2, num_attention_heads=4, intermediate_size=112,
        max_position_embeddings=64,
    )  # fmt: skip
    return BertModel(config), {"heads", "ffn-channels"}


def vit() -> tuple[PreTrainedModel, set[str]]:
    config = ViTConfig(
        hidden_size=72, num_hidden_layers=2, num_attention_heads=4, intermediate_size=112, image_size=32, patch_size=16
    )
    return ViTForImageClassification(config), {"heads", "ffn-channels", "layers"}


def t5() -> tuple[PreTrainedModel, set[str]]:
    config = T5Config(vocab_size=97, d_model=72, d_kv=20, d_ff=112, num_layers=2, num_heads=4, decoder_start_token_id=0)
    return T5ForConditionalGeneration(config), {"heads", "ffn-channels"}


@pytest.mark.parametrize("build", [bert, vit, t5])
def test_nothing_in_the_graph_knows_what_a_language_model_is(build: Any) -> None:
    torch.manual_seed(0)
    model, expected = build()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, 0, 0.1)
    result = ls.verify(model.eval(), plans=1)
    assert result.equal
    assert {check.kind for check in result.checks if check.how == "replay"} >= expected - {"layers"}
    assert {check.kind for check in result.checks if check.how == "plain"} >= expected


ROTATED = ["llama", "gemma", "qwen3", "qwen3_moe", "phi3", "deepseek_v3", "mamba", "gpt_oss", "jamba"]


@pytest.mark.parametrize("model_type", ROTATED)
@torch.no_grad()
def test_rotating_the_residual_stream_goes_unnoticed(model_type: str) -> None:
    """With gains and biases of their own, but one number for a gain that no reader can take over (a tied head)."""
    model = zoo.tiny_model(model_type).float().eval()
    graph = ls.discover(model, realisable=False)
    groups = [group for group in graph if group.kind is Kind.RESIDUAL]
    basis = basis_of(graph, max(groups, key=lambda group: len(group.members)))
    generator = torch.Generator().manual_seed(5)
    named = dict(model.named_parameters())
    for parameter in named.values():
        if parameter.dim() == 1:
            parameter.add_(0.2 * torch.rand(parameter.shape, generator=generator))
    for gain in basis.gains:
        if not gain.readers:
            named[gain.parameter].fill_(0.7)
    input_ids = torch.randint(5, 60, (2, 13), generator=generator)
    before = zoo.logits(model(input_ids=input_ids, use_cache=False))
    size = basis.group.size
    rotate_(model, basis, torch.linalg.qr(torch.randn(size, size, generator=generator))[0])
    after = zoo.logits(model(input_ids=input_ids, use_cache=False))
    assert float((after - before).abs().max()) <= 1e-5 * float(before.abs().max())
