"""One column of the final table: a model's size, quality and speed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Self

from transformers import PreTrainedModel

from lorashear.data.packing import TokenData
from lorashear.evaluation.perplexity import evaluate_perplexity
from lorashear.evaluation.speed import tokens_per_second


@dataclass(frozen=True)
class ResultRow:
    """What was measured of one model."""

    name: str
    parameters: int
    bytes: int
    """Of the weights on disk, in the format that the result is saved in."""
    perplexity: Mapping[str, float]
    """Token-weighted, per source."""
    macro: float
    """exp of the mean over sources of log-perplexity."""
    prefill: float
    """Tokens per second, reading a prompt."""
    decode: float
    """Tokens per second, writing with the KV cache."""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        return cls(**values)


def measure(model: PreTrainedModel, data: TokenData, *, name: str, bytes_: int, progress: bool = True) -> ResultRow:
    """Evaluates a model on the held-out windows of every source and times its generation.

    Args:
        model: left as it was.
        data: all its held-out windows are used.
        name: of the column.
        bytes_: size of its weights on disk.
        progress: show a bar.
    """
    perplexity = evaluate_perplexity(model, data, progress=progress)
    speed = tokens_per_second(model)
    return ResultRow(
        name=name,
        parameters=model.num_parameters(),
        bytes=bytes_,
        perplexity=dict(perplexity.per_source),
        macro=perplexity.macro,
        prefill=speed.prefill,
        decode=speed.decode,
    )
