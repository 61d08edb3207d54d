"""How the names of a traced model's parameters and modules relate to those of the model without adapters."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from lorashear.graph.base import base_model


@dataclass(frozen=True)
class Names:
    """Names of one model."""

    prefix: str
    wrappers: frozenset[str]
    """Paths of peft layers."""
    layers_path: str
    """Path of the list of layers, in the model without adapters."""
    num_layers: int
    aliases: Mapping[str, str]
    """Second names of tied parameters -> first name."""

    @classmethod
    def of(cls, model: nn.Module) -> Names:
        """Reads them off a model; the longest list of modules by parameters holds the layers."""
        base = base_model(model)
        prefix = next((name + "." for name, module in model.named_modules() if module is base and name), "")
        wrappers = frozenset(name for name, module in model.named_modules() if isinstance(module, BaseTunerLayer))
        lists = [(n, m) for n, m in base.named_modules() if isinstance(m, nn.ModuleList) and len(m)]
        path, layers = max(lists, key=lambda item: sum(p.numel() for p in item[1].parameters()), default=("", None))
        first: dict[int, str] = {}
        aliases: dict[str, str] = {}
        for name, parameter in model.named_parameters(remove_duplicate=False):
            kept = first.setdefault(id(parameter), name)
            if kept != name:
                aliases[name] = kept
        return cls(prefix, wrappers, path, 0 if layers is None else len(layers), aliases)

    def canonical(self, name: str) -> str:
        """The name in the model without adapters."""
        return name.removeprefix(self.prefix).replace(".base_layer", "")

    def adapter(self, name: str) -> bool:
        """Whether a parameter belongs to an adapter."""
        parts = name.split(".")
        owners = [".".join(parts[:end]) for end in range(1, len(parts))]
        return any(owner in self.wrappers and not name.startswith(owner + ".base_layer.") for owner in owners)

    def layer(self, name: str) -> int | None:
        """Index of the layer that a parameter lies in; None outside the layers."""
        match = re.match(re.escape(self.layers_path) + r"\.(\d+)\.", self.canonical(name))
        return int(match.group(1)) if match and self.layers_path else None

    def role(self, name: str, layer: int | None) -> str:
        """The name with its layer's index left out: what is alike in all layers."""
        if layer is None:
            return name
        return re.sub(rf"^{re.escape(self.layers_path)}\.{layer}(?=[.:])", f"{self.layers_path}.*", name)


def common_path(names: Iterable[str]) -> str:
    """The innermost module that holds all these parameters; a layer index that differs ends it."""
    paths = [name.split(".")[:-1] for name in names]
    shared = []
    for parts in zip(*paths, strict=False):
        if len(set(parts)) > 1:
            break
        shared.append(parts[0])
    return ".".join(shared) or "model"
