"""Which numbers of a model's configuration set which widths, found by building it with other numbers.

Nothing is tabulated: every integer of the configuration is changed in turn, the model is built on the meta device (no
memory, no weights), and the parameter dimensions that moved are noted. Widths that the configuration can express load
in stock tools. Sizes alone can mislead (half as many heads, or heads half as wide?), so an answer counts only once the
model built with it was traced and its axes have the structure that the cut leaves.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from itertools import combinations
from typing import Any

import torch
from torch import nn

from lorashear.graph.axes import Form, form, form_size
from lorashear.graph.inference import infer
from lorashear.graph.trace import record

Dim = tuple[str, int]
"""(parameter name in the model without adapters, dimension)."""

MOST_CHANGED = 4
"""Configuration values that one cut may change; Llama needs three."""

PROBED_LAYERS = 2


@dataclass(frozen=True)
class Geometry:
    """The model's class and configuration, and what each configuration value sets."""

    model_class: type[nn.Module]
    config: Any = field(repr=False)
    shallow: Mapping[str, int]
    """Configuration values that make the model shallow, where all its layers are alike: questions are cheaper to ask
    of it."""
    sizes: Mapping[Dim, int] = field(repr=False)
    """Of the shallow model."""
    affects: Mapping[str, frozenset[Dim]] = field(repr=False)
    """Configuration key -> the dimensions that are proportional to it."""

    def build(self, overrides: Mapping[str, int]) -> nn.Module:
        """The model with other configuration values, on the meta device; values are not validated."""
        return _build(self.model_class, _changed(self.config, overrides))

    def solve(self, forms: Mapping[Dim, Form]) -> dict[str, int] | None:
        """Configuration values that give these dimensions, and all others as they are; None where there are none.

        Args:
            forms: (parameter, dimension) -> the structure it is to have, all layers being alike.

        Returns:
            As few changed values as possible, proved by a trace of the model built with them.
        """
        forms = {dim: wanted for dim, wanted in forms.items() if dim in self.sizes}
        ratios = {dim: Fraction(form_size(wanted), self.sizes[dim]) for dim, wanted in forms.items()}
        moved = {dim for dim, ratio in ratios.items() if ratio != 1}
        if not moved:
            return {}
        useful = [key for key, dims in self.affects.items() if dims & moved]
        for count in range(1, min(len(useful), MOST_CHANGED) + 1):
            for keys in combinations(useful, count):
                overrides = self._factors(keys, ratios)
                if overrides is not None and self._gives(overrides, forms):
                    return overrides
        return None

    def refusal(self, overrides: Mapping[str, int]) -> str:
        """Why the configuration class refuses these values; empty when it accepts them."""
        config = _changed(self.config, overrides)
        try:
            type(config).from_dict(config.to_dict())
        except Exception as error:  # whatever a configuration class raises is its way of saying no
            return str(error).strip().splitlines()[-1].strip()
        return ""

    def _factors(self, keys: tuple[str, ...], ratios: Mapping[Dim, Fraction]) -> dict[str, int] | None:
        """Solves product of factors = ratio over all dimensions, the factors of `keys` unknown and the others 1."""
        touched = {dim for key in keys for dim in self.affects[key]} | {d for d, r in ratios.items() if r != 1}
        equations = [([k for k in keys if dim in self.affects[k]], ratios.get(dim, Fraction(1))) for dim in touched]
        factors: dict[str, Fraction] = {}
        progress = True
        while progress:
            progress = False
            for names, ratio in equations:
                unknown = [name for name in names if name not in factors]
                rest = ratio
                for name in names:
                    rest /= factors.get(name, Fraction(1))
                if len(unknown) == 1:
                    factors[unknown[0]] = rest
                    progress = True
                elif not unknown and rest != 1:
                    return None
        values = {key: factor * _value(self.config, key) for key, factor in factors.items()}
        if len(values) != len(keys) or any(value.denominator != 1 for value in values.values()):
            return None
        return {key: int(values[key]) for key in keys}

    def _gives(self, overrides: Mapping[str, int], forms: Mapping[Dim, Form]) -> bool:
        built = _try_build(self.model_class, _changed(self.config, {**self.shallow, **overrides}))
        sizes = _sizes(built)
        wanted = {**self.sizes, **{dim: form_size(of) for dim, of in forms.items()}}
        return built is not None and sizes == wanted and _has_forms(built, forms)


