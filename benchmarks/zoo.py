"""A tiny, randomly initialised model of every causal-LM type that transformers registers.

    python benchmarks/zoo.py [TYPE ...]

builds every type (or the named ones), each in its own process, runs it on two batches and prints a line a type.

A configuration is the type's default one, shrunk by the names of its keys. The sizes differ wherever the type allows
it, so that no two axes can be taken for each other by their length: hidden 72, 4 heads over 2 key/value heads of 20,
FFN 112, 6 experts of 48, vocabulary 211. A model has one layer of each distinct kind, and at least two.
"""

from __future__ import annotations

import argparse
import time
import warnings
from collections.abc import Mapping
from typing import Any

import torch
import transformers
from apart import ApartError, run_apart
from torch import Tensor
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

TYPES: tuple[str, ...] = tuple(sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES))
UNUSABLE: dict[str, str] = {
    "gemma3n": "its vision tower needs timm",
    "gemma4_assistant": "runs on hidden states and keys of another model",
    "gemma4_unified_assistant": "runs on hidden states and keys of another model",
    "musicgen": "AutoModelForCausalLM gives the decoder the configuration of the whole",
    "musicgen_melody": "AutoModelForCausalLM gives the decoder the configuration of the whole",
}
SHAPES = ((1, 13), (2, 17))  # odd lengths, longer than the windows and chunks below
IDS = (8, 180)  # above the special tokens, below the placeholders for images and sounds
TIMEOUT = 120.0


def _sizes(text: str) -> dict[str, int]:
    """Reads a table in which each number is the size of the keys after it."""
    sizes, size = {}, 0
    for word in text.split():
        if word.isdigit():
            size = int(word)
        else:
            sizes[word] = size
    return sizes


_SIZES = _sizes(
    # the residual stream, and what is projected to or from it
    " 72 hidden_size n_embd d_model embedding_dim emb_dim backbone_hidden_size hidden_size_global adapter_out_dim"
    " 60 embedding_size word_embed_proj_dim input_embedding_size 68 output_embedding_size pronunciation_embed_dim"
    " 76 lru_width shape_embed_dim"
    # feed-forward networks and experts (grouped matrix products want sizes of 16 bytes: 4 floats, or 8 of half size)
    " 112 intermediate_size ffn_dim dff dim_ff ffn_hidden_size feed_forward_size d_inner encoder_ffn_dim decoder_ffn_dim"
    " 100 intermediate_size_mlp dense_intermediate_size 48 moe_intermediate_size expert_ffn_hidden_size"
    " 44 shared_expert_intermediate_size shared_experts_intermediate_size shared_intermediate_size"
    " 44 moe_shared_expert_intermediate_size 6 num_experts n_routed_experts num_local_experts moe_num_experts"
    " 2 num_experts_per_tok num_experts_per_token moe_topk moe_top_k moe_k zero_expert_num"
    " 3 n_shared_experts num_shared_experts moe_num_shared_experts 16 router_hidden_size"
    " 1 n_group topk_group num_expert_group first_k_dense_replace num_dense_layers moe_layer_start_index"
    # depth
    " 2 num_hidden_layers n_layer n_layers num_layers num_blocks num_layers_per_stack encoder_layers decoder_layers"
    " 2 num_encoder_layers num_decoder_layers"
    # attention
    " 4 num_attention_heads n_head n_heads num_heads attention_heads encoder_attention_heads decoder_attention_heads"
    " 4 num_encoder_attention_heads num_decoder_attention_heads swa_num_attention_heads"
    " 2 num_key_value_heads num_kv_heads kv_n_heads swa_num_key_value_heads 12 rotary_dim 22 swa_head_dim"
    " 20 head_dim kv_channels attention_head_size attention_head_dim d_head dim_head query_pre_attn_scalar"
    " 9 sliding_window sliding_window_size local_attention_window_len attention_window_size window_size"
    " 9 local_attention 7 attention_chunk_size chunk_size mamba_chunk_size"
    # latent attention, and the indexer of sparse attention
    " 28 q_lora_rank 24 kv_lora_rank 32 o_lora_rank 2 o_groups"
    " 16 qk_nope_head_dim 10 qk_rope_head_dim 26 qk_head_dim 14 v_head_dim"
    " 8 index_n_heads 22 index_head_dim 5 index_topk 4 index_block_size 2 index_topk_blocks"
    # linear attention, state spaces and short convolutions
    " 2 linear_num_key_heads 4 linear_num_value_heads 3 linear_num_heads 12 linear_key_head_dim"
    " 22 linear_value_head_dim linear_head_dim 12 state_size ssm_state_size mamba_d_state"
    " 8 mamba_n_heads mamba_num_heads n_mamba_heads 18 mamba_d_head mamba_head_dim mamba_headdim 144 mamba_d_ssm"
    " 2 n_groups mamba_n_groups mamba_ngroups 9 time_step_rank mamba_dt_rank"
    " 5 conv_kernel conv_kernel_size mamba_d_conv conv1d_width linear_conv_kernel_dim short_conv_kernel_size"
    # low ranks and parallel streams
    " 11 hidden_size_per_layer_input adapter_rank loop_gate_rank gated_norm_rank hc_lowrank d_rel 13 laurel_rank"
    " 3 altup_num_inputs hc_mult hc_count"
    # vocabularies and positions
    " 211 vocab_size decoder_vocab_size 205 unpadded_vocab_size 199 vocab_size_per_layer_input"
    " 197 shape_vocab_size encoder_hash_byte_group_vocab 193 pronunciation_vocab_size"
    " 128 max_position_embeddings n_positions n_ctx max_seq_len context_length model_max_length"
    " 128 max_target_positions max_source_positions 64 original_max_position_embeddings"
    " 32 position_bias_num_buckets 16 rel_extent 5 prompt_length"
)
_TOWER_SIZES = _SIZES | _sizes(  # the towers for images and sounds are built, but not run
    " 60 hidden_size adapter_in_dim adapter_input_size 96 intermediate_size mlp_dim 32 image_size crop_size"
    " 3 num_attention_heads num_heads num_key_value_heads 16 patch_size 36 output_channels nemo_conv_channels"
    " 40 ext_pw_out_channel depthwise_separable_out_channel"
)
_SPECIAL_TOKENS = _sizes(
    "0 pad_token_id 1 bos_token_id decoder_start_token_id 2 eos_token_id eod_token_id forced_eos_token_id"
    " 3 sep_token_id 4 cls_token_id 5 mask_token_id"
)

