"""Which numbers of a model's configuration set which widths, found by building it with other numbers.

Nothing is tabulated: every integer of the configuration is changed in turn, the model is built on the meta device (no
memory, no weights), and the parameter dimensions that moved are noted. Widths that the configuration can express load in
stock tools.
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

Dim = tuple[str, int]
"""(parameter name in the model without adapters, dimension)."""

MOST_CHANGED = 4
"""Configuration values that one cut may change; Llama needs three."""


@dataclass(frozen=True)
class Geometry:
    """The model's class and configuration, and what each configuration value sets."""

    model_class: type[nn.Module]
    config: Any = field(repr=False)
    sizes: Mapping[Dim, int] = field(repr=False)
    affects: Mapping[str, frozenset[Dim]] = field(repr=False)
    """Configuration key -> the dimensions that are proportional to it."""

    def build(self, overrides: Mapping[str, int]) -> nn.Module:
        """The model with other configuration values, on the meta device; values are not validated."""
        return _build(self.model_class, _changed(self.config, overrides))

    def solve(self, sizes: Mapping[Dim, int], *, prove: bool = True) -> dict[str, int] | None:
        """Configuration values that give these widths, and all others as they are; None where there are none.

        The answer changes as few values as possible. `prove` builds the model with it and compares every width.
        """
        ratios = {dim: Fraction(size, self.sizes[dim]) for dim, size in sizes.items()}
        moved = {dim for dim, ratio in ratios.items() if ratio != 1}
        if not moved:
            return {}
        useful = [key for key, dims in self.affects.items() if dims & moved]
        for count in range(1, min(len(useful), MOST_CHANGED) + 1):
            for keys in combinations(useful, count):
                overrides = self._factors(keys, ratios)
                if overrides is not None and (not prove or self._gives(overrides, sizes)):
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
        equations = [
            ([key for key in keys if dim in self.affects[key]], ratios.get(dim, Fraction(1)))
            for dim in {dim for key in keys for dim in self.affects[key]} | {d for d, r in ratios.items() if r != 1}
        ]
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
        values = {key: factors[key] * _value(self.config, key) for key in keys if key in factors}
        if len(values) != len(keys) or any(value.denominator != 1 for value in values.values()):
            return None
        return {key: int(value) for key, value in values.items()}

    def _gives(self, overrides: Mapping[str, int], sizes: Mapping[Dim, int]) -> bool:
        built = _sizes(_try_build(self.model_class, _changed(self.config, overrides)))
        return bool(built) and all(built.get(dim) == sizes.get(dim, size) for dim, size in self.sizes.items())


def probe_geometry(model: nn.Module) -> Geometry | None:
    """Finds what the integers of `model.config` set; None for a module without a configuration.

    Args:
        model: a `PreTrainedModel` without adapters; only its class and configuration are used.
    """
    config = getattr(model, "config", None)
    if config is None or not hasattr(config, "to_dict"):
        return None
    model_class = type(model)
    base = _sizes(_try_build(model_class, config))
    if not base:
        return None
    affects: dict[str, frozenset[Dim]] = {}
    for key, value in _integers(config):
        for other in (2 * value, value + 2, 3 * value):
            built = _sizes(_try_build(model_class, _changed(config, {key: other})))
            if built.keys() != base.keys():
                continue
            moved = {dim for dim in base if built[dim] != base[dim]}
            if moved and all(built[dim] * value == base[dim] * other for dim in moved):
                affects[key] = frozenset(moved)
                break
    return Geometry(model_class, copy.deepcopy(config), base, affects)


def _integers(config: Any) -> Iterable[tuple[str, int]]:
    values = config.to_dict()
    return [
        (key, value)
        for key, value in values.items()
        if isinstance(value, int) and not isinstance(value, bool) and value > 1 and not key.endswith("_token_id")
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