def probe_geometry(model: nn.Module, *, layers_path: str = "", num_layers: int = 0) -> Geometry | None:
    """Finds what the integers of `model.config` set; None for a module without a configuration.

    Args:
        model: a `PreTrainedModel` without adapters; only its class and configuration are used.
        layers_path: path of the list of decoder layers, where known.
        num_layers: how many there are.
    """
    config = getattr(model, "config", None)
    if config is None or not hasattr(config, "to_dict"):
        return None
    model_class = type(model)
    shallow = _shallow(model_class, config, layers_path, num_layers)
    base = _sizes(_try_build(model_class, _changed(config, shallow)))
    affects: dict[str, frozenset[Dim]] = {}
    for key, value in _integers(config):
        for other in (2 * value, value + 2, 3 * value):
            built = _sizes(_try_build(model_class, _changed(config, {**shallow, key: other})))
            if built.keys() != base.keys():
                continue
            moved = {dim for dim in base if built[dim] != base[dim]}
            if moved and all(built[dim] * value == base[dim] * other for dim in moved):
                affects[key] = frozenset(moved)
                break
    return Geometry(model_class, copy.deepcopy(config), shallow, base, affects)


def _shallow(model_class: type[nn.Module], config: Any, layers_path: str, num_layers: int) -> dict[str, int]:
    """The configuration value that sets the depth, made small, provided that all layers have the same parameters."""
    if num_layers <= PROBED_LAYERS:
        return {}
    whole = _sizes(_try_build(model_class, config))
    layers = [{} for _ in range(num_layers)]  # type: list[dict[Dim, int]]
    for (name, dim), size in whole.items():
        if name.startswith(layers_path + "."):
            index, _, inside = name.removeprefix(layers_path + ".").partition(".")
            layers[int(index)][inside, dim] = size
    if any(layer != layers[0] for layer in layers):
        return {}
    for key, value in _integers(config):
        if value == num_layers:
            built = _sizes(_try_build(model_class, _changed(config, {key: PROBED_LAYERS})))
            if built and built.items() < whole.items():
                return {key: PROBED_LAYERS}
    return {}


def _has_forms(model: nn.Module, forms: Mapping[Dim, Form]) -> bool:
    """Traces the model and compares the structure of these parameter dimensions."""
    try:
        trace = record(model, {"input_ids": torch.zeros(1, 13, dtype=torch.long)})
    except Exception:  # a model that does not run with these values is no proof for them
        return False
    inference = infer(trace)
    found = {
        (name, dim): form(axis) for t, name in trace.parameters.items() for dim, axis in enumerate(inference.dims[t])
    }
    return all(found.get(dim) == wanted for dim, wanted in forms.items())


def _integers(config: Any) -> Iterable[tuple[str, int]]:
    return [
        (key, value)
        for key, value in config.to_dict().items()
        if isinstance(value, int) and not isinstance(value, bool) and value > 0 and not key.endswith("_token_id")
    ]


def _value(config: Any, key: str) -> int:
    return int(getattr(config, key))


def _changed(config: Any, overrides: Mapping[str, int]) -> Any:
    config = copy.deepcopy(config)
    for key, value in overrides.items():
        setattr(config, key, value)
    return config


def _build(model_class: type[nn.Module], config: Any) -> nn.Module:
    with torch.device("meta"):
        return model_class(config)


def _try_build(model_class: type[nn.Module], config: Any) -> nn.Module | None:
    try:
        return _build(model_class, config)
    except Exception:  # a value that the class cannot be built with tells nothing about widths
        return None


def _sizes(model: nn.Module | None) -> dict[Dim, int]:
    if model is None:
        return {}
    return {(name, dim): size for name, p in model.named_parameters() for dim, size in enumerate(p.shape)}
