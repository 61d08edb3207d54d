from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from lorashear.data.sources import plain_prompt
from lorashear.evaluation.samples import answer, complete, repeated_ngrams

Build = Callable[..., PreTrainedModel]


def greedy(model: PreTrainedModel, ids: list[int], count: int) -> list[int]:
    """Without a cache, token by token."""
    written: list[int] = []
    with torch.no_grad():
        while len(written) < count and 0 not in written:
            logits = model(input_ids=torch.tensor([ids + written])).logits
            written.append(int(logits[0, -1].argmax()))
    return [token for token in written if token != 0]


@pytest.fixture
def model(pico_llama: Build) -> PreTrainedModel:
    return pico_llama().eval()


def test_completions_are_greedy(model: PreTrainedModel, pico_tokenizer: PreTrainedTokenizerFast) -> None:
    prompts = ["The quick", "A head of attention reads"]
    found = complete(model, pico_tokenizer, prompts, max_new_tokens=8)
    for prompt, text in zip(prompts, found, strict=True):
        ids = [0, *pico_tokenizer(prompt)["input_ids"]]  # the separator begins a passage
        assert text == pico_tokenizer.decode(greedy(model, ids, 8))


def test_answers_without_a_template(model: PreTrainedModel, pico_tokenizer: PreTrainedTokenizerFast) -> None:
    found = answer(model, pico_tokenizer, ["Who jumps?"], max_new_tokens=6)
    wanted = complete(model, pico_tokenizer, [plain_prompt("Who jumps?")], max_new_tokens=6)
    assert found == [wanted[0].strip()]


def test_answers_through_the_template(
    model: PreTrainedModel, pico_tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    template = "{% for m in messages %}The {{ m['content'] }} {% endfor %}{% if add_generation_prompt %}fox{% endif %}"
    monkeypatch.setattr(pico_tokenizer, "chat_template", template)
    model.train()
    found = answer(model, pico_tokenizer, ["dog", "quick brown"], max_new_tokens=6)
    assert model.training
    model.eval()
    for text, question in zip(found, ["dog", "quick brown"], strict=True):
        ids = pico_tokenizer(f"The {question} fox")["input_ids"]
        assert text == pico_tokenizer.decode(greedy(model, ids, 6)).strip()


def test_repetition() -> None:
    assert repeated_ngrams("") == 0
    assert repeated_ngrams("a b c d e f g") == 0
    assert repeated_ngrams("a b a b a b", n=2) == pytest.approx(3 / 5)
    assert repeated_ngrams("so " * 100) > 0.98
