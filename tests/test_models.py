from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertForMaskedLM, LlamaConfig, PreTrainedModel, PreTrainedTokenizerFast

import lorashear as ls
from lorashear import models
from lorashear.errors import ModelError
from lorashear.models import (
    check_vocabulary,
    check_weights,
    fitting_dtype,
    load_config_model,
    load_model,
    num_bytes_on_disk,
)

Build = Callable[..., PreTrainedModel]
INPUT_IDS = torch.arange(1, 13).view(1, 12)


@pytest.fixture(scope="module")
def saved(pico_llama: Build, pico_tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    pico_llama().save_pretrained(folder)
    pico_tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def copy(saved: Path, tmp_path: Path) -> Path:
    """A copy of the checkpoint, to be broken."""
    return Path(shutil.copytree(saved, tmp_path / "copy"))


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def logits(model: PreTrainedModel) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=INPUT_IDS).logits


def test_a_folder_loads_as_it_was_saved(saved: Path, pico_llama: Build) -> None:
    loaded = load_model(saved)
    assert not loaded.gguf
    assert loaded.source == str(saved)
    assert not loaded.model.training
    assert loaded.tokenizer.convert_tokens_to_ids("<|endoftext|>") == 0
    assert torch.equal(logits(loaded.model), logits(pico_llama().eval()))


def test_dtype(saved: Path) -> None:
    assert load_model(str(saved), dtype=torch.bfloat16).model.dtype == torch.bfloat16
    assert load_model(str(saved)).model.dtype == torch.float32


def test_weights_that_do_not_fit_in_float32_are_to_be_bfloat16(
    saved: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    parameters = load_model(saved).model.num_parameters()
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    for device, trains, bytes_each in ((cpu, True, 4), (gpu, True, 8), (gpu, False, 4)):
        wanted = bytes_each * parameters
        monkeypatch.setattr(models, "available_bytes", lambda _, wanted=wanted: int(wanted / 0.7) + 2)
        assert fitting_dtype(saved, device, trains=trains) == torch.float32
        monkeypatch.setattr(models, "available_bytes", lambda _, wanted=wanted: int(wanted / 0.7) - 2)
        with caplog.at_level("INFO"):
            assert fitting_dtype(saved, device, trains=trains) == torch.bfloat16
    assert "weights are held in bfloat16" in caplog.text
    # what goes to another device passes through main memory
    monkeypatch.setattr(models, "available_bytes", lambda device: 2 * parameters if device == cpu else 2**40)
    assert fitting_dtype(saved, gpu) == torch.bfloat16
    monkeypatch.setattr(models, "available_bytes", lambda _: 2 * parameters - 1)
    with pytest.raises(ModelError, match=r"GiB of weights in bfloat16, and 0\.0 GiB of memory are free"):
        fitting_dtype(saved, cpu)


def test_a_config_alone_is_enough_for_the_meta_device(saved: Path, tmp_path: Path) -> None:
    shutil.copy(saved / "config.json", tmp_path)
    model, config = load_config_model(tmp_path)
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    assert config.intermediate_size == 112
    with pytest.raises(ModelError, match=r"no \*\.safetensors in this folder; `inspect` and `plan` need none"):
        load_model(tmp_path)


def test_bytes_on_disk(saved: Path) -> None:
    size = num_bytes_on_disk(saved)
    assert size == sum(item.stat().st_size for item in saved.iterdir())
    assert num_bytes_on_disk(saved / "config.json") == (saved / "config.json").stat().st_size


def test_widths_of_their_own_in_every_layer(
    pico_llama: Build, pico_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    model = pico_llama().eval()
    graph = ls.discover(model)
    scores = {group.name: torch.arange(group.size) + 1000.0 * (group.layer or 0) for group in graph.gated}
    ls.cut_(model, graph, ls.plan(graph, ratio=0.2, shape="per-layer", scores=scores))
    model.save_pretrained(tmp_path)
    pico_tokenizer.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["lorashear"]["shape"] == "per-layer"
    loaded = load_model(tmp_path)
    assert loaded.model.dtype == torch.float32
    assert torch.equal(logits(loaded.model), logits(model))
    weights = load_file(tmp_path / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match=r"1 parameters of LlamaForCausalLM.*model\.layers\.1\.mlp\.up_proj\.weight"):
        load_model(tmp_path)
    meta, _ = load_config_model(tmp_path)
    assert [(p.shape, p.device.type) for p in meta.parameters()] == [(p.shape, "meta") for p in model.parameters()]


def test_missing_models(tmp_path: Path, saved: Path) -> None:
    with pytest.raises(ModelError, match="no such folder or file"):
        load_model(tmp_path / "nothing")
    with pytest.raises(ModelError, match="no such folder or file"):
        load_model("./nothing")
    with pytest.raises(ModelError, match="no such local folder, and as a hub id: its configuration cannot be read"):
        load_model("lorashear-tests/nothing")
    with pytest.raises(ModelError, match="this is another file"):
        load_model(saved / "config.json")


def test_a_folder_without_config_gets_a_hint(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"no config.json in this folder; give a folder"):
        load_model(tmp_path)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    with pytest.raises(ModelError, match=r"did you mean .*model\?"):
        load_model(tmp_path)
    (tmp_path / "a.gguf").write_text("")
    with pytest.raises(ModelError, match=r"give the file: .*a\.gguf"):
        load_model(tmp_path)


@pytest.mark.parametrize(
    "text", ["{", "[1]", "{}", '{"model_type": "unheard-of"}', '{"model_type": "llama", "hidden_size": "x"}']
)
def test_a_broken_config(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ModelError, match="configuration cannot be read"):
        load_config_model(tmp_path)


def test_a_config_that_builds_nothing(copy: Path) -> None:
    edit_config(copy, hidden_act="no-such-function")
    with pytest.raises(ModelError, match=r"no model can be built from its configuration: .*no-such-function"):
        load_config_model(copy)


@pytest.mark.parametrize(("key", "value"), [("num_attention_heads", 0), ("hidden_act", "zork"), ("hidden_size", -3)])
def test_a_config_of_impossible_values(copy: Path, key: str, value: object) -> None:
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {key: value}))
    with pytest.raises(ModelError, match="configuration"):
        load_config_model(copy)


