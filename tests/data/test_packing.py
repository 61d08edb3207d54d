from __future__ import annotations

import warnings
from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from lorashear.config import DataSettings
from lorashear.data.packing import TokenData, TokenSource, separator_id, tokenize
from lorashear.data.sources import Source
from lorashear.errors import DataError

SETTINGS = DataSettings(window=8, eval_windows=3)


def source(passages: list[str], name: str = "a", kind: Any = "text") -> Source:
    rows = [{"text": passage} for passage in passages]
    return Source(name, kind, rows, rows[-20:], f"{name}.jsonl")


def passages(count: int, seed: int = 0) -> list[str]:
    words = ["the", "quick", "brown", "fox", "reads", "keys", "and", "writes", "values"]
    order = torch.randint(len(words), (count, 12), generator=torch.Generator().manual_seed(seed))
    return [" ".join(words[index] for index in row) for row in order.tolist()]


def reference(texts: list[str], tokenizer: Any, window: int) -> torch.Tensor:
    stream: list[int] = []
    for text in texts:
        stream += [0, *tokenizer.encode(text, add_special_tokens=False)]
    return torch.tensor(stream)[: len(stream) // window * window].view(-1, window)


def test_windows_are_the_joined_passages_cut(pico_tokenizer: PreTrainedTokenizerFast) -> None:
    texts = passages(600)  # more than one batch of the tokenizer
    data = tokenize([source(texts)], pico_tokenizer, SETTINGS)
    (found,) = data.sources
    assert data.separator_id == 0
    assert torch.equal(found.train, reference(texts, pico_tokenizer, 8))
    assert torch.equal(found.valid, reference(texts[-20:], pico_tokenizer, 8)[:3])
    assert found.train.dtype == torch.int64
    assert found.train_tokens == found.train.numel()


def test_the_cap_on_training_tokens(pico_tokenizer: PreTrainedTokenizerFast) -> None:
    texts = passages(600)
    capped = tokenize([source(texts)], pico_tokenizer, SETTINGS.model_copy(update={"max_train_tokens": 100}))
    assert torch.equal(capped.sources[0].train, reference(texts, pico_tokenizer, 8)[:12])


def test_no_special_tokens_are_added(pico_tokenizer: PreTrainedTokenizerFast) -> None:
    short = tokenize([source(["a"] * 40)], pico_tokenizer, SETTINGS).sources[0].train
    assert (short[:, ::2] == 0).all()
    assert (short[:, 1::2] != 0).all()


def test_too_little_text(pico_tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(DataError, match=r"source b \(b\.jsonl\): 6 training tokens fill no window of 8; give more"):
        tokenize([source(passages(600)), source(["a"] * 3, "b")], pico_tokenizer, SETTINGS)
    enough = Source("b", "text", [{"text": "a"}] * 4, [{"text": "a"}], "b.jsonl")
    with pytest.raises(DataError, match="2 held-out tokens fill no window of 8"):
        tokenize([enough], pico_tokenizer, SETTINGS)


def test_fingerprints_tell_texts_apart(pico_tokenizer: PreTrainedTokenizerFast) -> None:
    def fingerprint(texts: list[str], name: str = "a", window: int = 8) -> str:
        settings = DataSettings(window=window, eval_windows=3)
        return tokenize([source(texts, name)], pico_tokenizer, settings).fingerprint

    texts = passages(60)
    prints = [fingerprint(texts), fingerprint(texts[1:]), fingerprint(texts, "b"), fingerprint(texts, window=16)]
    assert len(set(prints)) == 4
    assert fingerprint(list(texts)) == prints[0]
    assert len(prints[0]) == 64


def windows(count: int, start: int) -> torch.Tensor:
    """Every window a constant of its own."""
    return torch.arange(start, start + count).unsqueeze(1).expand(count, 4).contiguous()


def made_up(*sizes: int) -> TokenData:
    sources = [TokenSource(f"s{i}", "text", windows(size, 100 * i), windows(2, 0)) for i, size in enumerate(sizes)]
    return TokenData(tuple(sources), 0, 4)


def test_calibration_takes_turns_and_spreads() -> None:
    found = made_up(8, 4, 20).calibration(6)
    assert found.shape == (6, 4)
    assert found[:, 0].tolist() == [0, 100, 200, 4, 102, 210]
    assert made_up(8, 4, 20).calibration(2)[:, 0].tolist() == [0, 100]


def test_calibration_goes_on_where_a_source_is_exhausted() -> None:
    found = made_up(1, 6).calibration(5)[:, 0].tolist()
    assert found == [0, 100, 101, 103, 104]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(made_up(1, 6).calibration(7)) == 7
    with pytest.warns(UserWarning, match="8 calibration windows were asked for, the training text has 7"):
        assert len(made_up(1, 6).calibration(8)) == 7


def weighted(*pairs: tuple[int, float]) -> TokenData:
    made = made_up(*(size for size, _ in pairs))
    sources = [replace(source, weight=weight) for source, (_, weight) in zip(made.sources, pairs, strict=True)]
    return replace(made, sources=tuple(sources))


def test_heavy_sources_have_more_turns_at_any_time() -> None:
    data = weighted((40, 1.0), (40, 4.0), (40, 0.0), (40, 1.0))
    found = (data.calibration(24)[:, 0] // 100).tolist()
    assert {name: found.count(name) for name in range(4)} == {0: 4, 1: 16, 2: 0, 3: 4}
    for first in range(0, 24, 6):
        assert sorted(found[first : first + 6]) == [0, 1, 1, 1, 1, 3]
    assert len(set(data.calibration(24)[:, 0].tolist())) == 24  # no window twice
    assert torch.equal(weighted((9, 2.5), (9, 2.5)).calibration(7), made_up(9, 9).calibration(7))
    assert data.weights == {"s0": 1.0, "s1": 4.0, "s2": 0.0, "s3": 1.0}


def test_a_heavy_source_with_too_few_windows_is_named() -> None:
    with pytest.warns(UserWarning, match=r"data\.weights: s0 = 9 is not reached.*only 3 training windows"):
        found = weighted((3, 9.0), (40, 1.0)).calibration(10)
    assert (found[:, 0] < 100).sum() == 3
    assert len(found) == 10


def test_weights_reach_the_sources(pico_tokenizer: PreTrainedTokenizerFast) -> None:
    settings = DataSettings(window=8, eval_windows=3, weights={"b": 3.0})
    data = tokenize([source(passages(60)), source(passages(60), "b")], pico_tokenizer, settings)
    assert data.weights == {"a": 1.0, "b": 3.0}
    plain = tokenize([source(passages(60)), source(passages(60), "b")], pico_tokenizer, SETTINGS)
    assert data.fingerprint == plain.fingerprint  # of the text


def test_stages_and_names(pico_tokenizer: PreTrainedTokenizerFast) -> None:
    settings = DataSettings(window=8, eval_windows=3, render="text")
    data = tokenize([source(passages(60)), source(passages(60), "b", "instruct")], pico_tokenizer, settings)
    assert data.names == ("a", "b")
    assert [s.name for s in data.pretraining] == ["a"]
    assert [s.name for s in data.instruct] == ["b"]


class Vocabulary:
    def __init__(self, *tokens: str, eos: str | None = None, bos: str | None = None) -> None:
        self.tokens, self.eos_token, self.bos_token = tokens, eos, bos

    def get_vocab(self) -> dict[str, int]:
        return {token: index for index, token in enumerate(self.tokens)}


def test_choice_of_the_separator() -> None:
    everything = Vocabulary("<s>", "</s>", "<|endoftext|>", "x", eos="</s>", bos="<s>")
    assert separator_id(everything) == 2
    assert separator_id(everything, "x") == 3
    assert separator_id(Vocabulary("<s>", "</s>", eos="</s>", bos="<s>")) == 1
    assert separator_id(Vocabulary("<s>", bos="<s>")) == 0
    with pytest.raises(DataError, match=r'data\.separator is "no", which is no single token.*EOS is "</s>"'):
        separator_id(everything, "no")
    with pytest.raises(DataError, match=r"neither <\|endoftext\|> nor an EOS or BOS token"):
        separator_id(Vocabulary("x"))
