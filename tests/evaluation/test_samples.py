from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from lorashear.data.sources import plain_prompt
from lorashear.errors import DataError
from lorashear.evaluation.samples import (
    Answer,
    answer,
    answers_perplexity,
    complete,
    repeated_ngrams,
    write_answers,
)

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


def test_repetition_of_tokens() -> None:
    assert repeated_ngrams([]) == 0
    assert repeated_ngrams([5, 6, 7]) == 0
    assert repeated_ngrams([1, 2, 3, 4, 1, 2, 3, 4]) == pytest.approx(1 / 5)  # the fifth 4-gram is the first again
    assert repeated_ngrams([9] * 8) == pytest.approx(4 / 5)


def test_answers_as_tokens(
    model: PreTrainedModel, pico_tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompt = [0, *pico_tokenizer(plain_prompt("Who jumps?"))["input_ids"]]
    written = greedy(model, prompt, 6)
    (cut_off,) = write_answers(model, pico_tokenizer, ["Who jumps?"], max_new_tokens=6)
    assert cut_off == Answer(prompt, written, ended=False)
    assert cut_off.content == written
    end = written.index(written[3])  # where that token is written first
    monkeypatch.setattr(model.generation_config, "eos_token_id", [written[end], 95])
    (ended,) = write_answers(model, pico_tokenizer, ["Who jumps?"], max_new_tokens=6)
    assert ended == Answer(prompt, written[: end + 1], ended=True)
    assert ended.content == written[:end]


def test_a_batch_writes_what_single_prompts_do(
    model: PreTrainedModel, pico_tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    questions = ["Who jumps over the lazy dog?", "Who?", "What stays and carries little?", "dog"]
    alone = write_answers(model, pico_tokenizer, questions, max_new_tokens=7)
    # one of them comes to an end, and the batch goes on
    monkeypatch.setattr(model.generation_config, "eos_token_id", alone[1].written[2])
    alone = write_answers(model, pico_tokenizer, questions, max_new_tokens=7)
    assert len({len(each.prompt) for each in alone}) > 2
    assert len({len(each.written) for each in alone}) > 1
    assert write_answers(model, pico_tokenizer, questions, max_new_tokens=7, batch_size=3) == alone


def test_perplexity_of_answers(model: PreTrainedModel) -> None:
    answers = [Answer([3, 4, 5], [6, 7, 8, 0], ended=True), Answer([9, 10], [11], ended=False), Answer([1], [], False)]
    losses = []
    for each in answers:
        ids = [*each.prompt, *each.written]
        with torch.no_grad():
            logs = model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
        losses += [-logs[at - 1, ids[at]].item() for at in range(len(each.prompt), len(ids))]
    assert len(losses) == 5
    assert answers_perplexity(model, answers) == pytest.approx(math.exp(sum(losses) / 5), rel=1e-5)
    with pytest.raises(DataError, match="hold no token"):
        answers_perplexity(model, [])
