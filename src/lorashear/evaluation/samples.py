"""What a model writes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel

from lorashear.data.packing import separator_id
from lorashear.data.sources import plain_prompt
from lorashear.evaluation.inference import inference


def answer(model: PreTrainedModel, tokenizer: Any, questions: Sequence[str], *, max_new_tokens: int = 128) -> list[str]:
    """Answers each question by itself, greedily, through the chat template or, without one, in the plain layout.

    Returns:
        The answers, without special tokens and surrounding space.
    """
    if not tokenizer.chat_template:
        prompts = [plain_prompt(question) for question in questions]
        return [text.strip() for text in complete(model, tokenizer, prompts, max_new_tokens=max_new_tokens)]
    conversations = [[{"role": "user", "content": question}] for question in questions]
    encoded = [
        tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]
        for messages in conversations
    ]
    return [text.strip() for text in _generate(model, tokenizer, encoded, max_new_tokens)]


def complete(model: PreTrainedModel, tokenizer: Any, prompts: Sequence[str], *, max_new_tokens: int = 128) -> list[str]:
    """Continues each prompt by itself, greedily.

    A prompt begins as the tokenizer begins a text or, where it adds nothing, with the separator of the training data.

    Returns:
        The continuations, without the prompts and special tokens.
    """
    encoded = []
    for prompt in prompts:
        ids, bare = tokenizer(prompt)["input_ids"], tokenizer(prompt, add_special_tokens=False)["input_ids"]
        encoded.append(ids if ids != bare else [separator_id(tokenizer), *bare])
    return _generate(model, tokenizer, encoded, max_new_tokens)


def repeated_ngrams(text: str, n: int = 4) -> float:
    """Share of the n-grams of words that occurred before in the text: 0 for none, near 1 for one stuck in a loop."""
    words = text.split()
    ngrams = [tuple(words[start : start + n]) for start in range(len(words) - n + 1)]
    return 1 - len(set(ngrams)) / len(ngrams) if ngrams else 0.0


def _generate(model: PreTrainedModel, tokenizer: Any, encoded: Sequence[list[int]], max_new_tokens: int) -> list[str]:
    """One prompt at a time: padding on the left is not without effect in every architecture."""
    eos = getattr(model.generation_config, "eos_token_id", None)
    eos = tokenizer.eos_token_id if eos is None else eos
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    config = GenerationConfig(
        max_new_tokens=max_new_tokens, do_sample=False, use_cache=True, eos_token_id=eos, pad_token_id=pad
    )
    texts = []
    with inference(model) as device:
        for ids in encoded:
            input_ids = torch.tensor([ids], device=device)
            mask = torch.ones_like(input_ids)
            written = model.generate(input_ids, attention_mask=mask, generation_config=config)[0, len(ids) :]
            texts.append(tokenizer.decode(written, skip_special_tokens=True))
    return texts
