"""How fast a model reads a prompt and writes an answer, on this machine."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass

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


def tokens_per_second(model: PreTrainedModel, *, prompt: int = 128, new_tokens: int = 32, repeats: int = 5) -> Speed:
    """Measures greedy generation with a KV cache through `model.generate`, as users call it.

    Reading is timed as a generation of one token, writing as what further tokens take on top of it; both are the best
    of `repeats` runs after a warm-up, taken in turns: what else runs on the machine can only make them longer. The
    prompt is random, which changes nothing for a dense model. Where a machine is so busy that writing seems to take no
    time, its figure is a lower bound: reading counts too.

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
        turns = [[_seconds(model, input_ids, count) for count in (1, 1 + new_tokens)] for _ in range(repeats)]
    reading, both = (min(times) for times in zip(*turns, strict=True))
    writing = both - reading if both > reading else both
    return Speed(prefill=prompt / reading, decode=new_tokens / writing)


def _seconds(model: PreTrainedModel, input_ids: Tensor, new_tokens: int) -> float:
    # a minimum too, so that a model that would stop early is timed as long as any other
    config = GenerationConfig(max_new_tokens=new_tokens, min_new_tokens=new_tokens, do_sample=False, use_cache=True)
    synchronize(input_ids.device)
    begin = time.perf_counter()
    model.generate(input_ids, attention_mask=torch.ones_like(input_ids), generation_config=config)
    synchronize(input_ids.device)
    return time.perf_counter() - begin
