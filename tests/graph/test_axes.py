"""Unification of axis expressions."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lorashear.graph.axes import Axis, form, form_size, positions, product, total, unify

sizes = st.integers(min_value=2, max_value=5)


def test_equal_atoms_become_one() -> None:
    a, b = Axis(6), Axis(6)
    unify(a, b, "here")
    assert a.root() is b.root()


def test_an_atom_takes_the_structure_it_meets() -> None:
    heads, dim = Axis(3), Axis(4)
    flat = Axis(12)
    unify(flat, product([heads, dim]), "view")
    assert flat.leaves() == [heads.root(), dim.root()]
    assert positions(flat, heads).tolist() == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]
    assert positions(flat, dim)[1].tolist() == [1, 5, 9]


def test_grouped_queries_split_the_heads() -> None:
    """`H * D` meets `KV x rep x D`: the query heads become key/value heads times repeats."""
    kv, rep, dim = Axis(2), Axis(3), Axis(4)
    queries = product([Axis(6), Axis(4)])
    unify(queries, product([kv, rep, dim]), "bmm")
    assert set(queries.leaves()) == {kv.root(), rep.root(), dim.root()}
    assert positions(queries, kv)[1].tolist() == list(range(12, 24))


def test_rotary_halves_pair_their_indices() -> None:
    """`[first, second]` is added to `[second, first]`: index i belongs with i + d/2."""
    first, second = Axis(5), Axis(5)
    whole = Axis(10)
    unify(whole, total([first, second]), "slice")
    unify(whole, total([second, first]), "cat")
    (leaf,) = whole.leaves()
    assert positions(whole, leaf)[2].tolist() == [2, 7]


def test_a_sum_of_products_inside_a_product() -> None:
    """A fused weight seen as three terms and as rows times a suffix."""
    fused = total([Axis(12), Axis(12), Axis(12)])
    suffix = Axis(4)
    unify(fused, product([Axis(9), suffix]), "view")
    assert positions(fused, suffix).shape == (4, 9)
    assert "pin" not in suffix.root().tags


def test_ragged_products_are_pinned_on_both_sides_with_the_place() -> None:
    a, b = product([Axis(4), Axis(6)]), product([Axis(6), Axis(4)])
    unify(a, b, "view in layer.3")
    assert all("layer.3" in leaf.tags["pin"] for leaf in [*a.leaves(), *b.leaves()])


def test_pins_absorb_instead_of_shattering() -> None:
    sequence = Axis(6)
    sequence.tag("pin", "an axis of the input")
    pieces = total([Axis(2), Axis(4)])
    unify(sequence, pieces, "cat")
    assert not sequence.root().bound
    assert all("pin" in leaf.tags for leaf in pieces.leaves())


def test_units_carry_no_index() -> None:
    a = Axis(4)
    unify(Axis(1), a, "broadcast")
    assert not a.root().bound
    assert product([Axis(1), a, Axis(1)]) is a


@given(kv=sizes, rep=sizes, dim=sizes, data=st.data())
def test_positions_and_counts_agree_with_a_tensor_of_indices(kv: int, rep: int, dim: int, data: st.DataObject) -> None:
    leaves = [Axis(kv), Axis(rep), Axis(dim)]
    flat = Axis(kv * rep * dim)
    unify(flat, product(leaves), "view")
    which = data.draw(st.integers(0, 2))
    leaf = leaves[which]
    index = data.draw(st.integers(0, leaf.size - 1))
    grid = torch.arange(kv * rep * dim).view(kv, rep, dim)
    assert positions(flat, leaf)[index].tolist() == grid.select(which, index).flatten().tolist()
    left = form_size(form(flat, {leaf.root(): leaf.size - 1}))
    assert left == flat.size // leaf.size * (leaf.size - 1)


def test_forms_of_equal_structure_are_equal() -> None:
    kv, rep, half = Axis(1), Axis(2), Axis(5)
    dim = total([half, half])
    nested = product([product([kv, rep]), dim])
    assert form(nested) == ("prod", 2, ("sum", 5, 5))
    assert form(nested, {rep: 1}) == ("sum", 5, 5)
    assert form_size(form(nested, {half: 3})) == 12


def test_positions_of_a_leaf_that_is_not_there() -> None:
    with pytest.raises(ValueError, match="does not carry"):
        positions(Axis(4), Axis(3))
