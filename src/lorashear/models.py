"""Models by name: a local folder, a GGUF file or a hub id, checked before any work is spent on them."""

from __future__ import annotations

import json
import logging
import re
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PretrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from lorashear.devices import USABLE, available_bytes
from lorashear.errors import ModelError, SettingsError, first_line

logger = logging.getLogger(__name__)

_HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")
_PICKLES = ("*.bin", "*.pt", "*.pth")
# what the configurations and modelling code of hundreds of architectures raise over a file that is not as they expect
_BROKEN = (
    *(OSError, ValueError, LookupError, TypeError, AttributeError, RuntimeError, ImportError),
    *(ArithmeticError, AssertionError, StrictDataclassError, SafetensorError),
)


@dataclass(frozen=True)
class LoadedModel:
    """A model in memory, in evaluation mode, with its tokenizer."""

    model: PreTrainedModel
    tokenizer: Any
    """None where none was asked for."""
    source: str
    """Folder, file or hub id, for display."""
    gguf: bool
    """True when the weights were de-quantised from a GGUF file."""
    checkpoint_dtype: torch.dtype
    """What the weights are stored in; bfloat16 where a GGUF file stores them in fewer bits."""


@dataclass(frozen=True)
class _Place:
    """Where a model lies, in the terms of `from_pretrained`."""

    name: str
    """Folder or hub id."""
    folder: Path | None
    """None for a hub id."""
    gguf_file: str | None
    shown: str

    @property
    def options(self) -> dict[str, Any]:
        return {} if self.gguf_file is None else {"gguf_file": self.gguf_file}


def load_model(
    model: str | Path,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    trust_remote_code: bool = False,
    with_tokenizer: bool = True,
) -> LoadedModel:
    """Loads a causal language model and its tokenizer.

    Args:
        model: a folder with config.json and safetensors (also one that lorashear saved with widths per layer), a .gguf
            file (de-quantised), or a hub id.
        dtype: that of the weights in memory.
        device: where the model goes, once it was looked at.
        trust_remote_code: run the modelling code that the checkpoint brings along.
        with_tokenizer: False for work on made-up token ids, which a checkpoint without a tokenizer is good enough for.

    Raises:
        ModelError: where there is no such model or tokenizer, it is no causal language model, its weights are pickled,
            quantised, incomplete, NaN or infinite, or the tokenizer has ids that the embedding lacks.
    """
    place = _locate(model)
    config = _read_config(place, trust_remote_code)
    _check_weight_files(place)
    tokenizer = _load_tokenizer(place, trust_remote_code) if with_tokenizer else None
    loaded = _load_weights(place, config, dtype, trust_remote_code)
    check_weights(loaded)
    if tokenizer is not None:
        check_vocabulary(loaded, tokenizer)
    gguf = place.gguf_file is not None
    stored = torch.bfloat16 if gguf else stored_dtype(config)
    return LoadedModel(loaded.to(device).eval(), tokenizer, place.shown, gguf, stored)


def stored_dtype(config: PretrainedConfig) -> torch.dtype:
    """What a checkpoint's configuration says its weights are stored in; float32 where it does not say."""
    named = getattr(config, "dtype", None)
    named = getattr(torch, named, None) if isinstance(named, str) else named
    return named if isinstance(named, torch.dtype) and named.is_floating_point else torch.float32


def load_config_model(
    model: str | Path, *, trust_remote_code: bool = False
) -> tuple[PreTrainedModel, PretrainedConfig]:
    """Builds a model on the meta device from its configuration alone: no weights are read or allocated.

    Args:
        model: as for `load_model`; a folder needs no more than a config.json.
        trust_remote_code: run the modelling code that the checkpoint brings along.

    Raises:
        ModelError: where there is no such model, or it is no causal language model.
    """
    place = _locate(model)
    config = _read_config(place, trust_remote_code)
    try:
        with torch.device("meta"):
            if _is_per_layer(place):
                from lorashear.surgery.saving import per_layer_class

                return per_layer_class(config)(config).eval(), config
            return AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code).eval(), config
    except _BROKEN as error:
        raise ModelError(f"{place.shown}: no model can be built from its configuration: {error!r}") from error


