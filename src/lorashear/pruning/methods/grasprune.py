"""GRASPrune: one learned gate a structure under a hard budget, then one scale a structure that stays; weights frozen.

In every forward pass the structures with the lowest logits have gate 0 and the others gate 1, as many of each group as the
planner says, so that the budget is met all along; the gradient goes straight through to sigmoid(logit). Then the choice is
frozen and the gates that are left become scales 1 + tanh(s) / 2, which end in the weights of the consumers.

Where this departs from the authors' code: the logits start as the logarithm of the one-shot gate saliency per parameter, so
that the first choice is that of `one-shot`, and not at 0; a head's gate sits on what it writes, not on its keys and values;
and widths are the shared planner's. In the uniform shape they are those of the one-shot choice, and what is learnt is which
structures of each layer they hold; in the per-layer shape they follow the logits.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from math import ceil
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, TrainerCallback

from lorashear.graph.groups import Graph
from lorashear.plan import Plan
from lorashear.pruning.gates import StructureGates, fold_gates_
from lorashear.pruning.methods.gate_saliency import ONE_SHOT
from lorashear.pruning.methods.method import STAGE, Method, PlanOf, Scoring, TrainingRun
from lorashear.recovery.mixture import MixtureDataset, proportional_weights
from lorashear.training import TrainJob, constant_with_warmup, train

CHOICE = 2 / 3
"""Share of the steps that learn which structures stay; the others learn the scales."""
RATE = 0.03
"""Of AdamW, for logits and scales. The authors have 0.01 for two thousand steps; here are some dozens (RESULTS.md)."""
BETAS = (0.9, 0.99)
REACH = 0.5
"""A scale lies within 1 - REACH and 1 + REACH."""
WIDTHS_EVERY = 10
"""Steps between two looks at the widths, where each layer has its own."""
_TINY = 1e-30


class GatedModel(nn.Module):
    """A model with a gate on every structure, in the place of its own forward pass.

    Args:
        model: of which no parameter learns.
        graph: its node groups.
        scores: saliency of every gated group, where the logits start; sums compare per parameter saved.
        plan_of: the planner.
        uniform: whether widths stay those of the first choice.
    """

    groups_of: Tensor
    """Index of the group that a structure is in, `(all structures,)`."""
    starts: Tensor
    """Where a group begins among all structures, `(groups,)`."""
    removed: Tensor
    """How many structures a group loses, `(groups,)`."""

    def __init__(
        self, model: nn.Module, graph: Graph, scores: Mapping[str, Tensor], plan_of: PlanOf, *, uniform: bool
    ) -> None:
        super().__init__()
        self.train(model.training)
        self.accepts_loss_kwargs = False  # for Trainer: not every model takes the number of tokens in a step
        self.model, self.plan_of, self.uniform = model, plan_of, uniform
        self.gates = StructureGates(model, graph.gated)
        self.names = [group.name for group in graph.gated]
        self.sizes = [group.size for group in graph.gated]
        device = next(model.parameters()).device
        costs = [graph.num_parameters - graph.kept_parameters({name: (0,)}) for name in self.names]
        self.costs = torch.tensor(costs).repeat_interleave(torch.tensor(self.sizes))
        """Parameters that a structure saves, `(all structures,)`: those of all groups one after another, as below."""
        logarithms = (
            (torch.cat([scores[name].double().cpu() for name in self.names]) / self.costs).clamp(min=_TINY).log()
        )
        self.logits = nn.Parameter((logarithms - logarithms.median()).float().to(device))
        self.scales = nn.Parameter(torch.zeros_like(self.logits))
        self.choosing = True
        """Whether logits learn; else scales do."""
        sizes = torch.tensor(self.sizes, device=device)
        starts = sizes.cumsum(0) - sizes
        self.register_buffer("groups_of", torch.arange(len(sizes), device=device).repeat_interleave(sizes), False)
        self.register_buffer("starts", starts, False)
        self.register_buffer("removed", torch.zeros_like(sizes))
        self._set_widths(scores)

    def forward(self, **inputs: Any) -> Any:
        """The model's own, under the gates of this moment."""
        self.gates.follow(self.split(self.current()))
        return self.model(**{"use_cache": False, **inputs})

    def current(self) -> Tensor:
        """All gates: 0 or 1 with the gradient of sigmoid(logit) while choosing, then 0 or a scale."""
        kept = self.kept()
        if self.choosing:
            soft = self.logits.sigmoid()
            return kept + (soft - soft.detach())
        return kept * (1 + REACH * self.scales.tanh())

    @torch.no_grad()
    def kept(self) -> Tensor:
        """1 where a structure stays, else 0: of each group the `removed` with the lowest logits go."""
        order = self.logits.argsort(stable=True)
        order = order[self.groups_of[order].argsort(stable=True)]  # group by group, each in the order of its logits
        groups = self.groups_of[order]
        place = torch.arange(len(order), device=order.device) - self.starts[groups]
        return torch.empty_like(self.logits).index_copy_(
            0, order, (place >= self.removed[groups]).to(self.logits.dtype)
        )

    @torch.no_grad()
    def update_widths(self) -> None:
        """The planner's, for the logits as they are; nothing where the shape is uniform."""
        if not self.uniform:
            self._set_widths(self.split(self.logits.double().cpu().exp() * self.costs))

    def _set_widths(self, scores: Mapping[str, Tensor]) -> None:
        plan = self.plan_of(scores)
        self.removed.copy_(torch.tensor([len(plan.removed.get(name, ())) for name in self.names]))

    def split(self, values: Tensor) -> dict[str, Tensor]:
        """`(all structures,)` -> group -> `(structures,)`."""
        return dict(zip(self.names, torch.split(values, self.sizes), strict=True))

    def plan(self, shape: Any) -> Plan:
        """What goes."""
        gone = {name: (kept == 0).nonzero().flatten().tolist() for name, kept in self.split(self.kept()).items()}
        return Plan(removed={name: tuple(rows) for name, rows in gone.items()}, shape=shape)


