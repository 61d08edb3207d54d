"""Experts that the router cannot choose: what it means to zero one."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from lorashear.errors import PlanError
from lorashear.graph.groups import Graph, Kind, NodeGroup
from lorashear.plan import Plan

CHOOSES = {torch.topk, Tensor.topk, torch.sort, Tensor.sort, torch.argmax, Tensor.argmax, torch.max, Tensor.max}
MULTIPLIES = {functional.linear, torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.mm, Tensor.mm}


class _Barred(TorchFunctionMode):
    """Router logits, and whatever the router chooses by, are -inf at the removed experts."""

    def __init__(self, weights: set[int], barred: Tensor) -> None:
        super().__init__()
        self.weights = weights
        self.barred = barred

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func in CHOOSES and args and args[0].shape[-1:] == self.barred.shape:
            args = (self._bar(args[0]), *args[1:])
        out = func(*args, **kwargs)
        if func in MULTIPLIES and any(id(a) in self.weights for a in args) and out.shape[-1:] == self.barred.shape:
            return self._bar(out)
        return out

    def _bar(self, scores: Tensor) -> Tensor:
        return scores.masked_fill(self.barred.to(scores.device), float("-inf"))


def bar_experts_(model: nn.Module, graph: Graph, plan: Plan) -> None:
    """Puts hooks on the routers of a plan's experts, so that these are never chosen."""
    for name, structures in plan.removed.items():
        group = graph[name]
        if group.kind is Kind.EXPERTS:
            _bar_group(model, graph, group, structures)


def _bar_group(model: nn.Module, graph: Graph, group: NodeGroup, structures: tuple[int, ...]) -> None:
    inference = graph.inference
    assert inference is not None
    leaf = group.members[0].leaf
    paths: dict[str, None] = {}
    for node in inference.trace.nodes:
        for number in node.outs:
            if number in inference.choices and any(axis.root() is leaf for axis in inference.dims[number]):
                paths[node.module] = None
    if not paths:
        raise PlanError(f"{group.name}: its router chooses in a way that cannot be barred; cut_ it instead")
    barred = torch.zeros(group.size, dtype=torch.bool)
    barred[list(structures)] = True
    parameters = dict(model.named_parameters(remove_duplicate=False))
    weights = {id(parameters[member.parameter]) for member in group.members if not member.buffer}
    for path in paths:
        module = model.get_submodule(path)
        modes: list[_Barred] = []

        def enter(_module: nn.Module, _args: Any, modes: list[_Barred] = modes) -> None:
            modes.append(_Barred(weights, barred))
            modes[-1].__enter__()  # type: ignore[no-untyped-call]  # torch is untyped here

        def leave(_module: nn.Module, _args: Any, _out: Any, modes: list[_Barred] = modes) -> None:
            modes.pop().__exit__(None, None, None)  # type: ignore[no-untyped-call]

        module.register_forward_pre_hook(enter)
        module.register_forward_hook(leave, always_call=True)