def fitting_dtype(
    model: str | Path, device: torch.device, *, trains: bool = True, trust_remote_code: bool = False
) -> torch.dtype:
    """float32, or bfloat16 where float32 weights would take more than 70 % of the free memory.

    The memory is the device's, and the machine's, through which they get there. Where a GPU trains, their bfloat16 casts and
    the copy of the full model that is learnt from (2 bytes a weight each) have to fit beside them: the copy is worth more than
    the digits. A CPU may emulate bfloat16 slowly.

    Raises:
        ModelError: as `load_config_model`, and where even bfloat16 does not fit.
    """
    parameters = load_config_model(model, trust_remote_code=trust_remote_code)[0].num_parameters()
    half, beside = torch.bfloat16.itemsize, 4 if trains and device.type != "cpu" else 0
    free = min(available_bytes(device), available_bytes(torch.device("cpu")))
    if parameters * (torch.float32.itemsize + beside) <= USABLE * free:
        return torch.float32
    if parameters * half > free:
        raise ModelError(
            f"{model}: {parameters * half / 2**30:.1f} GiB of weights in bfloat16, and {free / 2**30:.1f} GiB of memory are "
            "free; free some, or take a smaller model or a larger machine"
        )
    logger.info(
        "weights are held in bfloat16 (%.1f GiB): %.1f GiB are free, which is too little for float32%s",
        parameters * half / 2**30,
        free / 2**30,
        " and a copy to learn from" if beside else "",
    )
    return torch.bfloat16


def num_bytes_on_disk(model: str | Path) -> int:
    """Bytes of all files in a checkpoint's folder (weights, configuration, tokenizer), or of a GGUF file."""
    path = Path(model)
    files = [path] if path.is_file() else [item for item in path.iterdir() if item.is_file()]
    return sum(file.stat().st_size for file in files)


def check_weights(model: nn.Module) -> None:
    """Raises `ModelError`, naming the parameter, where a weight is NaN or infinite."""
    for name, parameter in model.named_parameters():
        if not parameter.is_floating_point() or parameter.numel() == 0:
            continue
        # the extremes are one pass without a copy, and NaN wins over every number
        low, high = torch.aminmax(parameter.detach())
        if not (torch.isfinite(low) and torch.isfinite(high)):
            raise ModelError(
                f"parameter {name} holds {low.item()} .. {high.item()}, expected finite numbers; the checkpoint is "
                "broken, or was saved in float16 after it overflowed: fetch it again, or take a bfloat16 or float32 one"
            )


def check_vocabulary(model: PreTrainedModel, tokenizer: Any) -> None:
    """Raises `ModelError` where the tokenizer can give ids that the embedding has no row for.

    Special tokens that text does not contain (an image placeholder, say) only cause a warning.
    """
    rows = model.get_input_embeddings().num_embeddings
    beyond = {index: token for token, index in tokenizer.get_vocab().items() if index >= rows}
    if not beyond:
        return
    used = {tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.unk_token_id}
    added = tokenizer.added_tokens_decoder
    idle = all(index in added and added[index].special and index not in used for index in beyond)
    message = (
        f"the tokenizer has ids up to {max(beyond)} ({beyond[max(beyond)]!r}), the embedding has {rows} rows; "
        f"{len(beyond)} tokens have none"
    )
    if not idle:
        raise ModelError(
            f"{message}; give the tokenizer that belongs to this model, or enlarge the model first: "
            f"model.resize_token_embeddings({max(beyond) + 1})"
        )
    warnings.warn(f"{message}; they are special tokens, and text must not contain them", stacklevel=3)


def check_window(model: PreTrainedModel, window: int) -> None:
    """Raises `SettingsError` where a window is longer than what the model has positions for."""
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if isinstance(limit, int) and 0 < limit < window:
        raise SettingsError(
            f"data.window = {window}: the model has {limit} positions (max_position_embeddings in its config.json); lower "
            "data.window"
        )


def _locate(model: str | Path) -> _Place:
    shown = str(model)
    if not shown:
        raise ModelError("no model was named; give a folder, a hub id or a .gguf file")
    path = Path(model).expanduser()
    if path.is_file():
        if path.suffix != ".gguf":
            raise ModelError(f"{shown}: a model is a folder, a .gguf file or a hub id, and this is another file")
        return _Place(str(path.parent), path.parent, path.name, shown)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ModelError(f"{shown}: no config.json in this folder; {_hint(path)}")
        return _Place(str(path), path, None, shown)
    if isinstance(model, Path) or path.suffix == ".gguf" or not _HUB_ID.fullmatch(shown):
        raise ModelError(f"{shown}: no such folder or file, and no hub id either; correct the path")
    return _Place(shown, None, None, shown)


def _hint(folder: Path) -> str:
    ggufs = sorted(folder.glob("*.gguf"))
    if ggufs:
        return f"for the GGUF in it give the file: {ggufs[0]}"
    nested = [item.parent for item in sorted(folder.glob("*/config.json"))]
    return f"did you mean {nested[0]}?" if nested else "give a folder with a Hugging Face checkpoint"


