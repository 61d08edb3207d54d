"""How fast a model reads a prompt and writes an answer, on this machine."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from statistics import median

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

from lorashear.evaluation.inference import inference, synchronize


@dataclass(frozen=True)
class Speed:
    """Tokens a second, of one sequence at a time."""

    prefill: float
    """Reading the prompt."""
    decode: float
    """Writing, one token after the other."""

    def to_dict(self) -> dict[str, float]:
        """Plain values, for a JSON file."""
        return asdict(self)


def tokens_per_second(model: PreTrainedModel, *, prompt: int = 128, new_tokens: int = 32, repeats: int = 3) -> Speed:
    """Measures greedy generation with a KV cache through `model.generate`, as users call it.

    Reading is timed as a generation of one token, writing as what further tokens take on top of it; both are the median
    of `repeats` runs after a warm-up. The prompt is random, which changes nothing for a dense model.

    Args:
        model: on the device to measure; left as it was.
        prompt: tokens read.
        new_tokens: tokens written after the first.
        repeats: timed runs.
    """
    vocabulary = model.get_input_embeddings().num_embeddings
    input_ids = torch.randint(vocabulary, (1, prompt), generator=torch.Generator().manual_seed(0))
    with inference(model) as device:
        input_ids = input_ids.to(device)
        _seconds(model, input_ids, 2)
        reading = median(_seconds(model, input_ids, 1) for _ in range(repeats))
        both = median(_seconds(model, input_ids, 1 + new_tokens) for _ in range(repeats))
    # a clock tick at least: on a tiny model the difference can drown in noise
    return Speed(prefill=prompt / reading, decode=new_tokens / max(both - reading, 1e-6))


def _seconds(model: PreTrainedModel, input_ids: Tensor, new_tokens: int) -> float:
    # a minimum too, so that a model that would stop early is timed as long as any other
    config = GenerationConfig(max_new_tokens=new_tokens, min_new_tokens=new_tokens, do_sample=False, use_cache=True)
    synchronize(input_ids.device)
    begin = time.perf_counter()
    model.generate(input_ids, attention_mask=torch.ones_like(input_ids), generation_config=config)
    synchronize(input_ids.device)
    return time.perf_counter() - begin
