"""Operators that make a tensor from nothing but sizes."""

from __future__ import annotations

from lorashear.graph.axes import Axis
from lorashear.graph.inference import Inference, Rule
from lorashear.graph.trace import Node

CONSTANT = """
    zeros ones full empty scalar_tensor new_zeros new_ones new_full new_empty rand randn randint randperm
    empty_strided new_empty_strided _local_scalar_dense nonzero item bincount histc tril_indices triu_indices
    hann_window is_all_true _is_all_true is_nonzero equal
""".split()
INDEX_VALUES = ["arange", "linspace", "eye", "logspace"]
"""Factories whose values count the index (the slopes of ALiBi). A replay cuts these values; the model's own code would
count anew, so such groups are exact but not realisable."""


def factory(inference: Inference, node: Node) -> None:
    """New tensors have new axes; those whose values count the index are tagged."""
    for out in node.outs:
        axes = [Axis(size) for size in inference.shape(out)]
        if node.name in INDEX_VALUES:
            for axis in axes:
                axis.tag("index-value", node.where)
        inference.assign(out, axes, node.where)


RULES: dict[str, Rule] = dict.fromkeys(CONSTANT + INDEX_VALUES, factory)
