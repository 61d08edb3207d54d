"""Node groups: which slices of which parameters can only be removed together.

A *structure* is one index of a node group with every parameter slice that depends on it (paper: minimally removable
structure). The result of `lorashear.discover` is a `Graph`; it is plain data and knows nothing of training or files.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from functools import cached_property
from math import prod

import torch
from torch import Tensor

from lorashear.errors import PlanError, did_you_mean
from lorashear.graph.axes import Axis, Form, form, form_size, positions
from lorashear.graph.geometry import Geometry
from lorashear.graph.inference import Inference
from lorashear.graph.replay import keep_mask


class Kind(StrEnum):
    """What a node group is; read off the trace, never off a class name."""

    HEADS = "heads"
    """Whole attention heads; under grouped-query attention one key/value head with its query heads."""
    QUERY_SLOTS = "query-slots"
    """The same query head of every key/value group: keeps the number of key/value heads."""
    CHANNELS = "ffn-channels"
    """Channels of a feed-forward network; in a mixture, the same channel of every expert."""
    EXPERTS = "experts"
    """Experts of a mixture, with the router's rows."""
    MIXER = "mixer-channels"
    """Channels or heads along which a state-space, convolution or linear-attention layer mixes the sequence."""
    LATENT = "latent-channels"
    """The narrow middle of two matrices, without an activation in between."""
    HEAD_DIM = "head-dim"
    """Dimensions inside the heads: of query and key, or of value."""
    RESIDUAL = "residual"
    DEPTH = "layers"
    """Whole layers."""
    VOCABULARY = "vocabulary"
    RANK = "lora-rank"
    OTHER = "other"


class Exactness(StrEnum):
    """What cutting a structure does to the rest of the model, compared with zeroing it."""

    EXACT = "exact"
    RESCALED = "exact after rescaling"
    """A norm averages over the axis: some weights are multiplied by a constant when it is cut (`graph/scales.py`)."""
    PINNED = "pinned"
    """It cannot be cut, or nobody knows how."""


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
    """A module whose input features carry the group's axis: where a structure gate sits."""

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
    exactness: Exactness
    realisable: bool
    """Whether the model's own code can be built with fewer structures."""
    reason: str
    """Why it is pinned (operator and module named), rescaled or not realisable; empty otherwise."""
    layer: int | None
    """Index of the decoder layer it lies in; None when it spans layers or lies outside them."""
    role: str
    """Groups of equal role are the same thing in different layers; a uniform shape gives them equal widths."""
    settings: tuple[str, ...] = ()
    """Configuration values that set its width: a plain model has the same in every layer."""
    minimum: int = 1
    """Structures that have to stay: as many experts as a token is sent to."""
    layers: tuple[LayerStructure, ...] = ()
    """Of whole layers: what structure i is. Other groups are told by their members."""

    @property
    def exact(self) -> bool:
        """Whether the zeroed and the cut model give the same logits (after the stated correction)."""
        return self.exactness is not Exactness.PINNED

    @property
    def prunable(self) -> bool:
        """Whether its structures can be removed from this model: exact, and in the model's own code."""
        return self.exact and self.realisable and self.size > self.minimum

    @property
    def plain(self) -> bool:
        """Whether a configuration value sets its width, so that the cut model loads in stock tools."""
        return bool(self.settings)

    @property
    def gated(self) -> bool:
        """Whether structure gates can sit on it: what saliency, the knowledge profile and LHSPG work on."""
        return self.prunable and bool(self.consumers) and self.exactness is Exactness.EXACT


@dataclass(frozen=True)
class LayerStructure:
    """A whole layer: a residual branch (or several), whose output is added to its input."""

    module: str
    """Path in the traced model."""
    parameters: tuple[str, ...]
    """All of its parameters, adapters included: with these at zero it hands its input on."""


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
    inference: Inference | None = None
    """The trace and its axes, for the proof (`verify`) and for what a cut has to rescale."""

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
    def gated(self) -> tuple[NodeGroup, ...]:
        """The prunable groups that carry structure gates."""
        return tuple(group for group in self.groups if group.gated)

    def candidates(self, kinds: Collection[str]) -> tuple[NodeGroup, ...]:
        """The groups that carry structure gates, and the experts where `kinds` names them: what a plan can choose
        from."""
        experts = (group for group in self.prunable if group.kind is Kind.EXPERTS and not group.gated)
        return (*self.gated, *(experts if Kind.EXPERTS in kinds else ()))

    @property
    def num_parameters(self) -> int:
        """Base parameters (adapters left out, tied weights once)."""
        return sum(p.numel for p in self.parameters.values() if not p.adapter)

    @property
    def num_decoder_parameters(self) -> int:
        """Base parameters of the decoder layers."""
        return sum(p.numel for p in self.parameters.values() if p.decoder and not p.adapter)

    @property
    def widths(self) -> tuple[Axis, ...]:
        """Every distinct axis along parameters, and every structured part of one."""
        found: dict[int, Axis] = {}
        stack = [axis.root() for info in self.parameters.values() for axis in info.axes]
        while stack:
            axis = stack.pop()
            if id(axis) not in found:
                found[id(axis)] = axis
                stack.extend(part.root() for part in axis.parts)
        return tuple(found.values())

    def kept_parameters(self, removed: Mapping[str, Sequence[int]]) -> int:
        """Base parameters left once `removed` (group name -> structures) is cut, counted on the cut shapes."""
        kept = self._kept(removed)
        gone = {name for group in removed for i in removed[group] for name in self._layer_parameters(group, i)}
        total = 0
        for info in self.parameters.values():
            if not info.adapter and info.name not in gone:
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
        groups = [self[name] for name in removed if self[name].kind is not Kind.DEPTH]
        return {g.members[0].leaf: g.size - len(set(removed[g.name])) for g in groups if removed[g.name]}

    def _layer_parameters(self, name: str, structure: int) -> tuple[str, ...]:
        group = self[name]
        return group.layers[structure].parameters if group.layers else ()

    def keep_leaves(self, removed: Mapping[str, Sequence[int]]) -> dict[Axis, Tensor]:
        """Leaf axis -> mask of what stays, `(structures,)`, for the groups that lose something (whole layers aside)."""
        keep = {}
        for name, structures in removed.items():
            group = self[name]
            if structures and group.members:
                mask = torch.ones(group.size, dtype=torch.bool)
                mask[list(structures)] = False
                keep[group.members[0].leaf] = mask
        return keep

    def keep_masks(self, removed: Mapping[str, Sequence[int]]) -> Iterator[tuple[str, int, Tensor]]:
        """Yields (parameter or buffer, dimension, boolean mask of what stays) for every dimension that `removed`
        cuts."""
        keep = self.keep_leaves(removed)
        owners = {(name, dim): axis for name, info in self.parameters.items() for dim, axis in enumerate(info.axes)}
        owners |= {(m.parameter, m.dim): m.axis for name in removed for m in self[name].members if m.buffer}
        for (name, dim), axis in owners.items():
            mask = keep_mask(axis, keep)
            if mask is not None:
                yield name, dim, mask
