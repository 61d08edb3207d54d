"""What has to be multiplied when a cut changes a number that the model's code works with.

A root-mean-square norm divides by the width: once the residual is cut, the mean runs over fewer channels. Likewise a
factor such as `hidden_size ** 0.5` becomes another one. Both are made up for by multiplying whole parameters with
constants, found like units of measurement: every tensor of the cut model is the zeroed model's times a factor, and each
operator says how the factors of its operands and of its result hang together. In logarithms that is a linear system:

    x * y, x @ y     log a + log b          x + y, cat       all alike
    x ** k           k log a                mean over n -> m indices    log a + log(n / m)
    x * c -> x * c'  log a + log(c' / c)    anything else    0 before and after

with the parameters' factors unknown and the outputs' factor 0. The epsilon of a norm is a constant, hence it keeps its
value, and the mean beside it keeps its size: the stream itself is scaled. No norm, and no model, is known by name.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import exp, log, prod

from lorashear.graph.inference import Inference
from lorashear.graph.replay import Replay
from lorashear.graph.trace import Node, Ref

SAME = frozenset(
    """
    view _unsafe_view reshape unsqueeze squeeze flatten unflatten _reshape_alias permute transpose t expand
    slice select split split_with_sizes unbind neg abs relu leaky_relu _to_copy clone detach alias lift_fresh
    contiguous to dropout native_dropout sum index index_select gather embedding repeat flip constant_pad_nd
    topk sort amax max linalg_vector_norm unfold roll tril triu view_as_real view_as_complex cumsum
""".split()
)
PRODUCTS = frozenset(["mul", "mm", "bmm", "mv", "dot"])
SUMS = frozenset(
    """
    add sub rsub where maximum minimum cat stack copy masked_fill
""".split()
)
POWERS = {"sqrt": 0.5, "rsqrt": -0.5, "reciprocal": -1.0, "square": 2.0}

Linear = dict[int, float]
"""Unknown -> coefficient; `CONSTANT` holds what is known."""

CONSTANT = -1
EMPTY = frozenset(["zeros", "empty", "new_zeros", "new_empty", "zeros_like", "empty_like"])
TOLERANCE = 1e-9


class NoScaleError(Exception):
    """No multiples of the parameters make the cut model equal."""


@dataclass
class _System:
    """Linear equations over the logarithms of the parameters' factors, solved as they come."""

    numel: Mapping[int, int]
    solved: dict[int, Linear] = field(default_factory=dict)

    def reduce(self, form: Linear) -> Linear:
        """The form with solved unknowns put in."""
        while any(key in self.solved for key in form):
            result: Linear = {}
            for key, value in form.items():
                parts = self.solved.get(key, {key: 1.0})
                for inner, factor in parts.items():
                    result[inner] = result.get(inner, 0.0) + value * factor
            form = result
        return {key: value for key, value in form.items() if abs(value) > TOLERANCE}

    def equate(self, left: Linear, right: Linear, where: str) -> None:
        """States that two forms are equal; the smallest parameter in them takes what is needed."""
        form = self.reduce(_combined((left, 1.0), (right, -1.0)))
        unknowns = [key for key in form if key != CONSTANT]
        if not unknowns:
            if form:
                raise NoScaleError(where)
            return
        pivot = min(unknowns, key=lambda key: (self.numel.get(key, 0), -key))
        self.solved[pivot] = {k: -v / form[pivot] for k, v in form.items() if k != pivot}


def _combined(*terms: tuple[Linear, float]) -> Linear:
    result: Linear = {}
    for form, factor in terms:
        for key, value in form.items():
            result[key] = result.get(key, 0.0) + value * factor
    return result


@dataclass(frozen=True)
class Differences:
    """Numbers that the cut model's code works with and the whole model's does not, all else being equal."""

    numbers: Mapping[int, list[tuple[float, float]]] = field(default_factory=dict)
    """Index of a node -> (number in the whole model, number in the cut one)."""
    factors: Mapping[int, float] = field(default_factory=dict)
    """Constant tensor -> what it is multiplied with in the cut model."""

    def __bool__(self) -> bool:
        return bool(self.numbers or self.factors)


@dataclass(frozen=True)
class Scale:
    """`parameter := (parameter + offset) * factor - offset`: the offset is what the code adds to it (`1 + weight`)."""

    factor: float
    offset: float = 0.0


def rescaling(
    inference: Inference,
    replay: Replay,
    differences: Differences | None = None,
) -> dict[str, Scale]:
    """Factors of parameters that make the cut program give the zeroed program's outputs.

    Args:
        inference: of the whole model.
        replay: which of it stays.
        differences: numbers that the cut model works with and the whole one does not (`proof.compare`).

    Raises:
        NoScaleError: when there are none; its message names the operator.
    """
    trace = inference.trace
    numel = {number: prod(inference.shape(number)) for number in trace.parameters}
    system = _System(numel)
    differences = differences or Differences()
    if not differences and not _averages(inference, replay):
        return {}
    offsets = _offsets(inference)
    degree: dict[int, Linear] = {number: {number: 1.0} for number in trace.parameters}
    degree |= {number: {CONSTANT: log(factor)} for number, factor in differences.factors.items()}
    for at, node in enumerate(trace.nodes):
        out = _degree(node, degree, inference, replay, differences.numbers.get(at, []), system, offsets)
        for number in node.outs:
            if number not in differences.factors:
                degree[number] = out
    for number in trace.outputs:
        system.equate(degree.get(number, {}), {}, "the model's output")
    found = {}
    for number, name in trace.parameters.items():
        value = system.reduce({number: 1.0}).get(CONSTANT, 0.0)  # unknowns that stay free are 0
        if abs(value) > TOLERANCE:
            found[name] = Scale(exp(value), offsets.get(number, 0.0))
    return found