# lists with an entry a layer; what else depends on the layer, such as lists of layer numbers, follows from these
_PER_LAYER = (
    "layer_types",
    "mlp_layer_types",
    "layers_block_type",
    "indexer_types",
    "no_rope_layers",
    "activation_sparsity_pattern",
)

# What single types need, by the type of a configuration or of a part of one. First the size of heads, of types that
# read it although their default configuration lacks it (20), or that need the 4 heads to fill the hidden size (18).
_HEAD_DIMS = _sizes(
    " 20 apertus apertus1p5_text bamba cohere cpmant doge dots1 emu3_text_model ernie4_5_moe exaone4 exaone_moe falcon_h1"
    " 20 flex_olmo glm4_moe granite granite_swa granitemoe granitemoe_swa granitemoehybrid granitemoeshared"
    " 20 hunyuan_v1_dense hunyuan_v1_moe jamba lfm2 lfm2_moe minimax ministral mixtral nanochat nemotron olmo olmo2 olmo3"
    " 20 olmo_hybrid phi phi3 phi4_multimodal phimoe qwen2 qwen2_moe qwen3_moe smollm3 starcoder2"
    " 18 blt_global_transformer blt_local_decoder blt_patcher helium mamba2"
)
_QWEN: dict[str, Any] = {"rope_parameters": {"partial_rotary_factor": 0.6, "mrope_section": [3, 2, 1]}}
_COMPASS = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [5, 3, 2]}
_ZAMBA = _sizes("4 num_hidden_layers 144 attention_hidden_size 36 attention_head_dim") | {
    "layers_block_type": ["linear_attention", "hybrid"] * 2  # twice, as hybrid layers share a block
}
_OVERRIDES: dict[str, dict[str, Any]] = {
    # keys that are None or absent by default
    "dbrx": {"attn_config": {"rope_theta": 1e4, "clip_qkv": 8.0}},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "dots1": {"n_routed_experts": 6, "n_shared_experts": 3, "num_experts_per_tok": 2},
    "nemotron": {"num_key_value_heads": 2},
    "qwen4_exp_text": _QWEN
    | _sizes("8 indexer_n_heads 1 indexer_kv_heads 18 indexer_head_dim 9 indexer_budget 3 indexer_compress_ratio"),
    "xmod": {"default_language": "en_XX"},
    # both kinds of layer, where the first two are alike
    "bamba": {"attn_layer_indices": [1]},
    "flint": {"mlp_only_layers": [0]},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "lfm2": {"layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "recurrent_gemma": {"block_types": ["recurrent", "attention"]},
    # sizes of some of the layers
    "dots3_note_text": _sizes(
        "3 swa_num_attention_heads swa_num_key_value_heads 30 swa_q_lora_rank 22 swa_kv_lora_rank"
        " 32 swa_head_dim 20 swa_qk_nope_head_dim 18 swa_v_head_dim"
    ),
    "gemma4_text": {"global_head_dim": 28},
    "gemma4_unified_text": {"global_head_dim": 28},
    "laguna": {"num_attention_heads_per_layer": [4, 8]},
    # heads that come in two halves: with two key/value heads there would be one in each
    "diffllama": _sizes("8 num_attention_heads 4 num_key_value_heads"),
    "zaya": _sizes("8 num_attention_heads 4 num_key_value_heads 1 num_experts_per_tok"),
    # values bound to others
    "cohere_compass_text": {"rope_parameters": {"full_attention": _COMPASS}},
    "deepseek_v4": {"compress_rates": {"compressed_sparse_attention": 5, "heavily_compressed_attention": 7}}
    | {"index_topk": 2},
    "dory": _sizes("3 num_hidden_layers 1 n_input_layers n_recurrent_layers n_output_layers")
    | {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"]},
    "gemma3n_text": {"num_kv_shared_layers": 2},
    "mamba2": {"num_heads": 8},
    "minimax": {"block_size": 7},
    "qwen3_5_moe_text": _QWEN,
    "qwen3_5_text": _QWEN,
    "reformer": _sizes("7 local_attn_chunk_length lsh_attn_chunk_length 4 num_buckets")
    | {"attn_layers": ["local", "lsh"], "axial_pos_embds_dim": [30, 42], "axial_pos_shape": [8, 16]},
    "rwkv": {"attention_hidden_size": 80},
    "xlnet": {"d_head": 18},
    "zamba": _ZAMBA,
    "zamba2": _ZAMBA,
}


def tiny_config(model_type: str) -> PreTrainedConfig:
    """The default configuration of `model_type`, shrunk, as a decoder without a cache."""
    kind = CONFIG_MAPPING[model_type]
    return kind(**_shrink(kind().to_dict(), _SIZES))


def tiny_model(model_type: str, *, seed: int = 0) -> PreTrainedModel:
    """A float32 model of `model_type` in evaluation mode, with weights large enough for its logits to vary.

    Matrices are drawn anew, vectors (norms, biases) keep what they start with plus some noise, and frozen parameters
    stay as they are: they are constants, such as sinusoids.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = tiny_config(model_type)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager")
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad and parameter.dim() > 1:
                parameter.normal_(std=0.1, generator=generator)
            elif parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.05)
    return model.eval()


def logits(output: Any) -> Tensor:
    """The logits in what a model of any type returned."""
    found: Tensor = output.logits if hasattr(output, "logits") else output[0]
    return found


def _shrink(default: Mapping[str, Any], sizes: Mapping[str, int]) -> dict[str, Any]:
    """The keyword arguments of a tiny configuration, from all of a default one's."""
    small = _shrink_layers(default)
    placeholder = sizes["vocab_size"]
    for key, value in default.items():
        if key in small or value is None:
            continue
        if key in ("use_cache", "is_decoder"):
            small[key] = key == "is_decoder"
        elif key in _SPECIAL_TOKENS:
            small[key] = _SPECIAL_TOKENS[key]
        elif key.endswith(("_token_id", "_token_index")):
            placeholder -= 1
            small[key] = placeholder
        elif key in sizes and value:  # 0 stays 0: it says that the type lacks the thing
            small[key] = sizes[key]
        elif key.endswith(("dropout", "pdrop")) and value:
            small[key] = 0.0
        elif key == "rope_parameters":
            small[key] = _shrink_rope(value)
        elif key.endswith("_config") and key != "per_layer_config":  # that one is derived from the rest
            small[key] = _shrink(value, _TOWER_SIZES if key in ("vision_config", "audio_config") else sizes)
            if value.get("model_type"):
                small[key]["model_type"] = value["model_type"]
    if "qk_rope_head_dim" in small:  # latent attention
        if "num_key_value_heads" in small:
            small["num_key_value_heads"] = sizes["num_attention_heads"]
        for key in ("qk_rope_head_dim", "qk_head_dim"):  # `head_dim` repeats one of them
            if "head_dim" in small and default["head_dim"] == default.get(key):
                small["head_dim"] = sizes[key]
    kind = default.get("model_type", "")
    if kind in _HEAD_DIMS:
        small["head_dim"] = _HEAD_DIMS[kind]
    return _merge(small, _OVERRIDES.get(kind, {}))


def _shrink_layers(default: Mapping[str, Any]) -> dict[str, Any]:
    """One layer of each combination in the lists by layer, at least two; nothing where there is no such list."""
    lists = {key: default[key] for key in _PER_LAYER if isinstance(default.get(key), list) and default[key]}
    if not lists:
        return {}
    kinds = list(dict.fromkeys(zip(*lists.values(), strict=True)))
    kinds *= 1 if len(kinds) > 1 else 2
    depth = {"num_hidden_layers": len(kinds)} if "num_hidden_layers" in default else {}
    return depth | {key: list(column) for key, column in zip(lists, zip(*kinds, strict=True), strict=True)}


def _shrink_rope(default: Mapping[str, Any]) -> dict[str, Any]:
    small = dict(default)
    for key, value in default.items():
        if isinstance(value, dict):
            small[key] = _shrink_rope(value)
        elif key == "partial_rotary_factor" and value < 1:
            small[key] = 0.6  # an even number of channels, of 18 as well as of 20
        elif key == "factor":
            small[key] = 2.0  # from 64 to 128 positions
        elif key in _SIZES:
            small[key] = _SIZES[key]
    return small


def _merge(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in changes.items():
        nested = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merge(merged[key], value) if nested else value
    return merged


def main() -> None:
    """Builds and runs the types named on the command line, or all."""
    parser = argparse.ArgumentParser(description="Builds and runs a tiny model of each causal-LM type.")
    parser.add_argument("types", nargs="*", metavar="TYPE", help="all where none is named")
    types = parser.parse_args().types or TYPES
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    start = time.monotonic()
    passed = 0
    for model_type in types:
        try:
            line = run_apart(_check, model_type, timeout=TIMEOUT)
        except ApartError as error:
            line = f"error  {error}"
        passed += line.startswith("ok")
        print(f"{model_type:26}{line}", flush=True)
    print(f"{passed} of {len(types)} ok, {time.monotonic() - start:.0f} s")


def _check(model_type: str) -> str:
    start = time.monotonic()
    try:
        model = tiny_model(model_type)
        stored = model.config.to_dict()
        if type(model.config).from_dict(stored).to_dict() != stored:
            raise ValueError("the configuration changes on its way through a dict")
        for shape in SHAPES:
            ids = torch.randint(*IDS, shape, generator=torch.Generator().manual_seed(0))
            with torch.no_grad():
                found = logits(model(input_ids=ids))
            if found.shape[:2] != shape or not found.isfinite().all():
                raise ValueError(f"logits of {tuple(found.shape)} for a batch of {shape}, or not finite")
        count = sum(parameter.numel() for parameter in model.parameters())
        return f"ok     {count:>9,} parameters {time.monotonic() - start:5.1f} s"
    except Exception as error:
        return "error  " + UNUSABLE.get(model_type, f"{type(error).__name__}: {' '.join(str(error).split())}")


if __name__ == "__main__":
    main()