def test_weights_of_other_sizes_than_the_config_says(copy: Path) -> None:
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"intermediate_size": 100}))
    with pytest.raises(ModelError, match=r"layers\.0\.mlp\..* in the checkpoint, its configuration says .*100"):
        load_model(copy)


def test_no_name() -> None:
    with pytest.raises(ModelError, match="no model was named"):
        load_model("")


def test_models_of_another_kind(tmp_path: Path, copy: Path) -> None:
    BertForMaskedLM(
        BertConfig(hidden_size=8, intermediate_size=12, num_hidden_layers=1, num_attention_heads=2, vocab_size=20)
    ).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="BertForMaskedLM is no causal language model"):
        load_model(tmp_path)
    edit_config(copy, quantization_config={"quant_method": "gptq", "bits": 4})
    with pytest.raises(ModelError, match=r"quantised \(gptq\).*prune the original checkpoint"):
        load_model(copy)


def test_pickled_weights_are_refused(copy: Path) -> None:
    (copy / "model.safetensors").rename(copy / "pytorch_model.bin")
    with pytest.raises(ModelError, match=r"pickled \(pytorch_model.bin\).*save_pretrained"):
        load_model(copy)


def test_an_incomplete_checkpoint(copy: Path) -> None:
    weights = load_file(copy / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, copy / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match=r"1 parameters of LlamaForCausalLM.*model\.layers\.1\.mlp\.up_proj\.weight"):
        load_model(copy)


