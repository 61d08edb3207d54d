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
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedModel

import lorashear as ls
from lorashear.pruning.gates import StructureGates
from lorashear.pruning.lhspg import LHSPG, Choose, WalkSchedule

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


GRAPHS: dict[bool, ls.Graph] = {}
"""With and without adapters; a graph knows nothing of the weights."""


class Walk:
    """A model and its optimizer."""

    def __init__(
        self, pico_llama: Pico, *, lora: bool, shrink: Any = "gates", epsilon: float = 0.0, pick: Choose = choose
    ) -> None:
        self.model: Any = pico_llama()
        if lora:
            torch.manual_seed(1)
            self.model = get_peft_model(
                self.model, LoraConfig(r=3, target_modules="all-linear", init_lora_weights=False)
            )
        if lora not in GRAPHS:
            GRAPHS[lora] = ls.discover(self.model)
        self.graph = GRAPHS[lora]
        self.gates = StructureGates(self.model, self.graph.gated)
        learning = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = LHSPG(
            torch.optim.AdamW(learning, lr=3e-3, weight_decay=0.1),
            model=self.model, graph=self.graph, schedule=SCHEDULE, choose=pick, gates=self.gates, shrink=shrink,
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


@pytest.mark.parametrize("shrink", ["gates", "slices"])
def test_half_space_test_against_a_slow_loop(pico_llama: Pico, shrink: str) -> None:
    """After the period's first step some structures have been turned past epsilon, and only they are zero."""
    walk = Walk(pico_llama, lora=True, shrink=shrink)  # epsilon 0 shows what the test would have seen
    for step in range(SCHEDULE.warmup):
        walk.step(step)
    start = composed(walk, PERIODS[0][FFN])
    walk.step(SCHEDULE.warmup)
    left = {"gates": 2 / 3, "slices": 1.0}[shrink]
    turned = [left * float(a @ b / (b @ b)) for a, b in zip(composed(walk, PERIODS[0][FFN]), start, strict=True)]
    assert 0.5 < min(turned) < max(turned) < 0.8
    epsilon = sum(turned) / 2
    tested = Walk(pico_llama, lora=True, shrink=shrink, epsilon=epsilon)
    for step in range(SCHEDULE.warmup + 1):
        tested.step(step)
    gone = [row for row, share in zip(PERIODS[0][FFN], turned, strict=True) if share < epsilon]
    assert len(gone) == 1
    assert tested.is_zero({FFN: gone})
    assert not tested.is_zero({FFN: PERIODS[0][FFN]})
    assert set(tested.optimizer.newly[FFN].tolist()) == set(PERIODS[0][FFN]) - set(gone)
    assert bool((tested.gates.values[FFN][gone] == 1.0).all())


def composed(walk: Walk, structures: list[int]) -> list[Tensor]:
    """Slices of W = x + s B A, `(entries,)` a structure, by merging the adapters."""
    model: Any = copy.deepcopy(walk.model)
    weights = dict(model.merge_and_unload().named_parameters())
    members = [m for m in walk.graph[FFN].members if not m.adapter]
    return [
        torch.cat(
            [
                weights[walk.graph.canonical[m.parameter]].detach().select(m.dim, row).flatten()
                for m in members
                for row in m.rows[structure].tolist()
            ]
        )
        for structure in structures
    ]


def test_composed_slices_of_weights_that_lie_the_other_way_round() -> None:
    """GPT-2's Conv1D: `(in, out)`."""
    torch.manual_seed(0)
    config = GPT2Config(n_embd=24, n_inner=40, n_layer=1, n_head=3, vocab_size=97, n_positions=16)
    targets = ["c_fc", "mlp.c_proj"]
    lora = LoraConfig(r=3, target_modules=targets, init_lora_weights=False, fan_in_fan_out=True)
    model: Any = get_peft_model(GPT2LMHeadModel(config), lora)
    graph = ls.discover(model)
    merged = dict(copy.deepcopy(model).merge_and_unload().named_parameters())
    optimizer = LHSPG(
        torch.optim.SGD(model.parameters()), model=model, graph=graph, schedule=SCHEDULE, choose=choose, shrink="slices"
    )
    group = next(group for group in graph.gated if group.kind == "ffn-channels")
    members = [member for member in group.members if not member.adapter]
    found = optimizer._parts(group.name, torch.tensor([5, 33]))
    assert {member.dim for member in members if member.parameter.endswith("weight")} == {0, 1}
    for part, member in zip(found, members, strict=True):
        weight = merged[graph.canonical[member.parameter]].movedim(member.dim, 0)
        torch.testing.assert_close(part, weight[[5, 33]].reshape(2, -1))


def test_a_closure_is_called_once_and_its_gradients_are_masked_too(pico_llama: Pico) -> None:
    """Last, that is where a query slot is gone, whose context would go on teaching the consumer."""
    walk, closed = Walk(pico_llama, lora=True), Walk(pico_llama, lora=True)
    for step in range(SCHEDULE.total + 2):
        walk.step(step)
        batch = tokens(step)

        def closure(batch: Tensor = batch) -> float:
            closed.optimizer.zero_grad()
            loss = closed.model(batch, labels=batch).loss
            loss.backward()
            return float(loss.detach())

        assert closed.optimizer.step(closure) > 0  # type: ignore[operator]
    assert closed.is_zero(so_far(3))
    assert all(torch.equal(a, b) for a, b in zip(walk.weights(), closed.weights(), strict=True))


def test_loading_an_earlier_moment_brings_its_gates_back(pico_llama: Pico) -> None:
    walk = Walk(pico_llama, lora=True)
    early = copy.deepcopy(walk.optimizer.state_dict())
    for step in range(SCHEDULE.warmup + 1):
        walk.step(step)
    assert float(walk.gates.values[FFN][3]) < 1
    walk.optimizer.load_state_dict(early)
    assert all(bool((values == 1.0).all()) for values in walk.gates.values.values())


def test_statistics_are_part_of_the_state(pico_llama: Pico) -> None:
    """A choice after a resume is made on what was metered before it, too."""
    walk, resumed = Walk(pico_llama, lora=True), Walk(pico_llama, lora=True)
    walk.gates.metering = True
    walk.step(0)
    resumed.optimizer.load_state_dict(walk.optimizer.state_dict())
    before, after = walk.gates.statistics()[FFN], resumed.gates.statistics()[FFN]
    assert before.samples == after.samples == 3
    assert torch.equal(before.second, after.second)
    assert bool((after.second > 0).any())


def test_choose_is_told_what_is_gone(pico_llama: Pico) -> None:
    seen = []

    def pick(period: int, redundant: Mapping[str, Tensor]) -> dict[str, Tensor]:
        seen.append((period, {name: rows.tolist() for name, rows in redundant.items() if len(rows)}))
        return choose(period, redundant)

    walk = Walk(pico_llama, lora=True, pick=pick)
    for step in range(SCHEDULE.total + 1):
        walk.step(step)
    assert seen == [(period, so_far(period)) for period in range(3)]


def test_gates_are_asked_for_where_they_shrink(pico_llama: Pico) -> None:
    model = pico_llama()
    with pytest.raises(ls.SettingsError, match="needs the structure gates"):
        LHSPG(
            torch.optim.AdamW(model.parameters()), model=model, graph=ls.discover(model), schedule=SCHEDULE,
            choose=choose,
        )  # fmt: skip


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("shrink", ["gates", "slices"])
@pytest.mark.parametrize("stop", [1, 5, 9])  # in warm-up, between two periods, within one
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