def _read_config(place: _Place, trust_remote_code: bool) -> PretrainedConfig:
    try:
        config = AutoConfig.from_pretrained(place.name, trust_remote_code=trust_remote_code, **place.options)
    except _BROKEN as error:
        raise ModelError(f"{_what(place)}: its configuration cannot be read: {error}") from error
    _check_causal(place, config, trust_remote_code)
    method = getattr(config, "quantization_config", None)
    if method is not None:
        name = method.get("quant_method") if isinstance(method, dict) else getattr(method, "quant_method", method)
        raise ModelError(
            f"{place.shown}: its weights are quantised ({name}), expected float weights; prune the original checkpoint "
            "and quantise the result"
        )
    return config


def _check_causal(place: _Place, config: PretrainedConfig, trust_remote_code: bool) -> None:
    if trust_remote_code and "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {}):
        return
    names = config.architectures or []
    causal = {name.lower() for name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()}
    known = type(config) in MODEL_FOR_CAUSAL_LM_MAPPING and not getattr(config, "is_encoder_decoder", False)
    if not known or (names and not any(name.lower() in causal for name in names)):
        raise ModelError(
            f"{place.shown}: {', '.join(names) or config.model_type} is no causal language model that transformers "
            f"{transformers.__version__} knows; expected one that AutoModelForCausalLM loads (modelling code in the "
            "checkpoint itself is only run with trust_remote_code)"
        )


def _check_weight_files(place: _Place) -> None:
    if place.folder is None or place.gguf_file is not None or any(place.folder.glob("*.safetensors")):
        return
    pickles = sorted(item.name for pattern in _PICKLES for item in place.folder.glob(pattern))
    if pickles:
        raise ModelError(
            f"{place.shown}: its weights are pickled ({pickles[0]}), which can run code when read; expected "
            "*.safetensors: convert it with `save_pretrained` where you trust the file"
        )
    raise ModelError(
        f"{place.shown}: a configuration but no *.safetensors in this folder; `inspect` and `plan` need none"
    )


def _load_tokenizer(place: _Place, trust_remote_code: bool) -> Any:
    try:
        return AutoTokenizer.from_pretrained(place.name, trust_remote_code=trust_remote_code, **place.options)
    except _BROKEN as error:
        raise ModelError(
            f"{place.shown}: no tokenizer that can be read; put tokenizer.json and tokenizer_config.json of the model "
            f"beside its weights ({first_line(error)})"
        ) from error


def _load_weights(
    place: _Place, config: PretrainedConfig, dtype: torch.dtype, trust_remote_code: bool
) -> PreTrainedModel:
    options: dict[str, Any] = {**place.options, "trust_remote_code": trust_remote_code}
    if place.gguf_file is None:
        options |= {"use_safetensors": True}
    elif hasattr(transformers, "GgufConfig"):  # newer versions keep the blocks packed where they can
        options |= {"quantization_config": transformers.GgufConfig(dequantize=True)}
    model_class: Any = AutoModelForCausalLM
    if _is_per_layer(place):
        from lorashear.surgery.saving import per_layer_class

        model_class = per_layer_class(config)
    try:
        model, report = model_class.from_pretrained(
            place.name,
            config=config,
            dtype=dtype,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are reported, and refused below by name
            **options,
        )
    except _BROKEN as error:
        raise ModelError(f"{_what(place)}: its weights cannot be read: {error}") from error
    missing = sorted(report["missing_keys"])
    if missing:
        raise ModelError(
            f"{place.shown}: {len(missing)} parameters of {type(model).__name__} are not in the checkpoint (the first: "
            f"{missing[0]}); give a complete checkpoint of a causal language model"
        )
    for name, stored, expected in sorted(report["mismatched_keys"], key=str):
        raise ModelError(
            f"{place.shown}: {name} is {tuple(stored)} in the checkpoint, its configuration says {tuple(expected)}; give a "
            "checkpoint whose config.json and weights belong together"
        )
    return model


def _is_per_layer(place: _Place) -> bool:
    """Whether lorashear saved it with widths that differ between layers, which stock code cannot build."""
    if place.folder is None or place.gguf_file is not None:
        return False
    config_file = place.folder / "config.json"
    note = json.loads(config_file.read_text(encoding="utf-8")).get("lorashear")
    return isinstance(note, dict) and note.get("shape") == "per-layer"


def _what(place: _Place) -> str:
    return place.shown if place.folder is not None else f"{place.shown}: no such local folder, and as a hub id"
