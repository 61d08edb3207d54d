"""Node groups: which slices of which parameters can only be removed together.

A *structure* is one index of a node group with every parameter slice that depends on it (paper: minimally removable
structure). The result of `lorashear.discover` is a `Graph`; it is plain data and knows nothing of training or files.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from functools import cached_property
from math import prod

import torch
from torch import Tensor

from lorashear.errors import PlanError, did_you_mean
from lorashear.graph.axes import Axis, Form, form, form_size, positions
from lorashear.graph.geometry import Geometry


class Kind(StrEnum):
    """What a node group is; read off the trace, never off a class name."""

    HEADS = "heads"
    """Whole attention heads; under grouped-query attention one key/value head with its query heads."""
    QUERY_SLOTS = "query-slots"
    """The same query head of every key/value group: keeps the number of key/value heads."""
    CHANNELS = "ffn-channels"
    HEAD_DIM = "head-dim"
    """Dimensions inside the heads: of query and key, or of value."""
    RESIDUAL = "residual"
    VOCABULARY = "vocabulary"
    RANK = "lora-rank"
    OTHER = "other"


@dataclass(frozen=True)
class Member:
    """One dimension of one parameter (or buffer) that carries the group's axis."""

    parameter: str
    """Name in the traced model's `named_parameters()` or `named_buffers()`."""
    dim: int
    adapter: bool
    """True for a LoRA factor, which is merged away before the model is counted or saved."""
    buffer: bool
    axis: Axis = field(repr=False, compare=False)
    leaf: Axis = field(repr=False, compare=False)

    @property
    def rows(self) -> Tensor:
        """Indices along `dim`, `(structures, repeats)` int64: row i lists what belongs to structure i."""
        return positions(self.axis, self.leaf)


@dataclass(frozen=True)
class Consumer:
    """A module whose input features carry the group's axis: where a structure gate sits (design.md 1.1)."""

    module: str
    """Path of the module that receives the activations, `(batch, seq, features)`: the LoRA wrapper where there is
    one."""
    parameter: str
    """The base weight that contracts the features."""
    axis: Axis = field(repr=False, compare=False)
    leaf: Axis = field(repr=False, compare=False)

    @property
    def rows(self) -> Tensor:
        """Indices along the features, `(structures, repeats)` int64."""
        return positions(self.axis, self.leaf)

    @property
    def features(self) -> int:
        """Width of the module's input."""
        return self.axis.size


@dataclass(frozen=True)
class NodeGroup:
    """Structures that are alike: one axis, with every parameter slice along it."""

    name: str
    """The same with and without adapters, so that a plan fits both."""
    kind: Kind
    size: int
    """Number of structures."""
    members: tuple[Member, ...]
    consumers: tuple[Consumer, ...]
    prunable: bool
    reason: str
    """Why it is not prunable (operator and module named), or empty."""
    layer: int | None
    """Index of the decoder layer it lies in; None when it spans layers or lies outside them."""
    role: str
    """Groups of equal role are the same thing in different layers; a uniform shape gives them equal widths."""


@dataclass(frozen=True)
class ParameterInfo:
    """Shape of a traced parameter as axis expressions, one a dimension."""

    name: str
    axes: tuple[Axis, ...]
    adapter: bool
    decoder: bool
    """True when it lies in one of the decoder layers."""

    @property
    def numel(self) -> int:
        """Entries of the parameter."""
        return prod(axis.size for axis in self.axes)


@dataclass(frozen=True, repr=False)
class Graph:
    """Node groups of one model, and the axes of its parameters. Immutable; `model` and weights are not referenced."""

    groups: tuple[NodeGroup, ...]
    parameters: Mapping[str, ParameterInfo]
    """Every parameter once: a tied weight counts under its first name."""
    aliases: Mapping[str, str]
    """Second names of tied parameters -> first name."""
    layers_path: str
    """Path of the list of decoder layers, e.g. `model.layers`, in the model without adapters."""
    num_layers: int
    geometry: Geometry | None = None
    """What the model's configuration can express; None for a module without one."""
    canonical: Mapping[str, str] = field(default_factory=dict)
    """Parameter -> its name in the model without adapters."""

    def __repr__(self) -> str:
        return f"Graph({len(self.groups)} groups, {len(self.prunable)} prunable, {self.num_parameters:,} parameters)"

    @cached_property
    def _by_name(self) -> dict[str, NodeGroup]:
        return {group.name: group for group in self.groups}

    def __getitem__(self, name: str) -> NodeGroup:
        if name in self._by_name:
            return self._by_name[name]
        raise PlanError(f'no node group "{name}" in this model; {did_you_mean(name, [g.name for g in self.groups])}')

    def __iter__(self) -> Iterator[NodeGroup]:
        return iter(self.groups)

    @property
    def prunable(self) -> tuple[NodeGroup, ...]:
        """The groups that may lose structures."""
        return tuple(group for group in self.groups if group.prunable)

    @property
    def num_parameters(self) -> int:
        """Base parameters (adapters left out, tied weights once)."""
        return sum(p.numel for p in self.parameters.values() if not p.adapter)

    @property
    def num_decoder_parameters(self) -> int:
        """Base parameters of the decoder layers."""
        return sum(p.numel for p in self.parameters.values() if p.decoder and not p.adapter)

    def kept_parameters(self, removed: Mapping[str, Sequence[int]]) -> int:
        """Base parameters left once `removed` (group name -> structures) is cut, counted on the cut shapes."""
        kept = self._kept(removed)
        total = 0
        for info in self.parameters.values():
            if not info.adapter:
                total += prod(form_size(form(axis, kept)) for axis in info.axes)
        return total

    def cut_forms(self, removed: Mapping[str, Sequence[int]]) -> dict[tuple[str, int], Form]:
        """(base parameter, dimension) -> its structure once `removed` is cut, for dimensions that carry a removed
        structure.

        Parameters go by their names in the model without adapters.
        """
        kept = self._kept(removed)
        return {
            (self.canonical.get(name, name), dim): form(axis, kept)
            for name, info in self.parameters.items()
            if not info.adapter
            for dim, axis in enumerate(info.axes)
            if not kept.keys().isdisjoint(axis.leaves())
        }

    def _kept(self, removed: Mapping[str, Sequence[int]]) -> dict[Axis, int]:
        groups = [self[name] for name in removed]
        return {g.members[0].leaf: g.size - len(set(removed[g.name])) for g in groups if removed[g.name]}

    def keep_masks(self, removed: Mapping[str, Sequence[int]]) -> Iterator[tuple[str, int, Tensor]]:
        """Yields (parameter or buffer, dimension, boolean mask of what stays) for every dimension that `removed`
        cuts."""
        gone: dict[Axis, Tensor] = {}
        for name, structures in removed.items():
            if structures:
                gone[self[name].members[0].leaf] = torch.tensor(sorted(set(structures)))
        owners = [(name, dim, axis) for name, info in self.parameters.items() for dim, axis in enumerate(info.axes)]
        owners += [(m.parameter, m.dim, m.axis) for name in removed for m in self[name].members if m.buffer]
        for name, dim, axis in owners:
            leaves = [leaf for leaf in axis.leaves() if leaf in gone]
            if leaves:
                mask = torch.ones(axis.size, dtype=torch.bool)
                for leaf in leaves:
                    mask[positions(axis, leaf)[gone[leaf]].flatten()] = False
                yield name, dim, mask
