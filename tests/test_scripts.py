from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path

import pytest

import lorashear as ls

SCRIPT = Path(__file__).parents[1] / "scripts" / "train_bench_model.py"


def test_a_model_of_another_shape_is_trained_and_loads(
    pico_folder: Path, pico_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shape = ["hidden_size=32", "intermediate_size=48", "num_hidden_layers=2", "num_attention_heads=2",
             "num_key_value_heads=2", "head_dim=16", "tie_word_embeddings=false"]  # fmt: skip
    out = tmp_path / "model"
    options = ["--type", "qwen3", "--out", str(out), "--tokens", str(4 * 16 * 256), "--threads", "1", "--set", *shape]
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), str(pico_folder), str(pico_data), *options])
    runpy.run_path(str(SCRIPT), run_name="__main__")
    model = ls.load(out)
    assert model.config.model_type == "qwen3"
    assert model.config.hidden_size == 32
    assert not model.config.tie_word_embeddings
    report = json.loads((out / "training.json").read_text(encoding="utf-8"))
    assert report["tokens"] == 4 * 16 * 256
    assert report["held_out_perplexity"]["macro"] < model.config.vocab_size  # it learned something
