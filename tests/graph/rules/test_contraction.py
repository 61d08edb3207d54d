"""Sums over an axis of two operands."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

See = Callable[..., Any]


def test_a_matrix_product_ties_its_columns_to_the_next_rows(see: See) -> None:
    seen = see(lambda m, x: torch.relu(x @ m.a) @ m.b, a=(2, 5), b=(5, 2))
    assert seen.ties == [{"a.1": [1], "b.0": [1]}]
    assert seen.why("a.0") == "an axis of the input x"
    assert seen.why("b.1") == "reaches the model's output"


def test_a_bias_goes_with_the_rows_it_is_added_to(see: See) -> None:
    seen = see(lambda m, x: F.linear(F.linear(x, m.a, m.bias), m.b), a=(5, 2), bias=(5,), b=(2, 5))
    assert seen.ties == [{"a.0": [1], "bias.0": [1], "b.1": [1]}]


def test_a_vector_contracts_a_whole_dimension(see: See) -> None:
    seen = see(lambda m, x: (x @ m.a) @ m.v, a=(2, 5), v=(5,))
    assert seen.ties == [{"a.1": [1], "v.0": [1]}]


def test_two_vectors_contract(see: See) -> None:
    seen = see(lambda m, x: x * torch.dot(m.u, m.v), u=(4,), v=(4,))
    assert seen.ties == [{"u.0": [1], "v.0": [1]}]


def test_a_vector_times_a_matrix(see: See) -> None:
    assert see(lambda m, x: x * (m.v @ m.w), v=(4,), w=(4, 2)).ties == [{"v.0": [1], "w.0": [1]}]


def test_a_batch_of_products_ties_the_batches(see: See) -> None:
    def run(m: Any, x: torch.Tensor) -> torch.Tensor:
        return torch.bmm(torch.bmm(x.expand(4, 3, 2), m.a), m.b).sum(0)

    assert see(run, a=(4, 2, 5), b=(4, 5, 2)).ties == [{"a.0": [1], "b.0": [1]}, {"a.2": [1], "b.1": [1]}]


def test_a_batch_of_products_with_a_bias(see: See) -> None:
    def run(m: Any, x: torch.Tensor) -> torch.Tensor:
        hidden = torch.baddbmm(m.bias, x.expand(4, 3, 2), m.a)
        return torch.einsum("ens,es->n", torch.relu(hidden), m.b)

    assert see(run, a=(4, 2, 5), bias=(4, 1, 5), b=(4, 5)).ties == [
        {"a.0": [1], "bias.0": [1], "b.0": [1]},
        {"a.2": [1], "bias.2": [1], "b.1": [1]},
    ]


def test_a_contraction_of_what_no_weight_makes_zero_is_not_exact(see: See) -> None:
    seen = see(lambda m, x: torch.sigmoid(x @ m.a) @ torch.sigmoid(x @ m.b).mT, a=(2, 5), b=(2, 5))
    assert seen.ties == []
    assert seen.why("a.1") == "not exact: bmm in the model couples its entries"


def test_equations_are_told_apart_and_right_hand_sides_are_not(see: See) -> None:
    def run(m: Any, x: torch.Tensor) -> torch.Tensor:
        right = (x @ m.b).transpose(1, 2).reshape(4, 15)
        solved = torch.linalg.solve_triangular(m.a.tril() + 9 * torch.eye(4), right, upper=False)
        return solved.reshape(4, 5, 3).sum(1).sum(0)

    seen = see(run, a=(4, 4), b=(2, 20))
    assert "told apart by tril" in seen.why("a.0")
    assert {"b.1": [1, 6, 11, 16]} in seen.ties
    assert "linalg_solve_triangular" in seen.why("b.1")


def test_a_convolution_contracts_its_channels(see: See) -> None:
    def run(m: Any, x: torch.Tensor) -> torch.Tensor:
        return F.conv1d(torch.relu(F.conv1d(x.mT, m.a, m.bias, padding=1)), m.b)

    seen = see(run, a=(5, 2, 3), bias=(5,), b=(4, 5, 1))
    assert seen.ties == [{"a.0": [1], "bias.0": [1], "b.1": [1]}]
    assert "positions of convolution" in seen.why("a.2")


def test_a_transposed_convolution_has_its_weight_the_other_way_round(see: See) -> None:
    def run(m: Any, x: torch.Tensor) -> torch.Tensor:
        return F.conv1d(F.conv_transpose1d(F.conv1d(x.mT, m.a), m.b, m.bias), m.c)

    assert see(run, a=(4, 2, 1), b=(4, 5, 2), bias=(5,), c=(3, 5, 1)).ties == [
        {"a.0": [1], "b.0": [1]},
        {"b.1": [1], "bias.0": [1], "c.1": [1]},
    ]


def test_a_depthwise_convolution_keeps_its_channels(see: See) -> None:
    def run(m: Any, x: torch.Tensor) -> torch.Tensor:
        return F.conv1d((x @ m.a).mT, m.taps, m.bias, padding=1, groups=6).mT @ m.b

    assert see(run, a=(2, 6), taps=(6, 1, 3), bias=(6,), b=(6, 2)).ties == [
        {"a.1": [1], "taps.0": [1], "bias.0": [1], "b.0": [1]}
    ]


def test_groups_of_channels_stay_apart_and_contract_within(see: See) -> None:
    def run(m: Any, x: torch.Tensor) -> torch.Tensor:
        return F.conv1d((x @ m.a).mT, m.taps, m.bias, groups=3).mT @ m.b

    seen = see(run, a=(2, 6), taps=(12, 2, 1), bias=(12,), b=(12, 2))
    second = list(range(4, 8))
    assert {"a.1": [2, 3], "taps.0": second, "bias.0": second, "b.0": second} in seen.ties
    assert {"a.1": [1, 3, 5], "taps.1": [1]} in seen.ties
    assert {"taps.0": [1, 5, 9], "bias.0": [1, 5, 9], "b.0": [1, 5, 9]} in seen.ties


def test_a_depthwise_convolution_may_make_several_channels_of_each(see: See) -> None:
    seen = see(lambda m, x: F.conv1d((x @ m.a).mT, m.taps, groups=3).mT @ m.b, a=(2, 3), taps=(6, 1, 1), b=(6, 2))
    assert {"a.1": [1], "taps.0": [2, 3], "b.0": [2, 3]} in seen.ties


def test_groups_of_a_transposed_convolution_stay(see: See) -> None:
    def run(m: Any, x: torch.Tensor) -> torch.Tensor:
        return F.conv_transpose1d((x @ m.a).mT, m.taps, groups=3).mT @ m.b

    seen = see(run, a=(2, 6), taps=(6, 2, 1), b=(6, 2))
    assert seen.ties == []
    assert seen.why("a.1") == seen.why("taps.1") == seen.why("b.0") == "grouped channels of convolution in the model"


def test_the_module_is_named(see: See) -> None:
    seen = see(lambda m, x: m.conv((x @ m.a).mT), a=(2, 6), conv=nn.ConvTranspose1d(6, 6, 1, groups=3))
    assert seen.why("a.1") == "grouped channels of convolution in conv"
