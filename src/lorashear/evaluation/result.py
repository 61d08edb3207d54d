"""One column of the final table: a model's size, quality and speed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Self

from transformers import PreTrainedModel

from lorashear.data.packing import TokenData
from lorashear.evaluation.perplexity import evaluate_perplexity
from lorashear.evaluation.speed import tokens_per_second


@dataclass(frozen=True, kw_only=True)
class ResultRow:
    """What was measured of one model. None: not measured."""

    label: str
    """`dense`, `dense + same fine-tuning`, `pruned`, `pruned + recovered`."""
    parameters: int | None = None
    """Net: what a method adds counts too."""
    bytes_on_disk: int | None = None
    """Of the weights, in the format that the result is saved in."""
    perplexity: Mapping[str, float] = field(default_factory=dict)
    """Source -> token-weighted perplexity on its held-out windows."""
    macro_perplexity: float | None = None
    """exp of the mean over sources of log-perplexity."""
    prefill_tokens_per_second: float | None = None
    decode_tokens_per_second: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """What `to_dict` gave."""
        return cls(**values)


def measure(
    model: PreTrainedModel, data: TokenData, *, label: str, bytes_per_weight: int, progress: bool = True
) -> ResultRow:
    """Evaluates a model on the held-out windows of every source and times its generation.

    Args:
        model: left as it was.
        data: all its held-out windows are used.
        label: of the column.
        bytes_per_weight: in the format that the result is saved in.
        progress: show a bar.
    """
    perplexity = evaluate_perplexity(model, data, progress=progress)
    speed = tokens_per_second(model)
    return ResultRow(
        label=label,
        parameters=model.num_parameters(),
        bytes_on_disk=model.num_parameters() * bytes_per_weight,
        perplexity=dict(perplexity.per_source),
        macro_perplexity=perplexity.macro,
        prefill_tokens_per_second=speed.prefill,
        decode_tokens_per_second=speed.decode,
    )
