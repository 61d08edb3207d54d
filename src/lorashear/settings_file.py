"""Settings put together from their sources: a stage's own defaults, a YAML file, options, and KEY=VALUE assignments."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from enum import Enum
from pathlib import Path
from typing import Any

import yaml

from lorashear.config import CompressSettings
from lorashear.errors import SettingsError


def read_settings(
    *,
    base: Mapping[str, Any] | None = None,
    file: Path | None = None,
    options: Mapping[str, Any] | None = None,
    assignments: Sequence[str] = (),
) -> CompressSettings:
    """Merges, later ones winning: `base`, the YAML `file`, `options` by dotted name, `assignments` like
    `prune.periods=10`.

    Raises:
        SettingsError: for a file that cannot be read, an unknown key (with the nearest known one), or a value that does
            not fit.
    """
    values: dict[str, Any] = {}
    for key, value in (base or {}).items():
        _assign(values, key, value)
    if file is not None:
        _merge(values, _read(file))
    for key, value in (options or {}).items():
        _assign(values, key, value.value if isinstance(value, Enum) else value)
    for assignment in assignments:
        key, equals, text = assignment.partition("=")
        if not equals or not key:
            raise SettingsError(f'--set {assignment}: expected KEY=VALUE, e.g. "prune.periods=10"')
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError:
            raise SettingsError(f"--set {assignment}: the value is not readable as YAML; quote or correct it") from None
        _assign(values, key.strip(), value)
    return CompressSettings.from_mapping(values, origin=str(file) if file else "settings")


def _read(file: Path) -> dict[str, Any]:
    try:
        values = yaml.safe_load(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise SettingsError(f"{file}: {error.strerror}; expected a YAML file of settings") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise SettingsError(
            f"{file}: not readable as YAML ({' '.join(str(error).split())}); correct the file"
        ) from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise SettingsError(
            f"{file}: expected a mapping of settings such as `prune: {{ratio: 0.2}}`, found {values!r:.60}"
        )
    return values


def _merge(into: dict[str, Any], values: Mapping[str, Any]) -> None:
    for key, value in values.items():
        if isinstance(value, Mapping) and isinstance(into.get(key), dict):
            _merge(into[key], value)
        else:
            into[key] = dict(value) if isinstance(value, Mapping) else value


def _assign(values: dict[str, Any], key: str, value: Any) -> None:
    *parents, last = key.split(".")
    for parent in parents:
        below = values.setdefault(parent, {})
        if not isinstance(below, dict):
            raise SettingsError(f"settings: {key}: {parent} = {below!r} is a value, not a group of settings")
        values = below
    values[last] = value
