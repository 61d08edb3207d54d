"""Which values of a model's configuration set which widths, found by building it with other values.

Nothing is tabulated: every integer of the configuration is changed in turn, the model is built on the meta device (no
memory, no weights), and the parameter dimensions that moved are noted. For each kind of group the few values are sought
that give exactly the widths a cut leaves. Sizes alone can mislead (half as many heads, or heads half as wide?), so an
answer counts only once the model built with it was traced and its axes have the structure that the cut leaves.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import combinations, islice, product
from math import prod
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel
from transformers.initialization import no_init_weights

from lorashear.graph.attributes import Attribute, find_attributes
from lorashear.graph.axes import Form, form_size
from lorashear.graph.proof import MismatchError, compare
from lorashear.graph.replay import Replay
from lorashear.graph.scales import NoScaleError, rescaling
from lorashear.graph.trace import record

if TYPE_CHECKING:
    from lorashear.graph.groups import Graph

Dim = tuple[str, int]
"""(parameter name in the model without adapters, dimension)."""

Value = int | list[int]
"""A configuration value: one number, or one a layer."""

Forms = Mapping[Dim, Form]

MOST_CHANGED = 4
"""Configuration values that one kind of group may need: heads and key/value heads, of two kinds of layers."""

MOST_USEFUL = 9
"""Configuration values that are tried in combination."""

MOST_BUILDS = 60
"""Models that are built for one kind of group."""

PROBED_LAYERS = 2


@dataclass(frozen=True)
class Setting:
    """One configuration value and how it follows the number of structures that stay."""

    key: str
    """Dotted where it lies in a part of the configuration, e.g. `text_config.intermediate_size`."""
    change: Literal["times", "less"]
    """In proportion; or less by what is removed."""

    def after(self, old: Any, size: int, kept: int) -> Value | None:
        """The value once `kept` of `size` structures stay; None where it would not be a whole number."""
        if isinstance(old, list):
            each = [self.after(value, size, kept) for value in old]
            return None if any(value is None for value in each) else each  # type: ignore[return-value]
        if self.change == "less":
            return int(old) - (size - kept) if int(old) > size - kept else None
        whole, rest = divmod(int(old) * kept, size)
        return whole if rest == 0 and whole > 0 else None


@dataclass(frozen=True)
class Geometry:
    """The model's class and configuration, and what each configuration value sets."""

    model_class: type[nn.Module]
    config: Any = field(repr=False)
    graph: Graph = field(repr=False)
    """Of the model, or of a shallow one of the same layers: questions are cheaper to ask of it."""
    shallow: Mapping[str, Value]
    """Configuration values that make the model shallow, where all its layers are alike."""
    depth_key: str
    """The configuration value that sets the number of layers; empty where none was found."""
    sizes: Mapping[Dim, int] = field(repr=False)
    """Of the shallow model."""
    affects: Mapping[str, frozenset[Dim]] = field(repr=False)
    """Configuration key -> the dimensions that move with it."""
    derived: Mapping[str, int] = field(default_factory=dict)
    """Configuration keys that are not set, with the value that the model's code derives: any change makes them
    explicit, or they would be derived anew."""
    _settings: dict[str, tuple[Setting, ...] | None] = field(default_factory=dict, repr=False)
    _attributes: dict[str, tuple[Attribute, ...] | None] = field(default_factory=dict, repr=False)
    _reasons: dict[str, str] = field(default_factory=dict, repr=False)
    _answers: dict[tuple[tuple[str, int], ...], dict[str, Value] | None] = field(default_factory=dict, repr=False)

    def build(self, overrides: Mapping[str, Value]) -> nn.Module:
        """The model with other configuration values, on the meta device; values are not validated."""
        return _build(self.model_class, changed(self.config, overrides))

    def settings_of(self, role: str) -> tuple[Setting, ...] | None:
        """The configuration values with which the model's own code builds the groups of a role with fewer structures.

        As few as possible, proved by a trace of a model built with them; None where there are none.
        """
        if role not in self._settings:
            with torch.device("cpu"):  # whatever device the caller builds models on
                self._settings[role] = self._find(role)
        return self._settings[role]

    def attributes_of(self, role: str) -> tuple[Attribute, ...] | None:
        """The attributes with which the model's modules run with fewer structures of a role that no configuration value
        sets; None where there are none. Such a model loads with `lorashear.load`."""
        groups = [group for group in self.graph.groups if group.role == role]
        if not groups or groups[0].kind not in BY_ATTRIBUTES or len({group.size for group in groups}) > 1:
            return None
        if role not in self._attributes:
            with torch.device("cpu"):
                self._attributes[role] = find_attributes(lambda: self.build(self.shallow), self.graph, role)
        return self._attributes[role]

    def unscalable(self, role: str) -> str:
        """Why nothing makes up for a mean over the axis of a role's groups; empty where something does."""
        groups = [group for group in self.graph.groups if group.role == role]
        if not groups or groups[0].size < 2 or self.graph.inference is None:
            return ""
        removed = {group.name: (0,) for group in groups}
        try:
            rescaling(self.graph.inference, Replay(self.graph.inference, self.graph.keep_leaves(removed)))
        except NoScaleError as error:
            return str(error)
        return ""

    def why_not(self, role: str) -> str:
        """Why a role has no settings."""
        return self._reasons.get(role) or "exact, but no value of the model's configuration sets this width alone"

    def solve(self, kept: Mapping[str, int]) -> dict[str, Value] | None:
        """Configuration values that give these widths, and all others as they are; None where there are none.

        Args:
            kept: role -> how many structures stay, in every layer.
        """
        sizes = {group.role: group.size for group in self.graph.groups}
        wanted = {role: count for role, count in kept.items() if count != sizes.get(role)}
        key = tuple(sorted(wanted.items()))
        if key not in self._answers:
            with torch.device("cpu"):
                self._answers[key] = self._solve(wanted, sizes)
        return self._answers[key]

    def _solve(self, wanted: Mapping[str, int], sizes: Mapping[str, int]) -> dict[str, Value] | None:
        settings = {role: self.settings_of(role) for role in wanted if role in sizes}
        if len(settings) != len(wanted) or any(each is None for each in settings.values()):
            return None
        overrides = self._overrides({role: (settings[role] or (), sizes[role], wanted[role]) for role in wanted})
        if not overrides:
            return overrides
        return overrides if not self._objection(overrides, wanted) else None

    def refusal(self, overrides: Mapping[str, Value]) -> str:
        """Why the configuration class refuses these values, or does not keep them; empty when it accepts them."""
        config = changed(self.config, overrides)
        try:
            again = type(config).from_dict(config.to_dict())
        except Exception as error:  # whatever a configuration class raises is its way of saying no
            return str(error).strip().splitlines()[-1].strip()
        lost = [key for key, value in overrides.items() if get_value(again, key) != value]
        return f"{type(config).__name__} does not keep {', '.join(lost)} when it is read back" if lost else ""

    def _find(self, role: str) -> tuple[Setting, ...] | None:
        groups = [group for group in self.graph.groups if group.role == role]
        if not groups or len({group.size for group in groups}) > 1:
            self._reasons[role] = "exact, but its width differs between layers" if groups else ""
            return None
        if groups[0].layers:
            return (Setting(self.depth_key, "less"),) if self.depth_key else None
        size = groups[0].size
        for kept in dict.fromkeys(count for count in (size - 1, size // 2, 1) if 0 < count < size):
            forms = self._forms({role: kept})
            moved = {dim for dim, of in forms.items() if form_size(of) != self.sizes.get(dim)}
            for settings in islice(self._candidates(moved), MOST_BUILDS):
                overrides = self._overrides({role: (settings, size, kept)})
                if overrides is None:
                    continue
                objection = self._objection(overrides, {role: kept})
                if not objection:
                    return settings
                if objection == OTHER_SIZES:
                    continue
                for follower in self._followers(settings, size):
                    more = self._overrides({role: ((*settings, follower), size, kept)})
                    if more is not None and not self._objection(more, {role: kept}):
                        return (*settings, follower)
                if role not in self._reasons:
                    keys = ", ".join(setting.key for setting in settings)
                    self._reasons[role] = (
                        f"exact, but with fewer of them ({keys}) the model's code differs: {objection}"
                    )
        return None

    def _followers(self, settings: tuple[Setting, ...], size: int) -> tuple[Setting, ...]:
        """Values that set no width but count the same thing: key/value heads where every query has its own."""
        values = [get_value(self.config, setting.key) for setting in settings]
        known = {setting.key for setting in settings} | self.affects.keys()
        return tuple(
            Setting(key, "times")
            for key, value in _values(self.config, 0)
            if key not in known and type(value) is int and value in values and value % size == 0 and value > 1
        )

    def _removed(self, kept: Mapping[str, int]) -> dict[str, tuple[int, ...]]:
        return {g.name: tuple(range(kept[g.role], g.size)) for g in self.graph.groups if g.role in kept}

    def _forms(self, kept: Mapping[str, int]) -> dict[Dim, Form]:
        return self.graph.cut_forms(self._removed(kept))

    def _candidates(self, moved: set[Dim]) -> Iterator[tuple[Setting, ...]]:
        useful = sorted((key for key, dims in self.affects.items() if dims & moved), key=self._surplus(moved))
        for count in range(1, min(len(useful), MOST_CHANGED) + 1):
            for keys in combinations(useful[:MOST_USEFUL], count):
                if moved <= set().union(*(self.affects[key] for key in keys)):
                    for changes in product(*(self._changes(count) for _ in keys)):
                        yield tuple(Setting(key, change) for key, change in zip(keys, changes, strict=True))

    def _surplus(self, moved: set[Dim]) -> Callable[[str], tuple[int, str]]:
        return lambda key: (len(self.affects[key] - moved), key)

    def _changes(self, count: int) -> tuple[Literal["times", "less"], ...]:
        return ("times", "less") if count < 3 else ("times",)

    def _overrides(self, wanted: Mapping[str, tuple[tuple[Setting, ...], int, int]]) -> dict[str, Value] | None:
        result: dict[str, Value] = dict(self.derived) if wanted else {}
        for settings, size, kept in wanted.values():
            for setting in settings:
                old = result.get(setting.key, get_value(self.config, setting.key))
                new = setting.after(old, size, kept)
                if new is None:
                    return None
                result[setting.key] = new
        return result

    def _objection(self, overrides: Mapping[str, Value], kept: Mapping[str, int]) -> str:
        """Why the model built with these values is not the cut model; empty when it is."""
        built = _try_build(self.model_class, changed(self.config, {**self.shallow, **overrides}))
        forms = self._forms(kept)
        wanted = {**self.sizes, **{dim: form_size(of) for dim, of in forms.items()}}
        if built is None or sizes_of(built) != wanted:
            return OTHER_SIZES
        inference = self.graph.inference
        assert inference is not None
        inputs = inference.trace.given
        try:
            trace = record(built, inputs)
        except Exception as error:  # a model that does not run with these values is no proof for them
            return f"it does not run ({error})"
        replay = Replay(inference, self.graph.keep_leaves(self._removed(kept)))
        try:
            rescaling(inference, replay, compare(inference, replay, trace))
        except (MismatchError, NoScaleError) as error:
            return str(error)
        return ""


BY_ATTRIBUTES = ("heads", "query-slots", "ffn-channels", "experts", "mixer-channels", "latent-channels", "residual")
"""Kinds of groups whose modules are searched for numbers to change; inside of heads there is nothing to gain."""

OTHER_SIZES = "its parameters have other sizes"


def probe_geometry(
    model: nn.Module, make_graph: Callable[[nn.Module], Graph], *, layers_path: str = "", num_layers: int = 0
) -> Geometry | None:
    """Finds what the integers of `model.config` set; None for a module without a configuration.

    Args:
        model: a `PreTrainedModel` without adapters; only its class and configuration are used.
        make_graph: finds the node groups of a model of the same class.
        layers_path: path of the list of decoder layers, where known.
        num_layers: how many there are.
    """
    config = getattr(model, "config", None)
    if config is None or not hasattr(config, "to_dict"):
        return None
    model_class = type(model)
    built = _try_build(model_class, config)
    whole = sizes_of(built)
    if built is None:
        return None
    depth_key = _depth_key(model_class, config, whole, layers_path, num_layers)
    shallow = _shallow(model_class, config, whole, layers_path, num_layers, depth_key)
    if shallow:
        built = _build(model_class, changed(config, shallow))
    base = sizes_of(built)
    affects: dict[str, frozenset[Dim]] = {}
    graph = make_graph(built)
    derived = _derived(model_class, config, shallow, base, graph)
    for key, value in [*_values(config, num_layers), *derived.items()]:
        for other in _others(value) if key != depth_key else ():
            sizes = sizes_of(_try_build(model_class, changed(config, {**shallow, **derived, key: other})))
            moved = {dim for dim in base if sizes[dim] != base[dim]} if sizes.keys() == base.keys() else set()
            if moved:
                affects[key] = frozenset(moved)
                break
    return Geometry(model_class, copy.deepcopy(config), graph, shallow, depth_key, base, affects, derived)


def _derived(
    model_class: type[nn.Module], config: Any, shallow: Mapping[str, Value], base: Mapping[Dim, int], graph: Graph
) -> dict[str, int]:
    """Widths that the configuration leaves to the code (`head_dim` as hidden size over heads): keys that are None, or
    that the code asks for in vain, with the value that gives the same model."""
    asked = _asked_for(model_class, changed(config, shallow))
    unset = {key for key in [*config.to_dict(), *asked] if _attribute(config, key) is None and _may_be_width(key)}
    sizes = {size for axis in graph.widths for size in (axis.size, *(part.size for part in axis.parts))}
    found: dict[str, int] = {}
    for key in sorted(unset):
        if not _moves(model_class, config, {**shallow, **found}, key, base):
            continue
        for size in sorted(sizes, reverse=True):
            if sizes_of(_try_build(model_class, changed(config, {**shallow, **found, key: size}))) == base:
                found[key] = size
                break
    return found


def _moves(
    model_class: type[nn.Module], config: Any, overrides: Mapping[str, Value], key: str, base: Mapping[Dim, int]
) -> bool:
    built = (sizes_of(_try_build(model_class, changed(config, {**overrides, key: value}))) for value in (24, 48))
    return any(sizes.keys() == base.keys() and sizes != base for sizes in built)


def _asked_for(model_class: type[nn.Module], config: Any) -> set[str]:
    """Names that the model's code looks for in its configuration without finding them, when it is built."""
    missing: set[str] = set()
    own = type(config)

    class Listening(own):  # type: ignore[misc, valid-type]
        def __getattr__(self, name: str) -> Any:
            missing.add(name)
            raise AttributeError(name)

    listening = copy.deepcopy(config)
    try:
        listening.__class__ = Listening
    except TypeError:
        return set()
    _try_build(model_class, listening)
    return {name for name in missing if not name.startswith("_")}


def _others(value: Any) -> list[Value]:
    """Values to try in place of one."""
    if isinstance(value, list):
        return [[2 * each for each in value], [each + 2 for each in value]]
    return [2 * value, value + 2, 3 * value, value // 2] if value > 1 else [2, 3]


def _depth_key(
    model_class: type[nn.Module], config: Any, whole: Mapping[Dim, int], layers_path: str, num_layers: int
) -> str:
    """The configuration value that sets how many layers there are."""
    if num_layers < PROBED_LAYERS:
        return ""
    first = f"{layers_path}.0."
    last = f"{layers_path}.{num_layers - 1}."
    for key, value in _values(config, 0):
        if value == num_layers:
            built = sizes_of(_try_build(model_class, changed(config, {key: num_layers - 1})))
            lost = {name for name, _ in whole.keys() - built.keys()}
            if any(name.startswith(first) for name, _ in built) and lost and all(n.startswith(last) for n in lost):
                return key
    return ""


def _shallow(
    model_class: type[nn.Module],
    config: Any,
    whole: Mapping[Dim, int],
    layers_path: str,
    num_layers: int,
    depth_key: str,
) -> dict[str, Value]:
    """The depth made small, provided that all layers have the same parameters."""
    if num_layers <= PROBED_LAYERS or not depth_key:
        return {}
    layers: list[dict[Dim, int]] = [{} for _ in range(num_layers)]
    for (name, dim), size in whole.items():
        if name.startswith(layers_path + "."):
            index, _, inside = name.removeprefix(layers_path + ".").partition(".")
            layers[int(index)][inside, dim] = size
    if any(layer != layers[0] for layer in layers):
        return {}
    built = sizes_of(_try_build(model_class, changed(config, {depth_key: PROBED_LAYERS})))
    return {depth_key: PROBED_LAYERS} if built and built.items() < whole.items() else {}


def _values(config: Any, num_layers: int, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Numbers that may set a width: whole ones, and lists of one a layer."""
    for key, value in config.to_dict().items():
        part = _attribute(config, key)
        if hasattr(part, "to_dict"):
            yield from _values(part, num_layers, f"{prefix}{key}.")
        elif key.endswith(("_token_id", "_token_index")) or key in NO_WIDTHS or isinstance(value, bool):
            continue
        elif isinstance(value, int) and value > 0 and part == value:
            yield prefix + key, value
        elif isinstance(value, list) and len(value) == num_layers and all(type(v) is int and v > 0 for v in value):
            yield prefix + key, list(value)


NO_WIDTHS = frozenset(["vocab_size", "problem_type", "transformers_version"])


def _may_be_width(key: str) -> bool:
    """Only values whose name speaks of a size are tried: each costs two builds."""
    return "vocab" not in key and any(
        word in key for word in ("inner", "size", "dim", "heads", "head", "width", "ffn", "rank")
    )


def get_value(config: Any, key: str) -> Any:
    """A configuration value by its dotted key; None where there is none."""
    for part in key.split("."):
        config = _attribute(config, part)
    return list(config) if isinstance(config, (list, tuple)) else config


def _attribute(config: Any, name: str) -> Any:
    try:
        return getattr(config, name, None)
    except Exception:  # some configurations refuse to name a value that layers have each of their own
        return None


def set_value(config: Any, key: str, value: Value) -> None:
    """Sets a configuration value by its dotted key."""
    *parts, last = key.split(".")
    for part in parts:
        config = getattr(config, part)
    setattr(config, last, value)


def changed(config: Any, overrides: Mapping[str, Value]) -> Any:
    """A copy of a configuration with other values."""
    config = copy.deepcopy(config)
    for key, value in overrides.items():
        set_value(config, key, value)
    return config


class _WeightsOnMeta(TorchFunctionMode):
    """Big new tensors are made on meta; small ones (buffers such as rotary frequencies) are computed for real."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func in FACTORIES and kwargs.get("device") is None and (func is torch.empty or _numel(args) > SMALL):
            kwargs["device"] = "meta"
        return func(*args, **kwargs)


FACTORIES = (torch.empty, torch.zeros, torch.ones, torch.rand, torch.randn, torch.full)
SMALL = 1 << 14


def _numel(args: Any) -> int:
    shape = args[0] if args and isinstance(args[0], (tuple, list)) else args
    return prod(int(size) for size in shape if isinstance(size, int))


def _build(model_class: type[nn.Module], config: Any) -> nn.Module:
    with _WeightsOnMeta(), no_init_weights(), torch.no_grad():
        model = model_class(config)
    if isinstance(model, PreTrainedModel):
        model.tie_weights()  # which is part of the initialisation that was left out
    return model


def _try_build(model_class: type[nn.Module], config: Any) -> nn.Module | None:
    try:
        return _build(model_class, config)
    except Exception:  # a value that the class cannot be built with tells nothing about widths
        return None


def sizes_of(model: nn.Module | None) -> dict[Dim, int]:
    """Sizes of all parameter dimensions of a model."""
    if model is None:
        return {}
    return {(name, dim): size for name, p in model.named_parameters() for dim, size in enumerate(p.shape)}
