from __future__ import annotations

import json
import math
from collections.abc import Callable

import pytest
import torch
from transformers import PreTrainedModel

from lorashear.data.packing import TokenData, TokenSource
from lorashear.errors import DataError, ModelError
from lorashear.evaluation import perplexity
from lorashear.evaluation.perplexity import evaluate_perplexity, source_losses, token_losses

Build = Callable[..., PreTrainedModel]


@pytest.fixture(scope="module")
def data() -> TokenData:
    random = torch.Generator().manual_seed(0)
    sizes = {"a": 5, "b": 3}
    sources = [
        TokenSource(name, "text", torch.zeros(1, 16), torch.randint(97, (size, 16), generator=random))
        for name, size in sizes.items()
    ]
    return TokenData(tuple(sources), 0, 16)


def reference(model: PreTrainedModel, windows: torch.Tensor) -> float:
    """One window and one token at a time, in float64."""
    losses = []
    with torch.no_grad():
        for window in windows:
            logits = model(input_ids=window[None]).logits[0].double()
            for position in range(len(window) - 1):
                losses.append(-torch.log_softmax(logits[position], dim=0)[window[position + 1]].item())
    return sum(losses) / len(losses)


@pytest.mark.parametrize("batch_size", [None, 1, 2, 7])
def test_perplexity_equals_the_slow_way(pico_llama: Build, data: TokenData, batch_size: int | None) -> None:
    model = pico_llama().eval()
    found = evaluate_perplexity(model, data, batch_size=batch_size)
    wanted = {source.name: reference(model, source.valid) for source in data.sources}
    assert found.per_source == pytest.approx({name: math.exp(loss) for name, loss in wanted.items()}, rel=1e-5)
    assert found.macro == pytest.approx(math.exp((wanted["a"] + wanted["b"]) / 2), rel=1e-5)
    assert found.tokens == 8 * 15
    assert found.seconds > 0
    assert json.loads(json.dumps(found.to_dict()))["per_source"].keys() == {"a", "b"}


def test_source_losses_are_its_logarithm(pico_llama: Build, data: TokenData) -> None:
    model = pico_llama().eval()
    losses = source_losses(model, data, 2)
    assert losses == pytest.approx({s.name: reference(model, s.valid[:2]) for s in data.sources}, rel=1e-5)
    fewer = evaluate_perplexity(model, data, windows=2, progress=False)
    assert fewer.per_source == {name: math.exp(loss) for name, loss in losses.items()}
    assert fewer.tokens == 4 * 15


def test_token_losses_do_not_depend_on_the_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    logits, ids = torch.randn(3, 9, 50).bfloat16(), torch.randint(50, (3, 9))
    whole = token_losses(logits, ids)
    wanted = torch.nn.functional.cross_entropy(logits[:, :-1].float().transpose(1, 2), ids[:, 1:], reduction="none")
    assert whole.dtype == torch.float32
    torch.testing.assert_close(whole, wanted)
    monkeypatch.setattr(perplexity, "_CHUNK_BYTES", 4 * 50 * 5)
    torch.testing.assert_close(token_losses(logits, ids), whole)


def test_the_model_is_left_as_it_was(pico_llama: Build, data: TokenData) -> None:
    model = pico_llama().train()
    model.model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    evaluate_perplexity(model, data, windows=1)
    assert [module.training for module in model.modules()] == modes
    model(
        input_ids=torch.zeros(1, 3, dtype=torch.int64)
    ).logits.sum().backward()  # nothing inside is an inference tensor
    assert model.lm_head.weight.grad is not None


def test_a_broken_model_is_named_as_such(pico_llama: Build, data: TokenData) -> None:
    model = pico_llama()
    with torch.no_grad():
        model.model.norm.weight[3] = math.nan
    with pytest.raises(ModelError, match="the loss on source a is nan, expected a finite number"):
        evaluate_perplexity(model, data)
    assert model.training


def test_a_hopeless_model_has_infinite_perplexity(pico_llama: Build, data: TokenData) -> None:
    model = pico_llama()
    with torch.no_grad():
        model.lm_head.weight.mul_(1e6)
    assert evaluate_perplexity(model, data).macro == math.inf


def test_windows_of_one_token_predict_nothing(pico_llama: Build) -> None:
    one = TokenSource("a", "text", torch.zeros(1, 1), torch.zeros(1, 1, dtype=torch.int64))
    with pytest.raises(DataError, match="window of 1 tokens predicts nothing"):
        source_losses(pico_llama(), TokenData((one,), 0, 1))
