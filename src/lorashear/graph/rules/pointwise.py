"""Operators that work entry by entry."""

from __future__ import annotations

from lorashear.graph.axes import Axis, unify
from lorashear.graph.inference import Inference, Rule
from lorashear.graph.trace import Node, Ref

NAMES = """
    add sub rsub mul div pow neg abs exp exp2 expm1 log log2 log1p sqrt rsqrt reciprocal square sin cos tanh
    sigmoid silu gelu relu softplus log_sigmoid_forward erf erfinv clamp clamp_min clamp_max minimum maximum
    where masked_fill eq ne lt le gt ge bitwise_and bitwise_or bitwise_xor bitwise_not logical_and logical_or
    logical_xor logical_not floor ceil trunc floor_divide remainder fmod round sign leaky_relu elu celu selu
    hardtanh hardswish hardsigmoid relu6 mish threshold isnan isinf isfinite addcmul addcdiv lerp atan2 copy
    _to_copy clone detach alias lift_fresh lift contiguous to native_dropout dropout polar nan_to_num zero
    fill heaviside sinh cosh atan logit frac complex real imag conj _conj bernoulli xlogy isneginf expand_as
    type_as set normal uniform exponential rand_like randn_like zeros_like ones_like full_like empty_like
    empty_strided_like
""".split()

ACTIVATIONS = frozenset(
    """
    silu gelu relu sigmoid tanh softplus erf exp expm1 leaky_relu elu hardswish mish relu6 log_sigmoid_forward
""".split()
)


def elementwise(inference: Inference, node: Node) -> None:
    """Operands align from the right; equal sizes are equal axes, size 1 broadcasts."""
    refs = [Ref(number) for number in node.inputs()]
    for out in node.outs:
        shape = inference.shape(out)
        axes: list[Axis | None] = [None] * len(shape)
        for ref in refs:
            operand = inference.axes(ref)
            for back in range(1, min(len(operand), len(shape)) + 1):
                axis = operand[-back]
                if axis.size != shape[-back]:
                    continue
                known = axes[-back]
                if known is None:
                    axes[-back] = axis
                else:
                    unify(known, axis, node.where)
        if node.name in ACTIVATIONS:
            for each in axes:
                if each is not None:
                    each.tag("activated", node.where)
        inference.assign(out, [axis or Axis(size) for axis, size in zip(axes, shape, strict=True)], node.where)
    if len(refs) == 1 and inference.shape(refs[0].number) == inference.shape(node.outs[0]):
        inference.same_parameter(refs[0].number, node.outs[0])


RULES: dict[str, Rule] = dict.fromkeys(NAMES, elementwise)
