"""The data mixture of recovery: which window is sample n, under weights that change as training goes on.

Paper: dynamic knowledge recovery. Everything drawn is a function of the seed, the sample's number and
the history of the weights, so a run that is resumed with the same history sees the same samples.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from random import Random
from typing import Protocol

import torch
from torch import Tensor
from torch.utils.data import Dataset


class Source(Protocol):
    """What the mixture needs of a `TokenSource`."""

    @property
    def name(self) -> str:
        """Unique among the sources."""

    @property
    def train(self) -> Tensor:
        """Training windows `(num_windows, window)` int64."""

    @property
    def weight(self) -> float:
        """What the source counts beside the others."""


@dataclass(frozen=True)
class WeightChange:
    """Weights in force from a sample on."""

    from_sample: int
    """First sample drawn with these weights."""
    weights: dict[str, float]
    """Share of the samples by source; a source that is left out is not drawn."""


class MixtureDataset(Dataset[dict[str, Tensor]]):
    """Samples `{"input_ids": (window,)}` from several sources, in shares that change.

    Sample n is drawn in two steps. Its source: a uniform number that depends on (seed, n) alone is looked up in the
    weights in force at n. Its window: the source's next one in an order shuffled anew for each pass over the source, so
    none repeats before all have been seen.
    """

    def __init__(self, sources: Sequence[Source], weights: Mapping[str, float], *, num_samples: int, seed: int) -> None:
        self.sources = tuple(sources)
        self.num_samples, self.seed = num_samples, seed
        generator = torch.Generator().manual_seed(_mixed_seed(seed, "sources"))
        self._uniform = torch.rand(num_samples, generator=generator, dtype=torch.float64)
        self._source = torch.zeros(num_samples, dtype=torch.int64)
        """Index of each sample's source."""
        self._turn = torch.zeros(num_samples, dtype=torch.int64)
        """How many earlier samples came from the same source."""
        self._orders: dict[tuple[int, int], Tensor] = {}
        self.history: tuple[WeightChange, ...] = ()
        self.change(0, weights)

    def __len__(self) -> int:
        return self.num_samples

    def __getitem__(self, n: int) -> dict[str, Tensor]:
        if not 0 <= n < self.num_samples:
            raise IndexError(f"sample {n} of {self.num_samples}")
        source, turn = int(self._source[n]), int(self._turn[n])
        windows = self.sources[source].train
        lap, place = divmod(turn, len(windows))
        return {"input_ids": windows[self._order(source, lap)[place]]}

    def source_of(self, n: int) -> str:
        """Name of the source that sample n is drawn from."""
        return self.sources[int(self._source[n])].name

    def change(self, from_sample: int, weights: Mapping[str, float]) -> None:
        """Draws samples from `from_sample` on with new weights, which need not sum to 1.

        A loader may have fetched samples already. transformers' Trainer fetches a whole optimizer step and, through
        accelerate, one micro batch more; so a change made after step s has to start at sample `(s + 2) * batch` counted
        from step 0, or `(s + 1) * batch` where s counts finished steps. What came before keeps its place.
        """
        names = [source.name for source in self.sources]
        if unknown := weights.keys() - set(names):
            raise ValueError(f"weights for {sorted(unknown)}, which are not among the sources {names}")
        shares = torch.tensor([max(0.0, weights.get(name, 0.0)) for name in names], dtype=torch.float64)
        shares[[len(source.train) == 0 for source in self.sources]] = 0.0
        if not shares.sum() > 0:
            raise ValueError(f"all weights are 0 or their sources empty: {dict(weights)}")
        self.history = (
            *(change for change in self.history if change.from_sample < from_sample),
            WeightChange(from_sample, dict(weights)),
        )
        edges = torch.cumsum(shares, 0) / shares.sum()
        # rounding may leave the last edge below a number drawn; the last source with a weight takes that sliver
        last = int(shares.nonzero()[-1])
        found = torch.searchsorted(edges, self._uniform[from_sample:], right=True)
        self._source[from_sample:] = found.clamp(max=last)
        for index in range(len(names)):
            mine = self._source == index
            self._turn[mine] = torch.arange(int(mine.sum()))

    def _order(self, source: int, lap: int) -> Tensor:
        """Order of a source's windows in its pass `lap`, `(num_windows,)`; only the latest pass is kept."""
        if (source, lap) not in self._orders:
            self._orders.pop((source, lap - 1), None)
            generator = torch.Generator().manual_seed(_mixed_seed(self.seed, f"{self.sources[source].name}/{lap}"))
            self._orders[source, lap] = torch.randperm(len(self.sources[source].train), generator=generator)
        return self._orders[source, lap]


def _mixed_seed(seed: int, what: str) -> int:
    """A seed of its own for each purpose; the same on every machine, unlike `hash`."""
    return Random(f"{seed}/{what}").getrandbits(63)


def proportional_weights(sources: Sequence[Source]) -> dict[str, float]:
    """Shares in proportion to the sources' training tokens, times what each counts; they sum to 1."""
    tokens = {source.name: source.train.numel() * source.weight for source in sources}
    total = sum(tokens.values())
    return {name: count / total for name, count in tokens.items()}


def deviation_weights(
    deviation: Mapping[str, float], proportional: Mapping[str, float], *, floor: float
) -> dict[str, float]:
    """Shares that follow what was lost: floor * proportional + (1 - floor) * normalised deviation.

    `deviation` is the model's loss minus the full model's, nats per token; a source that is ahead counts as 0, and so
    does one that is only in `proportional`: it is there not to be forgotten. Where no source is behind, the whole is
    drawn in proportion. `proportional` is normalised first, so the shares sum to 1.
    """
    total = sum(proportional.values())
    even = {name: share / total for name, share in proportional.items()}
    behind = {name: max(0.0, deviation.get(name, 0.0)) for name in even}
    lost = sum(behind.values())
    if lost == 0.0:
        return even
    return {name: floor * even[name] + (1 - floor) * behind[name] / lost for name in even}
