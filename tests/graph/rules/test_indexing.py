"""Operators that read or write by index."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from lorashear.graph.groups import Exactness, Kind

See = Callable[..., Any]
TOKENS = {"ids": torch.tensor([[1, 5, 2]])}


def test_a_table_keeps_its_rows_and_lends_its_columns(see: See) -> None:
    seen = see(lambda m, ids: F.embedding(ids, m.table) @ m.a, inputs=TOKENS, table=(7, 5), a=(5, 2))
    assert seen.ties == [{"table.1": [1], "a.0": [1]}]
    assert seen.why("table.0") == "read by index in embedding in the model"
    assert seen.group("table.1").kind is Kind.RESIDUAL
    assert seen.group("table.0").kind is Kind.VOCABULARY


def test_a_tied_table_is_pinned_from_both_sides(see: See) -> None:
    seen = see(
        lambda m, ids: (F.embedding(ids, m.table) @ m.a).relu() @ m.table.T, inputs=TOKENS, table=(7, 5), a=(5, 5)
    )
    assert seen.ties == [{"table.1": [1], "a.0": [1], "a.1": [1]}]


def test_a_list_of_one_position_is_a_slice(see: See) -> None:
    """`x[..., [-2], :]`: the last but one stays by itself, what is around it can go."""

    def run(m: Any, x: Tensor) -> Tensor:
        blocks = (x @ m.a).view(1, 3, 5, 4)
        return (blocks[..., [-2], :] * blocks[..., :3, :]).flatten(2) @ m.b

    seen = see(run, a=(2, 20), b=(12, 2))
    assert {"a.1": [4, 5, 6, 7], "b.0": [4, 5, 6, 7]} in seen.ties
    assert {"a.1": [1, 5, 9, 13, 17], "b.0": [1, 5, 9]} in seen.ties


def test_a_run_of_positions_is_a_slice(see: See) -> None:
    seen = see(lambda m, x: (x @ m.a)[..., [2, 3, 4]] @ m.b, a=(2, 7), b=(3, 2))
    assert seen.ties == [{"a.1": [1]}, {"a.1": [3], "b.0": [1]}, {"a.1": [6]}]


def test_all_positions_in_order_are_the_axis(see: See) -> None:
    seen = see(lambda m, x: (x @ m.a)[..., torch.arange(5)] @ m.b, a=(2, 5), b=(5, 2))
    assert seen.ties == [{"a.1": [1], "b.0": [1]}]


@pytest.mark.parametrize(
    ("read", "named"),
    [
        (lambda h: h[..., [3, 0, 2]], "index"),
        (lambda h: h.index_select(-1, torch.tensor([3, 0, 2])), "index_select"),
        (lambda h: h.gather(-1, torch.tensor([[[3, 0, 2]]]).expand(1, 3, 3)), "gather"),
    ],
)
def test_other_positions_stay(see: See, read: Callable[[Tensor], Tensor], named: str) -> None:
    seen = see(lambda m, x: read(x @ m.a) @ m.b, a=(2, 5), b=(3, 2))
    assert {"a.1": [1]} not in seen.ties
    assert seen.why("a.1") == f"read by index in {named} in the model"


def test_positions_of_the_sequence_leave_the_channels(see: See) -> None:
    seen = see(lambda m, x: (x @ m.a)[:, torch.tensor([2, 0])] @ m.b, a=(2, 5), b=(5, 2))
    assert seen.ties == [{"a.1": [1], "b.0": [1]}]


def test_a_mask_pins_what_it_picks_from(see: See) -> None:
    seen = see(lambda m, x: (x @ m.a)[:, torch.tensor([True, False, True])] @ m.b, a=(2, 5), b=(5, 2))
    assert seen.ties == [{"a.1": [1], "b.0": [1]}]
    seen = see(lambda m, x: (x @ m.a)[..., torch.arange(5) > 1] @ m.b, a=(2, 5), b=(3, 2))
    assert seen.ties == []
    assert seen.why("a.1") == seen.why("b.0") == "entries are picked by a mask in index in the model"


def test_index_tensors_broadcast_in_place_of_the_first(see: See) -> None:
    def run(m: Any, x: Tensor) -> Tensor:
        grid = m.table[torch.tensor([[0], [2]]), :, torch.tensor([1, 3, 0])]  # apart, so (2, 3) come first
        return x @ grid.sum((0, 1))[:, None].T.expand(2, 5) @ m.b

    seen = see(run, table=(4, 5, 6), b=(5, 2))
    assert {"table.1": [1], "b.0": [1]} in seen.ties
    assert seen.why("table.0") == seen.why("table.2") == "read by index in index in the model"


@pytest.mark.parametrize(
    "write",
    [
        lambda h, v: h.scatter(1, torch.tensor([0, 2])[None, :, None].expand(1, 2, 5), v),
        lambda h, v: h.scatter_add(1, torch.tensor([0, 2])[None, :, None].expand(1, 2, 5), v),
        lambda h, v: h.index_add(1, torch.tensor([0, 2]), v),
        lambda h, v: h.index_copy(1, torch.tensor([0, 2]), v),
        lambda h, v: h.index_put((torch.tensor([0]), torch.tensor([0, 2])), v[0]),
    ],
)
def test_what_is_written_meets_what_it_is_written_to(see: See, write: Callable[[Tensor, Tensor], Tensor]) -> None:
    seen = see(lambda m, x: write(x @ m.a, x[:, :2] @ m.b) @ m.c, a=(2, 5), b=(2, 5), c=(5, 2))
    assert seen.ties == [{"a.1": [1], "b.1": [1], "c.0": [1]}]


def test_positions_that_are_written_stay(see: See) -> None:
    seen = see(lambda m, x: (x @ m.a).index_fill(-1, torch.tensor([0, 2]), 1.0) @ m.b, a=(2, 5), b=(5, 2))
    assert seen.ties == []
    assert seen.why("a.1") == seen.why("b.0") == "read by index in index_fill in the model"


def router(m: Any, x: Tensor, chosen: int) -> tuple[Tensor, Tensor]:
    """Weights and numbers of the chosen experts, `(tokens, chosen)`."""
    values, experts = (x.flatten(0, 1) @ m.router).topk(chosen, -1)
    return values.softmax(-1), experts


EXPERTS = {"router": (2, 6), "up": (6, 2, 5), "down": (6, 5, 2)}


def read_by_index(m: Any, x: Tensor) -> Tensor:
    weights, experts = router(m, x, 2)
    tokens = x.flatten(0, 1).repeat_interleave(2, 0)[:, None]
    hidden = torch.relu(torch.bmm(tokens, m.up[experts.flatten()]))
    out = torch.bmm(hidden, m.down[experts.flatten()])
    return (out.view(3, 2, 2) * weights[..., None]).sum(1)


def written_one_hot(m: Any, x: Tensor) -> Tensor:
    """Weights of the experts that were not chosen are zeros, and all experts run."""
    weights, experts = router(m, x, 2)
    gates = torch.zeros(3, 6).scatter(1, experts, weights)
    hidden = torch.relu(torch.einsum("nd,edf->enf", x.flatten(0, 1), m.up))
    return torch.einsum("enf,efd,ne->nd", hidden, m.down, gates)


def told_by_class(m: Any, x: Tensor) -> Tensor:
    """`one_hot` of the chosen numbers."""
    weights, experts = router(m, x, 2)
    gates = torch.zeros(3, 2, 6).scatter(2, experts[..., None], 1.0)
    hidden = torch.relu(torch.einsum("nd,edf->enf", x.flatten(0, 1), m.up))
    return torch.einsum("enf,efd,ne->nd", hidden, m.down, (gates * weights[..., None]).sum(1))


def sigmoid_of_minus_infinity(m: Any, x: Tensor) -> Tensor:
    """Scores of the experts that were not chosen stay -inf, so that their sigmoid is zero; all experts run."""
    scores = x.flatten(0, 1) @ m.router
    values, experts = scores.topk(2, -1)
    return gated(m, x, torch.full_like(scores, -torch.inf).scatter_(1, experts, values))


def gated(m: Any, x: Tensor, scores: Tensor) -> Tensor:
    tokens = x.flatten(0, 1).repeat(6, 1) * scores.sigmoid().t().reshape(-1, 1)
    return torch.bmm(torch.relu(torch.bmm(tokens.view(6, 3, 2), m.up)), m.down).sum(0)


@pytest.mark.parametrize("run", [read_by_index, written_one_hot, told_by_class, sigmoid_of_minus_infinity])
def test_experts_meet_their_router_through_the_values_of_the_indices(
    see: See, run: Callable[[Any, Tensor], Tensor]
) -> None:
    seen = see(run, **EXPERTS)
    assert {"router.1": [1], "up.0": [1], "down.0": [1]} in seen.ties
    assert {"up.2": [1], "down.1": [1]} in seen.ties
    group = seen.group("router.1")
    assert (group.kind, group.size, group.minimum) == (Kind.EXPERTS, 6, 2)


@pytest.mark.parametrize(
    "overwrite",
    [
        lambda scores: scores.fill_(0.5),
        lambda scores: scores.view(2, 9).fill_(0.5),
        lambda scores: scores[:, 1:].copy_(torch.ones(3, 5)),
        lambda scores: scores.neg_(),
    ],
)
def test_scores_that_do_not_stay_at_minus_infinity_are_not_zero(
    see: See, overwrite: Callable[[Tensor], Tensor]
) -> None:
    def run(m: Any, x: Tensor) -> Tensor:
        values, experts = (x.flatten(0, 1) @ m.router).topk(2, -1)
        scores = torch.full((3, 6), -torch.inf)
        overwrite(scores)
        return gated(m, x, scores.scatter(1, experts, values))

    assert see(run, **EXPERTS).group("down.0").exactness is Exactness.PINNED


def test_the_best_expert_alone_is_no_router_yet(see: See) -> None:
    """Nothing is claimed of experts that `argmax` chooses."""

    def run(m: Any, x: Tensor) -> Tensor:
        best = (x.flatten(0, 1) @ m.router).argmax(-1)
        return torch.bmm(x.flatten(0, 1)[:, None], m.up[best]).squeeze(1) @ m.down

    seen = see(run, router=(2, 6), up=(6, 2, 5), down=(5, 2))
    assert seen.ties == [{"up.2": [1], "down.0": [1]}]
    assert seen.group("router.1") is seen.group("up.0")
    assert seen.why("up.0") == "not exact: argmax in the model couples its entries"


def test_a_table_of_positions_that_no_router_chose_stays(see: See) -> None:
    seen = see(lambda m, ids: (m.up[ids[0]] * m.a).sum(-1), inputs=TOKENS, up=(6, 5), a=(5,))
    assert seen.ties == [{"up.1": [1], "a.0": [1]}]
    assert seen.why("up.0") == "read by index in index in the model"


def test_ranks_of_the_chosen_stay(see: See) -> None:
    """A weight for the first and one for the second choice: the two are told apart."""
    seen = see(lambda m, x: (x @ m.router).topk(2, -1).values @ m.a, router=(2, 6), a=(2, 3))
    assert seen.why("a.0") == "ranks of topk in the model"


@pytest.mark.parametrize(
    ("operator", "named"),
    [
        (lambda h, _: h.gather(1, torch.zeros(1, 1, 2, dtype=torch.long)).sum(2, keepdim=True) * h, "read in gather"),
        (lambda h, v: h.scatter(1, torch.zeros(1, 1, 2, dtype=torch.long), v), "written in scatter"),
    ],
)
def test_a_dimension_of_which_only_the_start_is_met_stays(
    see: See, operator: Callable[[Tensor, Tensor], Tensor], named: str
) -> None:
    seen = see(lambda m, x: operator(x @ m.a, x) @ m.b, a=(2, 5), b=(5, 2))
    assert seen.ties == []
    assert f"a part of it is {named}" in seen.why("a.1")


def test_the_source_of_a_write_meets_its_index(see: See) -> None:
    where = torch.zeros(1, 3, 3, dtype=torch.long)
    see(lambda m, x: torch.zeros(1, 3, 5).scatter_add(1, where, x @ m.a) @ m.b, a=(2, 3), b=(5, 2))


def test_values_that_are_put_at_several_positions_stay(see: See) -> None:
    at = (torch.tensor([0]), torch.tensor([0, 2]), torch.tensor([1, 3]))
    see(lambda m, x: (x @ m.a).index_put(at, (x @ m.values)[0, 0]) @ m.b, a=(2, 4), values=(2, 2), b=(4, 2))


def test_a_run_does_not_go_round_the_end(see: See) -> None:
    see(lambda m, x: (x @ m.a)[..., [-1, 0]] @ m.b, a=(2, 5), b=(2, 2))


def chosen_least(m: Any, x: Tensor) -> Tensor:
    experts = (x.flatten(0, 1) @ m.router).topk(2, -1, largest=False).indices
    return m.up[experts].sum((1, 2)) @ m.down[0]


def test_experts_that_are_chosen_by_the_least_value(see: See) -> None:
    see(chosen_least, **EXPERTS)


@pytest.mark.parametrize(
    "use",
    [
        lambda m, experts: experts.float() @ m.a,
        lambda m, experts: m.table[(experts + 1) % 6].sum(2),
        lambda m, experts: (experts[..., None] == torch.arange(6)).float().sum(2) @ m.table,
        lambda m, experts: torch.bincount(experts.flatten(), minlength=6)[:, None] * m.table[0],
    ],
)
def test_numbers_of_experts_that_are_used_as_numbers(see: See, use: Callable[[Any, Tensor], Tensor]) -> None:
    see(lambda m, x: use(m, (x @ m.router).topk(2, -1).indices), router=(2, 6), a=(2, 3), table=(6, 3))
