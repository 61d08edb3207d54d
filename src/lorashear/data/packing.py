"""Passages packed into windows of tokens."""

from __future__ import annotations

import hashlib
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from lorashear.config import DataSettings
from lorashear.data.rows import Row
from lorashear.data.sources import Source, render
from lorashear.data.spec import Kind
from lorashear.errors import DataError
from lorashear.progress import track

_BATCH = 256  # passages a call of the tokenizer: enough to keep its threads busy, little enough to stop early


@dataclass(frozen=True, eq=False)
class TokenSource:
    """Windows of one source. The tail that fills no window is dropped."""

    name: str
    kind: Kind
    train: Tensor
    """`(num_windows, window)` int64."""
    valid: Tensor
    """`(num_valid_windows, window)` int64, held out; at most `DataSettings.eval_windows`."""
    weight: float = 1.0
    """What the source counts beside the others (`DataSettings.weights`)."""

    @property
    def train_tokens(self) -> int:
        """Number of training tokens, those of the dropped tail left out."""
        return self.train.numel()

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over the token ids of both parts, as hexadecimal digits."""
        digest = hashlib.sha256()
        for part in (self.train, self.valid):
            digest.update(f"{tuple(part.shape)}".encode())
            digest.update(part.contiguous().numpy().data)
        return digest.hexdigest()


@dataclass(frozen=True, eq=False)
class TokenData:
    """All sources, tokenised by one tokenizer."""

    sources: tuple[TokenSource, ...]
    separator_id: int
    """Token before every passage."""
    window: int
    """Tokens in a window."""

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the sources, in order."""
        return tuple(source.name for source in self.sources)

    @property
    def pretraining(self) -> tuple[TokenSource, ...]:
        """Sources of kind text: the first stage of recovery."""
        return tuple(source for source in self.sources if source.kind == "text")

    @property
    def instruct(self) -> tuple[TokenSource, ...]:
        """Sources of kind instruct: the second stage of recovery."""
        return tuple(source for source in self.sources if source.kind == "instruct")

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over names, kinds and tokens of all sources, as hexadecimal digits."""
        digest = hashlib.sha256(f"{self.window} {self.separator_id}".encode())
        for source in self.sources:
            digest.update(f" {source.name} {source.kind} {source.fingerprint}".encode())
        return digest.hexdigest()

    @property
    def weights(self) -> dict[str, float]:
        """Source -> what it counts."""
        return {source.name: source.weight for source in self.sources}

    def calibration(self, count: int) -> Tensor:
        """Training windows for statistics, `(count, window)`: the sources take turns, as often as they weigh, and within
        a source windows are evenly spaced, so that they come from many documents. The same call gives the same windows.

        Any mean over these windows is a mean over the weighted mixture of sources, with the most windows where the most
        weight is. Warns where the sources do not hold as many, and then returns fewer or shifts weight to the others.
        """
        sizes = [len(source.train) for source in self.sources]
        order = _turns(sizes, [source.weight for source in self.sources], count)
        if len(order) < count:
            warnings.warn(
                f"{count} calibration windows were asked for, the training text has {len(order)}", stacklevel=2
            )
        shares = Counter(order)
        self._warn_of_shares(shares, sizes)
        windows = {at: iter(self.sources[at].train[_spaced(sizes[at], number)]) for at, number in shares.items()}
        return torch.stack([next(windows[at]) for at in order])

    def _warn_of_shares(self, shares: Mapping[int, int], sizes: Sequence[int]) -> None:
        """A heavy source without windows enough counts less than it was told to."""
        average = sum(source.weight for source in self.sources) / len(self.sources)
        for at, source in enumerate(self.sources):
            if source.weight > average and shares.get(at) == sizes[at]:
                warnings.warn(
                    f"data.weights: {source.name} = {source.weight:g} is not reached in calibration, the source has only "
                    f"{sizes[at]} training windows; give more of its text, or lower data.calibration_windows",
                    stacklevel=3,
                )


def tokenize(sources: Sequence[Source], tokenizer: Any, settings: DataSettings) -> TokenData:
    """Renders and tokenises every passage, puts the separator before each, and cuts the stream into windows.

    Passages stay in file order and a window may span several. `settings.max_train_tokens` per source are read.

    Raises:
        DataError: where no separator is found, or a source fills no training window or no held-out window.
    """
    separator = separator_id(tokenizer, settings.separator)
    packed = []
    for source in sources:
        stream = _Stream(source, tokenizer, separator, settings)
        train = stream.windows("training", source.train, settings.max_train_tokens)
        valid = stream.windows("held-out", source.valid, settings.eval_windows * settings.window)
        packed.append(TokenSource(source.name, source.kind, train, valid, settings.weights.get(source.name, 1.0)))
    return TokenData(tuple(packed), separator, settings.window)


def separator_id(tokenizer: Any, separator: str | None = None) -> int:
    """Id of the token put before every passage: `separator`, else `<|endoftext|>`, else the EOS, else the BOS token.

    Raises:
        DataError: where the vocabulary has none of them, or not the one asked for.
    """
    vocabulary = tokenizer.get_vocab()
    if separator is not None:
        if separator not in vocabulary:
            raise DataError(
                f'data.separator is "{separator}", which is no single token of the vocabulary; '
                f'give one that is (EOS is "{tokenizer.eos_token}") or leave it out'
            )
        return int(vocabulary[separator])
    for token in ("<|endoftext|>", tokenizer.eos_token, tokenizer.bos_token):
        if token in vocabulary:
            return int(vocabulary[token])
    raise DataError(
        "the tokenizer has neither <|endoftext|> nor an EOS or BOS token to put between passages; name a token of its "
        "vocabulary in data.separator"
    )


@dataclass(frozen=True)
class _Stream:
    """Turns the rows of a source into one stream of token ids."""

    source: Source
    tokenizer: Any
    separator: int
    settings: DataSettings

    def windows(self, part: str, rows: Sequence[Row], max_tokens: int) -> Tensor:
        """The first windows, `(num_windows, window)` int64, of at most `max_tokens` tokens together."""
        chunks: list[Tensor] = []
        num_tokens, window = 0, self.settings.window
        starts = range(0, len(rows), _BATCH)
        for start in track(starts, total=len(starts), description=f"Tokenising {self.source.name} ({part})"):
            chunks.append(self.tokens(rows[start : start + _BATCH]))
            num_tokens += len(chunks[-1])
            if num_tokens >= max_tokens:
                break
        num_windows = min(num_tokens, max_tokens) // window
        if num_windows == 0:
            raise DataError(
                f"source {self.source.name} ({self.source.origin}): {min(num_tokens, max_tokens)} {part} "
                f"tokens fill no window of {window}; give more text or lower data.window"
            )
        return torch.cat(chunks)[: num_windows * window].view(num_windows, window)

    def tokens(self, rows: Sequence[Row]) -> Tensor:
        texts = [render(row, self.source, self.tokenizer, self.settings) for row in rows]
        # verbose=False: passages longer than the model's context are no mistake, they are cut into windows
        encoded = self.tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)
        return torch.tensor([token for ids in encoded["input_ids"] for token in (self.separator, *ids)])


def _turns(sizes: Sequence[int], weights: Sequence[float], count: int) -> list[int]:
    """Whose turn it is, `count` times or until all are exhausted, so that at any time turns are in proportion to weights.

    Sainte-Lague's rule: the k-th turn of a source of weight w comes at time (k + 1/2) / w.
    """
    times = [
        ((turn + 0.5) / weight, source)
        for source, (size, weight) in enumerate(zip(sizes, weights, strict=True))
        if weight > 0
        for turn in range(min(size, count))
    ]
    return [source for _, source in sorted(times)[:count]]


def _spaced(size: int, count: int) -> Tensor:
    """`count` different indices below `size`, evenly spaced."""
    return torch.arange(count) * size // max(count, 1)
