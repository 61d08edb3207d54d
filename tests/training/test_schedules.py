from __future__ import annotations

import pytest
import torch

from lorashear.training.schedules import constant_with_warmup, cosine_to, default_learning_rate


def rates(make: object, count: int, /, **options: object) -> list[float]:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = make(optimizer, **options)  # type: ignore[operator]
    found = []
    for _ in range(count):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return found


def test_constant_after_a_warm_up() -> None:
    assert rates(constant_with_warmup, 6, warmup_steps=4) == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]


@pytest.mark.parametrize("steps", [2, 9, 100, 400])
def test_the_cosine_ends_at_its_final_share(steps: int) -> None:
    found = rates(cosine_to, steps, steps=steps)
    top = found.index(max(found))
    assert found[-1] == pytest.approx(0.05)
    assert found[: top + 1] == sorted(found[: top + 1])
    assert found[top:] == sorted(found[top:], reverse=True)
    assert top <= min(10, steps // 10)
    if steps >= 100:
        assert max(found) == pytest.approx(1.0, abs=1e-3)


def test_default_rates_fall_with_the_size() -> None:
    assert default_learning_rate("adapters", 1_000_000) == 1e-3
    assert default_learning_rate("all", 50_000_000) == 5e-4
    for train, size, rate in [
        ("all", 1e9, 1.6e-4),
        ("all", 7e9, 6e-5),
        ("adapters", 1e9, 3.7e-4),
        ("adapters", 7e9, 1.9e-4),
    ]:
        assert default_learning_rate(train, int(size)) == pytest.approx(rate, rel=0.06)  # type: ignore[arg-type]


def test_small_batches_learn_more_slowly() -> None:
    eight, two = (default_learning_rate("all", 135_000_000, batch) for batch in (8, 2))
    assert two == pytest.approx(eight / 4)
    assert default_learning_rate("all", 135_000_000, 16) == eight
    assert default_learning_rate("adapters", 135_000_000, 2) == default_learning_rate("adapters", 135_000_000)