def _averages(inference: Inference, replay: Replay) -> bool:
    return any(site.kind == "mean" and replay.mask(site.operands[0][1]) is not None for site in inference.sites)


def _offsets(inference: Inference) -> dict[int, float]:
    """Parameters that enter the model only as `parameter + number`."""
    readers: dict[int, list[Node]] = {}
    origin: dict[int, int] = {number: number for number in inference.trace.parameters}
    for node in inference.trace.nodes:
        for number in node.inputs():
            if number not in origin:
                continue
            if node.name in ("_to_copy", "detach", "alias", "clone"):
                origin.update(dict.fromkeys(node.outs, origin[number]))
            else:
                readers.setdefault(origin[number], []).append(node)
    found = {}
    for number, nodes in readers.items():
        numbers = {_added(node) for node in nodes}
        if len(numbers) == 1 and (added := numbers.pop()) is not None:
            found[number] = added
    return found


def _added(node: Node) -> float | None:
    others = [arg for arg in node.args[:2] if not isinstance(arg, Ref)]
    simple = node.name == "add" and len(others) == 1 and not node.kwargs and isinstance(others[0], (int, float))
    return float(others[0]) if simple else None


def _degree(
    node: Node,
    degree: Mapping[int, Linear],
    inference: Inference,
    replay: Replay,
    scalars: list[tuple[float, float]],
    system: _System,
    offsets: Mapping[int, float],
) -> Linear:
    refs = list(node.inputs())
    of = [degree.get(number, {}) for number in refs]
    name = node.name
    numbers = [arg for arg in node.args if isinstance(arg, (int, float)) and not isinstance(arg, bool)]
    if name in EMPTY:  # zeros have any factor: that of what is written into them
        return {-2 - node.outs[0]: 1.0}
    if not any(of) and not scalars and name != "mean":
        return {}
    multiplies = name in PRODUCTS or name == "div"
    if scalars and not (multiplies and all(before * after > 0 for before, after in scalars)):
        raise NoScaleError(f"{node.where} works with another number")
    if name in SAME and of:
        return of[0]
    if multiplies:
        changed = sum(log(after / before) for before, after in scalars)
        sign = -1.0 if name == "div" else 1.0
        rest = [(form, sign) for form in of[1:]]
        return _combined((of[0], 1.0), *rest, ({CONSTANT: sign * changed}, 1.0))
    if name in POWERS:
        return _combined((of[0], POWERS[name]))
    if name == "pow" and len(refs) == 1 and isinstance(node.args[0], Ref) and numbers:
        return _combined((of[0], float(numbers[0])))
    if name == "mean":
        dims = {id(axis): axis for site in inference.sites if site.node is node for _, axis in site.operands}
        shrunk = sum(log(axis.size / replay.size(axis)) for axis in dims.values())
        return _combined((of[0], 1.0), ({CONSTANT: shrunk}, 1.0))
    if name == "add" and len(refs) == 1 and refs[0] in offsets and _added(node) is not None:
        return of[0]
    if name in SUMS:
        return _alike(node, refs, of, inference, system)
    if name in ("addmm", "baddbmm", "addmv"):
        result = _combined((of[1], 1.0), (of[2], 1.0))
        system.equate(of[0], result, node.where)
        return result
    if name == "convolution":
        result = _combined((of[0], 1.0), (of[1], 1.0))
        if len(of) > 2:
            system.equate(of[2], result, node.where)
        return result
    for form in of:
        system.equate(form, {}, node.where)
    return {}


def _alike(node: Node, refs: list[int], of: list[Linear], inference: Inference, system: _System) -> Linear:
    """Terms of a sum have one factor; a number among them other than 0 has the factor 1."""
    if node.name == "where":
        refs, of = refs[1:], of[1:]
    if node.name == "masked_fill":
        refs, of = refs[:1], of[:1]
    others = [arg for arg in node.args[:2] if isinstance(arg, float | int) and not isinstance(arg, bool)]
    known = [form for number, form in zip(refs, of, strict=True) if not _vanishes(number, inference)]
    if node.name in ("add", "sub", "rsub") and any(others):
        known.append({})
    for form in known[1:]:
        system.equate(known[0], form, node.where)
    return known[0] if known else {}


def _vanishes(number: int, inference: Inference) -> bool:
    """Zeros and -inf have every factor: what a mask adds, what a padding puts in."""
    value = inference.trace.constants.get(number)
    return value is not None and bool(((value == 0) | value.isinf()).all())
