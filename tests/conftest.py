"""Shared fixtures: pico models and a tokenizer that are built in milliseconds, without a network."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

# before transformers and datasets are imported: they read it once
os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    TrainerCallback,
)

# pico models are slower on several threads, and sums come out the same on every machine
torch.set_num_threads(1)

PICO_VOCABULARY = 97
SENTENCES = (
    "The quick brown fox jumps over the lazy dog.",
    "A head of attention reads the keys and writes the values.",
    "Channels that carry little are walked to zero and cut out.",
    "What stays has learnt, step by step, to do without them.",
)


@pytest.fixture(scope="session")
def pico_llama() -> Callable[..., PreTrainedModel]:
    """Factory of a Llama with sizes that all differ: hidden 72, 4 heads over 2 key/value heads of 20, FFN 112."""

    def build(*, tied: bool = False, attention_bias: bool = False, seed: int = 0, layers: int = 2) -> PreTrainedModel:
        torch.manual_seed(seed)
        config = LlamaConfig(
            hidden_size=72,
            intermediate_size=112,
            num_hidden_layers=layers,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=20,
            vocab_size=PICO_VOCABULARY,
            max_position_embeddings=64,
            tie_word_embeddings=tied,
            attention_bias=attention_bias,
        )
        return LlamaForCausalLM(config)

    return build


@pytest.fixture(scope="session")
def pico_mixture() -> Callable[..., PreTrainedModel]:
    """Factory of a mixture of experts, "mixtral" or "qwen3_moe": hidden 72, 2 heads of 20, experts of 16 channels."""

    def build(make: str, *, experts: int = 6, chosen: int = 2, layers: int = 2, seed: int = 0) -> PreTrainedModel:
        torch.manual_seed(seed)
        sizes = {
            "hidden_size": 72, "num_hidden_layers": layers, "num_attention_heads": 2, "num_key_value_heads": 2,
            "head_dim": 20, "vocab_size": PICO_VOCABULARY, "max_position_embeddings": 64, "num_experts_per_tok": chosen,
        }  # fmt: skip
        if make == "mixtral":
            return MixtralForCausalLM(MixtralConfig(intermediate_size=16, num_local_experts=experts, **sizes)).eval()
        return Qwen3MoeForCausalLM(Qwen3MoeConfig(moe_intermediate_size=16, num_experts=experts, **sizes)).eval()

    return build


@pytest.fixture(scope="session")
def pico_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE of `pico_llama`'s vocabulary, `<|endoftext|>` at 0; letters outside `SENTENCES` are lost."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=PICO_VOCABULARY, special_tokens=["<|endoftext|>"], show_progress=False)
    tokenizer.train_from_iterator(SENTENCES, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>", pad_token="<|endoftext|>")


@pytest.fixture(scope="session")
def pico_folder(
    pico_llama: Callable[..., PreTrainedModel],
    pico_tokenizer: PreTrainedTokenizerFast,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """Checkpoint of `pico_llama` and `pico_tokenizer`; not to be changed."""
    folder = tmp_path_factory.mktemp("pico")
    pico_llama().save_pretrained(folder)
    pico_tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def pico_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """YAML file of the text sources `foxes` and `heads` and the instruction source `asked`; not to be changed."""
    folder = tmp_path_factory.mktemp("data")
    fox, head, walked, stays = SENTENCES
    sources = {
        "foxes": [{"text": f"{fox} {stays[: 9 + n % 40]}"} for n in range(90)],
        "heads": [{"text": f"{head[n % 13 :]} {walked}"} for n in range(60)],
        "asked": [{"instruction": f"What {walked[n % 17 :]}", "output": head[: 20 + n % 30]} for n in range(70)],
    }
    for name, rows in sources.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    kinds = "".join(f"  {name}: {{path: {name}.jsonl{', kind: instruct' * (name == 'asked')}}}\n" for name in sources)
    (folder / "data.yaml").write_text(f"sources:\n{kinds}")
    return folder / "data.yaml"


class _Kill(TrainerCallback):  # type: ignore[misc]
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ARG002
        if state.global_step == self.step:
            raise KeyboardInterrupt


@pytest.fixture
def kill_at(monkeypatch: pytest.MonkeyPatch) -> Callable[[Any, int], AbstractContextManager[None]]:
    """Within `kill_at(module, step)`, training that `module` starts is killed after a step."""

    @contextmanager
    def killed(module: Any, step: int) -> Iterator[None]:
        real = module.train
        with monkeypatch.context() as patch:
            patch.setattr(
                module, "train", lambda *a, callbacks=(), **o: real(*a, callbacks=[*callbacks, _Kill(step)], **o)
            )
            yield

    return killed