class Phases(TrainerCallback):  # type: ignore[misc]
    """First the choice, then the scales; told by the step, so that a resumed run is where it was."""

    def __init__(self, gated: GatedModel, steps: int) -> None:
        self.gated, self.choices = gated, ceil(CHOICE * steps)

    def on_step_begin(self, _args: Any, state: Any, _control: Any, **_: Any) -> None:
        """Before the forward passes of a step."""
        self.gated.choosing = state.global_step < self.choices
        if state.global_step and state.global_step % WIDTHS_EVERY == 0 and self.gated.choosing:
            self.gated.update_widths()


def _learn(scoring: Scoring, run: TrainingRun, plan_of: PlanOf) -> Plan:
    settings, model = run.settings, scoring.model
    scores = ONE_SHOT.score(scoring)
    uniform = settings.prune.shape == "uniform"
    with _frozen(model):
        gated = GatedModel(model, scoring.graph, scores, plan_of, uniform=uniform)
        optimizer = torch.optim.AdamW(
            [gated.logits, gated.scales], lr=settings.prune.learning_rate or RATE, betas=BETAS, weight_decay=0.0
        )
        sources = run.data.sources
        windows = MixtureDataset(
            sources, proportional_weights(sources), num_samples=run.steps * settings.batch, seed=settings.seed
        )
        job = TrainJob(
            name=STAGE,
            steps=run.steps,
            batch=settings.batch,
            micro_batch=scoring.batch,
            seed=settings.seed,
            out=run.out,
            dtype=run.dtype,
            checkpoint_every=run.checkpoint_every,
            resume=run.resume,
            progress=run.progress,
        )
        try:
            train(
                gated,
                windows,
                optimizer=optimizer,
                scheduler=constant_with_warmup(optimizer, warmup_steps=1),
                job=job,
                callbacks=[Phases(gated, run.steps)],
                teacher=run.teacher,
            )
        finally:
            gated.gates.remove()
    gated.choosing = False
    fold_gates_(model, scoring.graph, gated.split(gated.current().detach()))
    return gated.plan(settings.prune.shape)


@contextmanager
def _frozen(model: PreTrainedModel) -> Iterator[None]:
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        model.requires_grad_(False)
        yield
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


GRASPRUNE = Method("grasprune", "https://arxiv.org/abs/2604.19398", ONE_SHOT.score, learn=_learn)
