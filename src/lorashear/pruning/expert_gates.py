"""Gates of experts: one factor on what each of them puts out (ours; design: gate 1 is the model, gate 0 the model without
the expert).

An expert's output is linear in its last matrix W, so that the derivative of the loss by the gate is the sum over W of weight
times gradient (biases are left out). It is nothing for an expert that no token was sent to.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

from lorashear.graph.groups import Member
from lorashear.pruning.gates import GateStatistics


@contextmanager
def metered_experts(model: nn.Module, writers: Mapping[str, Member]) -> Iterator[dict[str, GateStatistics]]:
    """Inside, every backward pass of one sample's mean loss adds to the statistics of the experts' gates.

    A gradient is dropped as soon as it is reduced: there is never more than one of a layer's.

    Args:
        model: whose losses these are.
        writers: group of experts -> the weight that gives their output (`expert_writers`).
    """
    parameters = dict(model.named_parameters())
    weights = {name: parameters[member.parameter] for name, member in writers.items()}
    statistics: dict[str, GateStatistics] = {}
    with ExitStack() as stack:
        for name, weight in weights.items():
            stack.callback(weight.requires_grad_, weight.requires_grad)
            weight.requires_grad_(True)
            meter = _meter(name, writers[name], statistics)
            hook = weight.register_post_accumulate_grad_hook(meter)  # type: ignore[no-untyped-call]  # torch is untyped here
            stack.callback(hook.remove)
        yield statistics


def _meter(name: str, member: Member, statistics: dict[str, GateStatistics]) -> Callable[[Tensor], None]:
    @torch.no_grad()
    def add(weight: Tensor) -> None:
        assert weight.grad is not None
        products = weight.float() * weight.grad.float()
        sums = products.movedim(member.dim, 0).flatten(1).sum(1)
        derivative = sums[member.rows.to(sums.device)].sum(1)  # (experts,)
        weight.grad = None
        before = statistics.get(name) or GateStatistics(torch.zeros_like(derivative), torch.zeros_like(derivative), 0)
        statistics[name] = GateStatistics(
            before.first + derivative, before.second + derivative.square(), before.samples + 1
        )

    return add
