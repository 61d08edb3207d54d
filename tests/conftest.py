"""Shared fixtures: pico models and a tokenizer that are built in milliseconds, without a network."""

from __future__ import annotations

import os
from collections.abc import Callable

# before transformers and datasets are imported: they read it once
os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

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
def pico_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE of `pico_llama`'s vocabulary, `<|endoftext|>` at 0; letters outside `SENTENCES` are lost."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=PICO_VOCABULARY, special_tokens=["<|endoftext|>"], show_progress=False)
    tokenizer.train_from_iterator(SENTENCES, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>", pad_token="<|endoftext|>")
