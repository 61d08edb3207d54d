"""Saved models load again with the same logits: plain ones with stock code alone, others with `lorashear.load`."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

import lorashear as ls
from lorashear.models import load_config_model
from lorashear.surgery.saving import save

Pico = Callable[..., PreTrainedModel]
TOKENS = torch.arange(9).unsqueeze(0)


def pruned(model: PreTrainedModel, shape: str) -> PreTrainedModel:
    graph = ls.discover(model)
    generator = torch.Generator().manual_seed(0)
    scores = {g.name: torch.rand(g.size, generator=generator) * (1 + (g.layer or 0)) for g in graph.gated}
    cut = copy.deepcopy(model)
    ls.cut_(cut, graph, ls.plan(graph, ratio=0.4, shape=shape, scores=scores))
    return cut.eval()


STOCK = """
import sys, torch
from transformers import AutoModelForCausalLM
torch.set_num_threads(int(sys.argv[3]))  # sums in another order would not be bit-equal
model = AutoModelForCausalLM.from_pretrained(sys.argv[1]).eval()
tokens = torch.arange(9).unsqueeze(0)
torch.save({"logits": model(tokens).logits.detach(),
            "answers": model.generate(tokens, max_new_tokens=6, do_sample=False, pad_token_id=0)}, sys.argv[2])
assert "lorashear" not in sys.modules
"""


@pytest.mark.parametrize("tied", [True, False])
def test_uniform_loads_in_a_process_that_has_never_heard_of_lorashear(
    pico_llama: Pico, tmp_path: Path, tied: bool
) -> None:
    cut = pruned(pico_llama(tied=tied), "uniform")
    save(cut, None, tmp_path / "model")
    arguments = [tmp_path / "model", tmp_path / "out.pt", str(torch.get_num_threads())]
    subprocess.run([sys.executable, "-c", STOCK, *arguments], check=True, timeout=120)
    out = torch.load(tmp_path / "out.pt", weights_only=True)
    with torch.no_grad():
        assert torch.equal(out["logits"], cut(TOKENS).logits)
    assert torch.equal(out["answers"], cut.generate(TOKENS, max_new_tokens=6, do_sample=False, pad_token_id=0))
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["intermediate_size"] == cut.model.layers[0].mlp.gate_proj.weight.shape[0]
    assert "lorashear" not in config


@pytest.mark.parametrize("tied", [True, False])
def test_per_layer_comes_back_from_safetensors_and_config_alone(pico_llama: Pico, tmp_path: Path, tied: bool) -> None:
    cut = pruned(pico_llama(tied=tied), "per-layer")
    widths = {tuple(layer.mlp.gate_proj.weight.shape) for layer in cut.model.layers}
    assert len(widths) > 1
    save(cut, None, tmp_path)
    again = ls.load(tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(again(TOKENS).logits, cut(TOKENS).logits)
    assert torch.equal(
        again.generate(TOKENS, max_new_tokens=6, do_sample=False, pad_token_id=0),
        cut.generate(TOKENS, max_new_tokens=6, do_sample=False, pad_token_id=0),
    )
    assert not [path for path in tmp_path.iterdir() if path.suffix in {".bin", ".pt", ".pkl", ".py"}]
    save(again, None, tmp_path / "twice")
    with torch.no_grad():
        assert torch.equal(ls.load(tmp_path / "twice").eval()(TOKENS).logits, cut(TOKENS).logits)


def test_stock_code_refuses_the_per_layer_shape_instead_of_loading_rubbish(pico_llama: Pico, tmp_path: Path) -> None:
    save(pruned(pico_llama(), "per-layer"), None, tmp_path)
    with pytest.raises(RuntimeError, match=r"size mismatch|mismatched"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_load_reads_an_ordinary_folder_too_and_names_a_missing_one(pico_llama: Pico, tmp_path: Path) -> None:
    model = pico_llama().eval()
    save(model, None, tmp_path / "plain")
    with torch.no_grad():
        assert torch.equal(ls.load(tmp_path / "plain").eval()(TOKENS).logits, model(TOKENS).logits)
    with pytest.raises(ls.ModelError, match=r"no config\.json"):
        ls.load(tmp_path / "nowhere")


def test_a_per_layer_model_is_inspected_from_its_config_alone(pico_llama: Pico, tmp_path: Path) -> None:
    cut = pruned(pico_llama(), "per-layer")
    save(cut, None, tmp_path)
    (tmp_path / "model.safetensors").unlink()
    empty, _ = load_config_model(tmp_path)
    assert {name: (p.shape, p.device.type) for name, p in empty.named_parameters()} == {
        name: (p.shape, "meta") for name, p in cut.named_parameters()
    }
