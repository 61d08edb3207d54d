"""What a model writes."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel

from lorashear.data.packing import separator_id
from lorashear.data.sources import plain_prompt
from lorashear.errors import DataError
from lorashear.evaluation.inference import inference
from lorashear.evaluation.perplexity import token_losses


@dataclass(frozen=True)
class Answer:
    """What was written after a prompt, as token ids."""

    prompt: Sequence[int]
    written: Sequence[int]
    """Ends with the end-of-sequence token where the model came to an end."""
    ended: bool
    """False where it was cut off at the largest length."""

    @property
    def content(self) -> Sequence[int]:
        """What was written, without the token that ends it."""
        return self.written[:-1] if self.ended else self.written


def answer(model: PreTrainedModel, tokenizer: Any, questions: Sequence[str], *, max_new_tokens: int = 128) -> list[str]:
    """Answers each question by itself, greedily, through the chat template or, without one, in the plain layout.

    Returns:
        The answers, without special tokens and surrounding space.
    """
    answers = write_answers(model, tokenizer, questions, max_new_tokens=max_new_tokens)
    return [text.strip() for text in _texts(tokenizer, answers)]


def write_answers(
    model: PreTrainedModel,
    tokenizer: Any,
    questions: Sequence[str],
    *,
    max_new_tokens: int = 128,
    batch_size: int = 1,
) -> list[Answer]:
    """The same as `answer`, as token ids.

    Args:
        model: left as it was.
        tokenizer: of the model.
        questions: one answer each, in this order.
        max_new_tokens: where an answer is cut off.
        batch_size: questions answered at a time. More than one are padded on the left, which attention masks out; models
            with a recurrent state or convolutions read the padding too, so leave those at 1.
    """
    if not tokenizer.chat_template:
        encoded = _encode(tokenizer, [plain_prompt(question) for question in questions])
    else:
        conversations = [[{"role": "user", "content": question}] for question in questions]
        encoded = [
            tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]
            for messages in conversations
        ]
    return _generate(model, tokenizer, encoded, max_new_tokens, batch_size)


def complete(model: PreTrainedModel, tokenizer: Any, prompts: Sequence[str], *, max_new_tokens: int = 128) -> list[str]:
    """Continues each prompt by itself, greedily.

    A prompt begins as the tokenizer begins a text or, where it adds nothing, with the separator of the training data.

    Returns:
        The continuations, without the prompts and special tokens.
    """
    return _texts(tokenizer, _generate(model, tokenizer, _encode(tokenizer, prompts), max_new_tokens))


def repeated_ngrams(text: str | Sequence[Hashable], n: int = 4) -> float:
    """Share of the n-grams that occurred before in the text: 0 for none, near 1 for one stuck in a loop.

    Args:
        text: a string is split into words; tokens are taken as they are.
        n: words or tokens in an n-gram; a text with fewer repeats nothing.
    """
    words = text.split() if isinstance(text, str) else text
    ngrams = [tuple(words[start : start + n]) for start in range(len(words) - n + 1)]
    return 1 - len(set(ngrams)) / len(ngrams) if ngrams else 0.0


def answers_perplexity(model: PreTrainedModel, answers: Sequence[Answer]) -> float:
    """Perplexity, to a model, of answers that it or another model wrote: low where it would have said the same.

    Every written token counts the same, the end of sequence too; the prompts are given and do not count.

    Raises:
        DataError: where nothing was written at all.
    """
    total, tokens = 0.0, sum(len(each.written) for each in answers)
    if not tokens:
        raise DataError("the answers hold no token, so they have no perplexity; let the model write at least one")
    with inference(model) as device:
        for each in answers:
            input_ids = torch.tensor([[*each.prompt, *each.written]], device=device)
            losses = token_losses(model(input_ids=input_ids, use_cache=False).logits, input_ids)
            total += losses[0, len(each.prompt) - 1 :].sum().item()
    return math.exp(total / tokens)


def _encode(tokenizer: Any, prompts: Sequence[str]) -> list[list[int]]:
    encoded = []
    for prompt in prompts:
        ids, bare = tokenizer(prompt)["input_ids"], tokenizer(prompt, add_special_tokens=False)["input_ids"]
        encoded.append(ids if ids != bare else [separator_id(tokenizer), *bare])
    return encoded


def _texts(tokenizer: Any, answers: Sequence[Answer]) -> list[str]:
    return [tokenizer.decode(list(each.written), skip_special_tokens=True) for each in answers]


def _generate(
    model: PreTrainedModel, tokenizer: Any, encoded: Sequence[list[int]], max_new_tokens: int, batch_size: int = 1
) -> list[Answer]:
    """One prompt at a time unless more are asked for: padding is not without effect in every architecture."""
    eos = getattr(model.generation_config, "eos_token_id", None)
    eos = tokenizer.eos_token_id if eos is None else eos
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    config = GenerationConfig(
        max_new_tokens=max_new_tokens, do_sample=False, use_cache=True, eos_token_id=eos, pad_token_id=pad
    )
    ends = set(eos) if isinstance(eos, list | tuple) else {eos}
    by_length = sorted(range(len(encoded)), key=lambda index: len(encoded[index]))  # the least padding
    answers: dict[int, Answer] = {}
    with inference(model) as device:
        for start in range(0, len(encoded), batch_size):
            batch = by_length[start : start + batch_size]
            width = len(encoded[batch[-1]])
            padded = [[pad] * (width - len(encoded[index])) + encoded[index] for index in batch]
            mask = [[0] * (width - len(encoded[index])) + [1] * len(encoded[index]) for index in batch]
            output = model.generate(
                torch.tensor(padded, device=device),
                attention_mask=torch.tensor(mask, device=device),
                generation_config=config,
            )
            for index, row in zip(batch, output[:, width:].tolist(), strict=True):
                answers[index] = _answer(encoded[index], row, ends)
    return [answers[index] for index in range(len(encoded))]


def _answer(prompt: list[int], row: list[int], ends: set[int | None]) -> Answer:
    """Cuts off what a batch is filled up with after the end of a shorter answer."""
    stop = next((at for at, token in enumerate(row) if token in ends), None)
    return Answer(prompt, row if stop is None else row[: stop + 1], ended=stop is not None)
