"""LHSPG: warm-up is the base optimizer, what is redundant ends at exactly zero, and a resumed walk is the same walk."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import PreTrainedModel

import lorashear as ls
from lorashear.pruning.gates import StructureGates
from lorashear.pruning.lhspg import LHSPG, WalkSchedule

Pico = Callable[..., PreTrainedModel]
FFN = "model.layers.0.mlp:ffn-channels"
HEADS = "model.layers.1.self_attn:heads"
SLOTS = "model.layers.1.self_attn:query-slots"
PERIODS: tuple[dict[str, list[int]], ...] = ({FFN: [3, 50]}, {FFN: [7], HEADS: [1]}, {SLOTS: [0]})
SCHEDULE = WalkSchedule(warmup=2, periods=3, total=11)


def tokens(step: int) -> Tensor:
    return torch.randint(0, 97, (3, 8), generator=torch.Generator().manual_seed(step))


def choose(period: int, _redundant: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: torch.tensor(rows) for name, rows in PERIODS[period].items()}


class Walk:
    """A model and its optimizer."""

    def __init__(self, pico_llama: Pico, *, lora: bool, shrink: Any = "gates", epsilon: float = 0.0) -> None:
        self.model: Any = pico_llama()
        if lora:
            torch.manual_seed(1)
            self.model = get_peft_model(
                self.model, LoraConfig(r=3, target_modules="all-linear", init_lora_weights=False)
            )
        self.graph = ls.discover(self.model)
        self.gates = StructureGates(self.model, self.graph.prunable)
        learning = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = LHSPG(
            torch.optim.AdamW(learning, lr=3e-3, weight_decay=0.1),
            model=self.model, graph=self.graph, schedule=SCHEDULE, choose=choose, gates=self.gates, shrink=shrink,
            epsilon=epsilon,
        )  # fmt: skip

    def step(self, step: int) -> None:
        batch = tokens(step)
        self.model(batch, labels=batch).loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def weights(self) -> list[Tensor]:
        return [parameter.detach().clone() for parameter in self.model.parameters()]

    def is_zero(self, removed: Mapping[str, list[int]]) -> bool:
        zeroed = copy.deepcopy(self.model)
        ls.zero_(zeroed, self.graph, ls.Plan(removed={name: tuple(rows) for name, rows in removed.items()}))
        pairs = zip(zeroed.parameters(), self.model.parameters(), strict=True)
        return all(torch.equal(a, b) for a, b in pairs)


def so_far(periods: int) -> dict[str, list[int]]:
    found: dict[str, list[int]] = {}
    for period in PERIODS[:periods]:
        for name, rows in period.items():
            found.setdefault(name, []).extend(rows)
    return found


@pytest.mark.parametrize("lora", [False, True])
def test_warm_up_is_the_base_optimizer_bit_for_bit(pico_llama: Pico, lora: bool) -> None:
    walk = Walk(pico_llama, lora=lora)
    plain = copy.deepcopy(walk.model)
    for module in plain.modules():
        module._forward_pre_hooks.clear()
    base = torch.optim.AdamW([p for p in plain.parameters() if p.requires_grad], lr=3e-3, weight_decay=0.1)
    for step in range(SCHEDULE.warmup):
        walk.step(step)
        batch = tokens(step)
        plain(batch, labels=batch).loss.backward()
        base.step()
        base.zero_grad()
    assert all(torch.equal(a, b) for a, b in zip(walk.weights(), plain.parameters(), strict=True))


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("shrink", ["gates", "slices"])
def test_a_period_ends_at_exact_zeros_that_stay(pico_llama: Pico, lora: bool, shrink: str) -> None:
    walk = Walk(pico_llama, lora=lora, shrink=shrink)
    ends = {4: 1, 7: 2, 10: 3}  # the last steps of the periods
    finished = 0
    for step in range(14):
        before = walk.weights()
        walk.step(step)
        finished = max(finished, ends.get(step, 0))
        assert walk.is_zero(so_far(finished))
        if step in {3, 6, 9}:
            assert not walk.is_zero(so_far(finished + 1))
        assert any(not torch.equal(a, b) for a, b in zip(before, walk.weights(), strict=True))
    assert walk.optimizer.phase == "done"
    assert {name: rows.tolist() for name, rows in walk.optimizer.redundant.items() if len(rows)} == so_far(3)
    assert all(bool((values == 1.0).all()) for values in walk.gates.values.values())


def test_optimizer_state_of_finished_slices_is_zero(pico_llama: Pico) -> None:
    walk = Walk(pico_llama, lora=True)
    for step in range(8):
        walk.step(step)
    down = walk.model.get_submodule("base_model.model.model.layers.0.mlp.down_proj.lora_A.default").weight
    state = walk.optimizer.state[down]
    for name in ("exp_avg", "exp_avg_sq"):
        assert bool((state[name][:, [3, 50, 7]] == 0).all())
        assert bool((state[name][:, [4, 51]] != 0).any())


def test_slices_shrink_uniformly(pico_llama: Pico) -> None:
    """Against the slow obvious version: after the trial step of AdamW, every slice times (T - t - 1) / (T - t)."""
    walk, slow = Walk(pico_llama, lora=False, shrink="slices"), Walk(pico_llama, lora=False, shrink="slices")
    base = torch.optim.AdamW(list(slow.model.parameters()), lr=3e-3, weight_decay=0.1)
    length = 3
    for step in range(SCHEDULE.warmup + length - 1):
        walk.step(step)
        batch = tokens(step)
        slow.model(batch, labels=batch).loss.backward()
        base.step()
        base.zero_grad()
        at = step - SCHEDULE.warmup
        if at >= 0:
            named = dict(slow.model.named_parameters())
            for structure in PERIODS[0][FFN]:
                for member in slow.graph[FFN].members:
                    for row in member.rows[structure].tolist():
                        named[member.parameter].data.select(member.dim, row).mul_((length - at - 1) / (length - at))
    for a, b in zip(walk.weights(), slow.weights(), strict=True):
        torch.testing.assert_close(a, b)


def test_gates_go_down_in_a_straight_line(pico_llama: Pico) -> None:
    walk = Walk(pico_llama, lora=True)
    seen = []
    for step in range(5):
        walk.step(step)
        seen.append(float(walk.gates.values[FFN][3]))
    assert seen == pytest.approx([1, 1, 2 / 3, 1 / 3, 1])
    assert walk.is_zero(so_far(1))


def test_half_space_test_zeroes_early_and_epsilon_0_never_does(pico_llama: Pico) -> None:
    for epsilon, early in ((0.9, True), (0.0, False)):
        walk = Walk(pico_llama, lora=False, shrink="slices", epsilon=epsilon)
        for step in range(SCHEDULE.warmup + 1):
            walk.step(step)
        assert walk.is_zero(so_far(1)) is early


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("shrink", ["gates", "slices"])
@pytest.mark.parametrize("stop", [1, 4, 6, 8])
def test_stopped_and_resumed_equals_never_stopped(pico_llama: Pico, lora: bool, shrink: str, stop: int) -> None:
    whole = Walk(pico_llama, lora=lora, shrink=shrink)
    for step in range(13):
        whole.step(step)
    first = Walk(pico_llama, lora=lora, shrink=shrink)
    for step in range(stop):
        first.step(step)
    file = io.BytesIO()
    torch.save({"weights": first.model.state_dict(), "optimizer": first.optimizer.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    second = Walk(pico_llama, lora=lora, shrink=shrink)
    second.model.load_state_dict(saved["weights"])
    second.optimizer.load_state_dict(saved["optimizer"])
    for step in range(stop, 13):
        second.step(step)
    assert all(torch.equal(a, b) for a, b in zip(whole.weights(), second.weights(), strict=True))


@pytest.mark.parametrize(("warmup", "periods", "total"), [(0, 1, 1), (2, 3, 11), (5, 4, 30), (0, 7, 7)])
def test_periods_cover_the_walk(warmup: int, periods: int, total: int) -> None:
    places = [WalkSchedule(warmup, periods, total).place(step) for step in range(total + 2)]
    assert places[:warmup] == [None] * warmup
    assert places[total:] == [None, None]
    walked = [place for place in places if place is not None]
    assert len(walked) == total - warmup
    for period in range(periods):
        own = [(at, length) for p, at, length in walked if p == period]
        assert own == [(at, len(own)) for at in range(len(own))]


def test_too_few_steps_are_refused() -> None:
    with pytest.raises(ls.SettingsError, match="too few"):
        WalkSchedule(warmup=2, periods=5, total=6)
