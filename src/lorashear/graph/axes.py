"""Axis expressions and their unification: the type inference under the dependency graph.

Every dimension of every traced tensor is one `Axis` of a union-find forest. A root is *free* (an atom), or bound once
to a product of parts (row-major, outermost first: a `view` that splits `heads * head_dim`) or to a sum of parts (a
`cat`, a `split` of a fused weight). Rules call `unify`; the forest is the solution, nothing is solved afterwards.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import gcd, prod

import torch
from torch import Tensor


class Axis:
    """One node of the forest. Compare and hash by identity of its root through `root()`."""

    __slots__ = ("_parent", "bound", "parts", "size", "tags")

    def __init__(self, size: int) -> None:
        self.size = size
        self._parent: Axis | None = None
        self.bound: str = ""  # "", "prod" or "sum"
        self.parts: tuple[Axis, ...] = ()
        self.tags: dict[str, str] = {}  # kind of tag -> where and why it was first set

    def __repr__(self) -> str:
        root = self.root()
        if not root.bound:
            return f"{root.size}{'!' if 'pin' in root.tags else ''}"
        sign = "*" if root.bound == "prod" else "+"
        return "(" + sign.join(map(repr, root.parts)) + ")"

    def root(self) -> Axis:
        """The representative of all axes that are equal to this one."""
        node = self
        while node._parent is not None:
            node = node._parent
        walk = self
        while walk._parent is not None and walk._parent is not node:  # path compression keeps long chains cheap
            walk._parent, walk = node, walk._parent
        return node

    def leaves(self) -> list[Axis]:
        """Distinct atoms below this axis, in order of first occurrence; unit axes are left out."""
        found: dict[Axis, None] = {}
        stack = [self.root()]
        while stack:
            axis = stack.pop()
            if axis.bound:
                stack.extend(part.root() for part in reversed(axis.parts))
            elif axis.size != 1:
                found[axis] = None
        return list(found)

    def tag(self, kind: str, why: str) -> None:
        """Marks every atom below; the first reason given stays."""
        for leaf in self.leaves():
            leaf.tags.setdefault(kind, why)

    @property
    def pinned(self) -> bool:
        """True when every atom below is pinned."""
        leaves = self.leaves()
        return bool(leaves) and all("pin" in leaf.tags for leaf in leaves)


def product(parts: Sequence[Axis]) -> Axis:
    """A new axis bound to `prod[parts]`; unit parts are dropped, a single part is returned as it is."""
    real = [part for part in parts if part.size != 1]
    if len(real) == 1:
        return real[0]
    size = 1
    for part in real:
        size *= part.size
    axis = Axis(size)
    if real:
        axis.bound, axis.parts = "prod", tuple(real)
    return axis


def total(parts: Sequence[Axis]) -> Axis:
    """A new axis bound to `sum[parts]`; empty parts are dropped, a single part is returned as it is."""
    real = [part for part in parts if part.size != 0]
    if len(real) == 1:
        return real[0]
    axis = Axis(sum(part.size for part in real))
    if real:
        axis.bound, axis.parts = "sum", tuple(real)
    return axis


def unify(a: Axis, b: Axis, where: str) -> None:
    """Makes two axes equal index by index, refining atoms where their structures differ.

    Never raises: axes that cannot be equal are pinned on both sides with `where` (operator and module) as the reason.
    """
    a, b = a.root(), b.root()
    if a is b or a.size == 1 or b.size == 1:  # a unit axis carries no index
        return
    if a.size != b.size:
        _conflict(a, b, f"sizes {a.size} and {b.size} meet at {where}")
    elif a.bound and a.pinned and not b.bound:
        _absorb(a, b)
    elif b.bound and b.pinned and not a.bound:
        _absorb(b, a)
    elif a.pinned != b.pinned and a.bound != b.bound:
        _absorb(*((a, b) if a.pinned else (b, a)))
    elif not a.bound:
        _link(a, b, where)
    elif not b.bound:
        _link(b, a, where)
    elif a.bound == b.bound:
        _zip(a, b, where)
    else:
        _mixed(*((a, b) if a.bound == "prod" else (b, a)), where)


def _absorb(pinned: Axis, other: Axis) -> None:
    """Pins spread without structure: a sequence axis cut into pieces must not shatter what it meets."""
    for kind in ("pin", "outside"):
        why = next((leaf.tags[kind] for leaf in pinned.leaves() if kind in leaf.tags), None)
        if why is not None:
            other.tag(kind, why)


def _conflict(a: Axis, b: Axis, why: str) -> None:
    a.tag("pin", why)
    b.tag("pin", why)


def _link(atom: Axis, target: Axis, where: str) -> None:
    if target.bound and atom in target.leaves():
        _conflict(atom, target, f"an axis would contain itself at {where}")
        return
    atom._parent = target
    for kind, why in atom.tags.items():
        target.tag(kind, why)


def _zip(a: Axis, b: Axis, where: str) -> None:
    """Two products, or two sums: walk both lists, splitting the larger head where sizes differ."""
    is_product = a.bound == "prod"
    left, right = list(a.parts), list(b.parts)
    while left and right:
        x, y = left.pop(0).root(), right.pop(0).root()
        if x.size == y.size:
            unify(x, y, where)
            continue
        if x.size > y.size:
            x, y, left, right = y, x, right, left
        if is_product and y.size % x.size:
            _conflict(a, b, f"ragged split ({x.size} of {y.size}) at {where}")
            return
        rest = Axis(y.size // x.size if is_product else y.size - x.size)
        head = Axis(x.size)
        unify(y, product([head, rest]) if is_product else total([head, rest]), where)
        unify(head, x, where)
        right.insert(0, rest)


def _mixed(prod: Axis, total_: Axis, where: str) -> None:
    """A product meets a sum: each term of the sum is some rows of the product's suffix (a fused qkv seen two ways)."""
    unit = 0
    for part in total_.parts:
        unit = gcd(unit, part.size)
    suffix: list[Axis] = []
    size = 1
    parts = list(prod.parts)
    while parts and unit % (size * parts[-1].size) == 0:
        size *= parts[-1].size
        suffix.insert(0, parts.pop())
    if not suffix:
        _conflict(prod, total_, f"a product and a sum without a common unit at {where}")
        return
    tail = product(suffix)
    rows = [part.size // size for part in total_.parts]
    if parts:
        leading = product(parts)
        if all(row == 1 for row in rows):
            leading.tag("pin", f"terms of a sum are told apart at {where}")
        else:
            row_axes = [Axis(row) for row in rows]
            unify(leading, total(row_axes), where)
            for part, row in zip(total_.parts, row_axes, strict=True):
                unify(part, product([row, tail]), where)
            return
    for part in total_.parts:
        unify(part, tail, where)


Form = int | tuple[object, ...]
"""An axis as plain data: a size, or ("prod", parts...) or ("sum", parts...) of forms."""


def form(axis: Axis, kept: Mapping[Axis, int] | None = None) -> Form:
    """The structure of an axis once only `kept[leaf]` indices of some leaves are left, in one normal form.

    Nested products and sums are flat, units and empty terms are gone, so that equal structures compare equal.
    """
    axis = axis.root()
    if not axis.bound:
        return (kept or {}).get(axis, axis.size)
    neutral = 1 if axis.bound == "prod" else 0
    parts: list[object] = []
    for part in axis.parts:
        below = form(part, kept)
        if isinstance(below, tuple) and below[0] == axis.bound:
            parts.extend(below[1:])
        elif below != neutral:
            parts.append(below)
    if len(parts) < 2:
        return parts[0] if parts else neutral  # type: ignore[return-value]
    return (axis.bound, *parts)


def form_size(of: Form) -> int:
    """Number of indices of an axis of this form."""
    if isinstance(of, int):
        return of
    sizes = [form_size(part) for part in of[1:]]  # type: ignore[arg-type]
    return prod(sizes) if of[0] == "prod" else sum(sizes)


def positions(axis: Axis, leaf: Axis) -> Tensor:
    """Indices along `axis` that belong to each index of `leaf`: `(leaf.size, repeats)` int64, repeats ascending."""
    leaf = leaf.root()
    found = _positions(axis.root(), leaf)
    if found is None:
        raise ValueError(f"axis {axis!r} does not carry leaf {leaf!r}")
    rows = found.sort(dim=1).values
    if rows.shape[1] > 1 and bool((rows.diff(dim=1) == 0).any()):  # the leaf lies twice in a product: on its diagonal
        width = max(len(row.unique()) for row in rows)
        rows = torch.stack(
            [torch.nn.functional.pad(u := row.unique(), (0, width - len(u)), value=int(u[-1])) for row in rows]
        )
    return rows


def _positions(axis: Axis, leaf: Axis) -> Tensor | None:
    if axis is leaf:
        return torch.arange(leaf.size).unsqueeze(1)
    found: list[Tensor] = []
    if axis.bound == "sum":
        start = 0
        for part in axis.parts:
            below = _positions(part.root(), leaf)
            if below is not None:
                found.append(below + start)
            start += part.size
    elif axis.bound == "prod":
        sizes = [part.size for part in axis.parts]
        for at, part in enumerate(axis.parts):
            below = _positions(part.root(), leaf)
            if below is None:
                continue
            inner = 1
            for size in sizes[at + 1 :]:
                inner *= size
            outer = axis.size // (inner * part.size)
            # index along the axis = outer * (part * inner) + below * inner + inner index
            outer_steps = torch.arange(outer) * (part.size * inner)
            inner_steps = torch.arange(inner)
            grid = outer_steps[:, None, None, None] + (below * inner)[None, :, :, None] + inner_steps
            found.append(grid.permute(1, 0, 2, 3).reshape(leaf.size, -1))
    return torch.cat(found, dim=1) if found else None