def test_a_missing_tokenizer(copy: Path) -> None:
    (copy / "tokenizer.json").unlink()
    with pytest.raises(ModelError, match=r"no tokenizer that can be read; put tokenizer\.json"):
        load_model(copy)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_weights_that_are_no_numbers(copy: Path, value: float) -> None:
    weights = load_file(copy / "model.safetensors")
    weights["model.layers.0.self_attn.v_proj.weight"][3, 5] = value
    save_file(weights, copy / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match=r"model\.layers\.0\.self_attn\.v_proj\.weight holds .*(nan|inf)"):
        load_model(copy)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_large_finite_weights_pass(pico_llama: Build, dtype: torch.dtype) -> None:
    model = pico_llama().to(dtype)
    with torch.no_grad():
        model.lm_head.weight.fill_(torch.finfo(dtype).max)  # the sum overflows, the extremes do not
    check_weights(model)


def test_ids_beyond_the_embedding(copy: Path, pico_tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer = type(pico_tokenizer).from_pretrained(copy)
    tokenizer.add_tokens(["lorashear", "shears"])
    tokenizer.save_pretrained(copy)
    with pytest.raises(ModelError, match=r"ids up to 98 .*has 97 rows; 2 tokens .*resize_token_embeddings\(99\)"):
        load_model(copy)


def test_an_idle_special_token_beyond_the_embedding_warns(saved: Path, pico_llama: Build) -> None:
    tokenizer = load_model(saved).tokenizer
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    with pytest.warns(UserWarning, match="97 rows; 1 tokens have none; they are special"):
        check_vocabulary(pico_llama(), tokenizer)
    tokenizer.pad_token = "<image>"
    with pytest.raises(ModelError, match="1 tokens have none; give the tokenizer"):
        check_vocabulary(pico_llama(), tokenizer)


def write_gguf(path: Path, model: PreTrainedModel, tokenizer: Any) -> None:
    """Float32 GGUF of a Llama, as llama.cpp's converter lays it out."""
    config: LlamaConfig = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("pico")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    backend = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    tokens = sorted(backend["vocab"], key=backend["vocab"].get)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([gguf.TokenType.CONTROL] + [gguf.TokenType.NORMAL] * (len(tokens) - 1))
    writer.add_token_merges([" ".join(merge) for merge in backend["merges"]])
    writer.add_eos_token_id(0)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, weight in model.state_dict().items():
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(name.split(".")[-2])
        array = weight.numpy()
        if heads is not None:  # (heads, two halves, half, in): rotary pairs lie side by side in llama.cpp
            array = array.reshape(heads, 2, -1, array.shape[-1]).swapaxes(1, 2).reshape(array.shape)
        writer.add_tensor(names.get_name(name, (".weight",)), np.ascontiguousarray(array))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_a_gguf_file_loads_and_saves_as_a_plain_checkpoint(
    pico_llama: Build, pico_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    path = tmp_path / "pico.gguf"
    model = pico_llama().eval()
    write_gguf(path, model, pico_tokenizer)
    loaded = load_model(path)
    assert loaded.gguf
    torch.testing.assert_close(logits(loaded.model), logits(model))
    text = "The quick brown fox reads the keys."
    assert loaded.tokenizer(text)["input_ids"] == pico_tokenizer(text)["input_ids"]
    assert loaded.tokenizer.eos_token == "<|endoftext|>"

    loaded.model.save_pretrained(tmp_path / "plain")
    loaded.tokenizer.save_pretrained(tmp_path / "plain")
    again = load_model(tmp_path / "plain")
    assert torch.equal(logits(again.model), logits(loaded.model))
    assert again.tokenizer(text)["input_ids"] == loaded.tokenizer(text)["input_ids"]

    meta, config = load_config_model(path)
    assert config.head_dim == 20
    assert [p.shape for p in meta.parameters()] == [p.shape for p in loaded.model.parameters()]


def test_a_broken_gguf_file(tmp_path: Path) -> None:
    (tmp_path / "a.gguf").write_bytes(b"not a gguf file" * 9)
    with pytest.raises(ModelError, match=r"a\.gguf: its configuration cannot be read"):
        load_model(tmp_path / "a.gguf")


def test_weights_that_end_too_early_are_refused(pico_folder: Path, tmp_path: Path) -> None:
    """A download that was cut off."""
    broken = Path(shutil.copytree(pico_folder, tmp_path / "broken"))
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    with pytest.raises(ls.ModelError, match="its weights cannot be read"):
        load_model(broken)
