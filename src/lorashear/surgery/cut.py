"""Zero or cut out what a plan removes, in place."""

from __future__ import annotations

import copy
from collections.abc import Iterable

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from lorashear.errors import PlanError
from lorashear.graph.attributes import cut_tensors_
from lorashear.graph.groups import Graph, Kind
from lorashear.graph.proof import MismatchError, compare
from lorashear.graph.replay import Replay
from lorashear.graph.scales import NoScaleError, Scale, rescaling
from lorashear.graph.trace import record
from lorashear.plan import Plan
from lorashear.surgery.changes import Changes
from lorashear.surgery.experts import bar_experts_
from lorashear.surgery.layers import drop_layers_, dropped


def zero_(model: nn.Module, graph: Graph, plan: Plan) -> None:
    """Sets every parameter slice of the plan's structures to zero, in the adapters too.

    Experts are kept out of the router's choice instead (their logits become -inf, through hooks on the router's module).

    Args:
        model: the model that `graph` was discovered on.
        graph: its node groups.
        plan: what to zero; groups that the model's own code cannot be built with fewer of are fine here.

    Raises:
        PlanError: when plan, graph and model do not belong together.
    """
    plan.check(graph, realisable=False)
    tensors = _tensors(model)
    with torch.no_grad():
        for name, structures in plan.removed.items():
            group = graph[name]
            for structure in structures if group.layers else ():
                for parameter in group.layers[structure].parameters:
                    _tensor(tensors, parameter).zero_()
            for member in group.members if group.kind is not Kind.EXPERTS else ():
                if not member.buffer:
                    rows = member.rows[list(structures)].flatten()
                    tensor = _tensor(tensors, member.parameter)
                    tensor.index_fill_(member.dim, rows.to(tensor.device), 0)
    bar_experts_(model, graph, plan)


def cut_(model: nn.Module, graph: Graph, plan: Plan) -> None:
    """Removes every parameter slice of the plan's structures and mends sizes, attributes and configuration.

    Gives the same logits as `zero_`. A plan that leaves all layers equal becomes a plain model whose configuration tells
    its true sizes; any other keeps the old configuration and notes the layers' own values under `config.lorashear`.
    The cut is first made on a copy without weights and proved there by a second trace; where a norm averages over fewer
    channels, weights are rescaled (`graph/scales.py`).

    Raises:
        PlanError: when plan, graph and model do not belong together, when a uniform plan gives widths that the model's
            configuration class refuses, or when the model's own code would do something else than the cut model. The
            model is untouched then.
    """
    plan.check(graph)
    tensors = _tensors(model)
    for name, dim, mask in graph.keep_masks(plan.removed):
        if _tensor(tensors, name).shape[dim] != mask.numel():
            raise PlanError(
                f"{name} has {tensors[name].shape[dim]} entries along dimension {dim}, the graph says {mask.numel()}: "
                "the model was cut already; discover it again"
            )
    changes = Changes.of(graph, plan)
    scales = _proved(model, graph, plan, changes)
    with torch.no_grad():  # while the layers still have their numbers
        for name, scale in scales.items():
            tensors[name].add_(scale.offset).mul_(scale.factor).sub_(scale.offset)
    del tensors  # or the whole model would outlive the cut
    _apply_(model, graph, plan, changes)


def _apply_(model: nn.Module, graph: Graph, plan: Plan, changes: Changes) -> None:
    cut_tensors_(model, graph.keep_masks(plan.removed))
    changes.apply_(model, graph)
    _mend_features(model)
    drop_layers_(model, graph, plan)


def _proved(model: nn.Module, graph: Graph, plan: Plan, changes: Changes) -> dict[str, Scale]:
    """Cuts a copy without weights, traces it, and compares; returns what has to be rescaled, by parameter."""
    inference = graph.inference
    assert inference is not None
    trace = inference.trace
    copied = skeleton(model)
    _apply_(copied, graph, plan, changes)
    replay = Replay(inference, graph.keep_leaves(plan.removed))
    gone = [range(call.start, call.end) for path in dropped(graph, plan) for call in trace.calls[path]]
    try:
        second = record(copied, trace.given)
        return rescaling(inference, replay, compare(inference, replay, second, gone))
    except (MismatchError, NoScaleError) as error:
        raise PlanError(f"the model's own code does not give the cut model: {error}; leave this kind out") from None
    except Exception as error:  # whatever the model's code raises with such sizes
        raise PlanError(f"the cut model does not run ({error}); leave this kind out") from error


def skeleton(model: nn.Module) -> nn.Module:
    """A copy of a model whose parameters are on the meta device: all of its structure, none of its weights."""
    memo: dict[int, object] = {
        id(p): nn.Parameter(torch.empty_like(p, device="meta"), requires_grad=p.requires_grad and p.is_floating_point())
        for p in model.parameters()
    }
    return copy.deepcopy(model, memo)


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    named = dict(model.named_parameters(remove_duplicate=False))
    return {**named, **dict(model.named_buffers(remove_duplicate=False))}


def _tensor(tensors: dict[str, Tensor], name: str) -> Tensor:
    if name not in tensors:
        raise PlanError(
            f"the model has no parameter {name}: the graph was discovered on another model, or before adapters were "
            "added or merged; call discover on this one"
        )
    return tensors[name]


def _mend_features(model: nn.Module) -> None:
    """`in_features` and `out_features` of adapters, which building the plain model does not show."""
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.out_features, module.in_features = module.weight.shape
    for module in _wrappers(model):
        base = module.get_base_layer()
        if isinstance(base, nn.Linear):
            module.in_features, module.out_features = base.in_features, base.out_features


def _wrappers(model: nn.Module) -> Iterable[BaseTunerLayer]:
    return (module for module in model.modules() if isinstance(module, BaseTunerLayer))
