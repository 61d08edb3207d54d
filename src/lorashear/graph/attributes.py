"""Which numbers that modules keep follow a cut, where no value of the configuration does.

Many modules infer their sizes from their weights; others keep a head count or a split size as an attribute. What to
change is found, not tabulated: a model without weights is cut, traced, and compared with the cut trace, first as it is,
then with those attributes in proportion whose value is a multiple of the number of structures. Attributes are told
apart by module, not by class: in GPT-2 one value is two things.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, islice
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from lorashear.graph.base import base_module
from lorashear.graph.proof import compare
from lorashear.graph.replay import Replay
from lorashear.graph.scales import rescaling
from lorashear.graph.trace import record

if TYPE_CHECKING:
    from lorashear.graph.groups import Graph, NodeGroup

MOST_CHANGED = 3
MOST_TRIED = 12
"""Attributes that are tried in combination."""
MOST_PROOFS = 40
"""Models that are cut and traced for one kind of group."""


_Place = tuple[dict[str, Any], str]
"""A module's table of parameters or buffers, and a name in it."""


@dataclass(frozen=True)
class Attribute:
    """A number that a module keeps and that is in proportion to a group's number of structures."""

    module: str
    """Path below the layer for a group that lies in one, else in the model."""
    name: str

    def owner(self, graph: Graph, group: NodeGroup) -> str:
        """Path in the model of the module that keeps it for this group."""
        return f"{layer_path(graph, group)}.{self.module}".strip(".")


def layer_path(graph: Graph, group: NodeGroup) -> str:
    """Path of the layer that a group lies in; empty for one that spans layers."""
    return "" if group.layer is None else f"{graph.layers_path}.{group.layer}"


def find_attributes(build: Callable[[], nn.Module], graph: Graph, role: str) -> tuple[Attribute, ...] | None:
    """The attributes with which the model's modules run with fewer structures; None where none were found.

    Args:
        build: makes the model without weights.
        graph: its node groups.
        role: what is cut, in all layers.
    """
    groups = [group for group in graph.groups if group.role == role]
    size = groups[0].size
    for kept in dict.fromkeys(count for count in (size - 1, size // 2) if groups[0].minimum <= count < size):
        removed = {group.name: tuple(range(kept, size)) for group in groups}
        for chosen in islice(_choices(build(), graph, groups[0]), MOST_PROOFS):
            model = build()
            cut_tensors_(model, graph.keep_masks(removed))
            try:
                for group in groups:
                    set_attributes_(model, graph, group, chosen, kept)
            except AttributeError:  # layers of one role that are built of other modules
                continue
            if _proved(model, graph, removed):
                return chosen
    return None


def _choices(model: nn.Module, graph: Graph, group: NodeGroup) -> Iterator[tuple[Attribute, ...]]:
    """Nothing, single attributes, then a few together; those near the group's own modules come first."""
    yield ()
    top = layer_path(graph, group)
    owners = {member.parameter.rpartition(".")[0] for member in group.members}
    paths = {path for owner in owners for path in _upwards(owner, top)}
    found = []
    for path in sorted(paths, key=lambda path: (-path.count("."), path)):
        for name, value in vars(model.get_submodule(path)).items():
            if type(value) is int and value > 1 and value % group.size == 0 and name not in COSMETIC:
                found.append(Attribute(path.removeprefix(top).removeprefix("."), name))
    for count in range(1, MOST_CHANGED + 1):
        yield from combinations(found[:MOST_TRIED], count)


COSMETIC = frozenset(["in_features", "out_features", "layer_idx", "training"])


def _upwards(path: str, top: str) -> Iterator[str]:
    while path != top and path.startswith(top):
        yield path
        path = path.rpartition(".")[0]
    yield top


def set_attributes_(
    model: nn.Module, graph: Graph, group: NodeGroup, attributes: Sequence[Attribute], kept: int
) -> None:
    """Sets the attributes of a group's modules for `kept` structures."""
    for attribute in attributes:
        module = base_module(model, attribute.owner(graph, group))
        setattr(module, attribute.name, getattr(module, attribute.name) * kept // group.size)


def cut_tensors_(model: nn.Module, masks: Iterable[tuple[str, int, Tensor]]) -> None:
    """Puts the kept parts of parameters and buffers in place of the whole ones, everywhere these are used (ties).

    One after the other, and the whole one is let go of, so that there are never two models. A parameter that only changed
    its data would keep the shape of its old gradient inside autograd.
    """
    cuts: dict[str, list[tuple[int, Tensor]]] = {}
    for name, dim, mask in masks:
        cuts.setdefault(name, []).append((dim, mask))
    places = _places(model)
    done: set[int] = set()
    for name, wanted in cuts.items():
        used = places[name]
        if id(used) in done:  # under another of its names
            continue
        done.add(id(used))
        table, key = used[0]
        before = table[key]
        smaller = before.detach()
        for dim, mask in wanted:
            smaller = smaller.index_select(dim, mask.nonzero().flatten().to(smaller.device))
        after = nn.Parameter(smaller, before.requires_grad) if isinstance(before, nn.Parameter) else smaller
        for table, key in used:
            table[key] = after


def _places(model: nn.Module) -> dict[str, list[_Place]]:
    """Name of a parameter or buffer -> everywhere it is used; the names of one share a list."""
    by_tensor: dict[int, list[_Place]] = {}
    named: dict[str, list[_Place]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        for table in (module._parameters, module._buffers):
            for key, value in table.items():
                if value is not None:
                    used = by_tensor.setdefault(id(value), [])
                    used.append((table, key))
                    named[f"{path}.{key}".removeprefix(".")] = used
    return named


def _proved(model: nn.Module, graph: Graph, removed: Mapping[str, Sequence[int]]) -> bool:
    inference = graph.inference
    assert inference is not None
    inputs = inference.trace.given
    replay = Replay(inference, graph.keep_leaves(removed))
    try:
        rescaling(inference, replay, compare(inference, replay, record(model, inputs)))
    except Exception:  # a mismatch, no scale, or the modules do not run with these numbers, in whatever way they put it
        return False
    return True
