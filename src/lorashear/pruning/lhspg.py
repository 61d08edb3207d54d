"""LHSPG: LoRA half-space projected gradient (paper: Algorithm LHSPG), an optimizer around any first-order one.

Warm-up steps are those of the base optimizer. Then, period by period, a callback names the structures that turn
redundant; they shrink to zero over the period while everything else goes on learning, and stay exactly zero from then
on.

A step, in order: gradients of finished slices are zeroed; the base optimizer makes its trial step; newly redundant
structures shrink by (T - t - 1) / (T - t); those that left the half-space are zeroed at once; at the period's last
step all of its structures are zeroed, optimizer state included.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lorashear.errors import SettingsError
from lorashear.graph.groups import Graph, Member
from lorashear.pruning.gates import GateStatistics, StructureGates

Choose = Callable[[int, Mapping[str, Tensor]], Mapping[str, Tensor]]
"""(period, group -> redundant structures so far) -> group -> structures that turn redundant now."""


@dataclass(frozen=True)
class WalkSchedule:
    """How the steps are spent: `warmup` of them, then `periods` of nearly equal length."""

    warmup: int
    periods: int
    total: int

    def __post_init__(self) -> None:
        if self.total - self.warmup < self.periods or self.periods < 1 or self.warmup < 0:
            raise SettingsError(
                f"{self.total} pruning steps are too few for a warm-up of {self.warmup} and {self.periods} periods of at least "
                "one step; give more tokens or a larger prune.share, or lower prune.periods"
            )

    def place(self, step: int) -> tuple[int, int, int] | None:
        """(period, step within it, its length) of a step counted from 0; None during warm-up and after the walk."""
        walked, walk = step - self.warmup, self.total - self.warmup
        if not 0 <= walked < walk:
            return None
        period = min(walked * self.periods // walk, self.periods - 1)
        while self._start(period + 1) <= walked:
            period += 1
        while self._start(period) > walked:
            period -= 1
        start, end = self._start(period), self._start(period + 1)
        return period, walked - start, end - start

    def _start(self, period: int) -> int:
        return (self.total - self.warmup) * period // self.periods


@dataclass(frozen=True)
class _Slice:
    """One member of a group: the tensor, and which of its rows along `dim` belong to which structure."""

    name: str
    tensor: Tensor
    dim: int
    rows: Tensor
    """`(structures, repeats)`."""

    def rows_of(self, structures: Tensor) -> Tensor:
        return self.rows[structures].flatten()


class LHSPG(Optimizer):
    """Wraps `base`, whose parameter groups and state it shares.

    Args:
        base: the optimizer of the trainable parameters (LoRA factors, or all weights).
        model: the model that `graph` was discovered on.
        graph: its node groups.
        schedule: warm-up and periods.
        choose: called at the first step of every period, inside `step`.
        gates: of the same groups; needed where `shrink` is "gates".
        shrink: "slices" scales every slice of a structure, frozen base weights too (the paper's words); "gates" scales
            what the structure contributes, without a write to the weights before the period's end.
        epsilon: half-space test; a structure is zeroed once <W_trial, W_start> < epsilon |W_start|^2. 0 never does.
        handover: called at the first step of every period with the structures that turn redundant; makes what stays take
            over what they give (`surgery/compensate.py`). They are zero at once then, and the period's steps heal.
    """

    def __init__(
        self,
        base: Optimizer,
        *,
        model: nn.Module,
        graph: Graph,
        schedule: WalkSchedule,
        choose: Choose,
        gates: StructureGates | None = None,
        shrink: Literal["slices", "gates"] = "gates",
        epsilon: float = 0.0,
        handover: Callable[[Mapping[str, Tensor]], None] | None = None,
    ) -> None:
        if shrink == "gates" and gates is None:
            raise SettingsError('shrink = "gates" needs the structure gates; hand them in, or shrink "slices"')
        self.base, self.schedule, self.choose = base, schedule, choose
        self.gates, self.shrink, self.epsilon, self.handover = gates, shrink, epsilon, handover
        self.steps = 0
        self.redundant = {group.name: torch.empty(0, dtype=torch.long) for group in graph.gated}
        """Group -> structures that are zero or on their way to it, in the order they were chosen."""
        self.newly: dict[str, Tensor] = {}
        """Those of the current period that are not zero yet."""
        self._sizes = {group.name: group.size for group in graph.gated}
        tensors = dict(model.named_parameters())
        self._slices = {
            group.name: [_slice(member, tensors) for member in group.members if not member.buffer]
            for group in graph.gated
        }
        self._composed = _Composition(model, graph)
        self._start: dict[str, list[Tensor]] = {}
        self._alive: dict[tuple[Tensor, int], Tensor] = {}
        """(trainable tensor, dim) -> 1 where alive, 0 where finished, broadcastable; only where something is
        finished."""
        super().__init__(base.param_groups, {})
        self.param_groups = base.param_groups
        self.state = base.state

    @property
    def phase(self) -> Literal["warm-up", "walk", "done"]:
        """Where the walk is."""
        if self.steps < self.schedule.warmup:
            return "warm-up"
        return "walk" if self.steps < self.schedule.total else "done"

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drops the gradients."""
        self.base.zero_grad(set_to_none)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One step of the base optimizer, and one of the walk."""
        loss = None
        if closure is not None:  # it makes the gradients that are masked below
            with torch.enable_grad():
                loss = closure()
        place = self.schedule.place(self.steps)
        if place is not None and place[1] == 0:
            self._begin(place[0])
        self._mask_gradients()
        self.base.step()
        if place is not None:
            _, at, length = place
            self._shrink(at, length)
            if self.epsilon > 0.0:
                self._half_space()
            if at == length - 1:
                self._finish(self.newly)
                self.newly, self._start = {}, {}
        self.steps += 1
        return loss

    def state_dict(self) -> dict[str, Any]:
        """The base optimizer's state with the walk's beside it: tensors, numbers and dictionaries only."""
        walk = {
            "steps": self.steps,
            "redundant": {name: rows.clone() for name, rows in self.redundant.items()},
            "newly": {name: rows.clone() for name, rows in self.newly.items()},
            "start": {name: [part.clone() for part in parts] for name, parts in self._start.items()},
            "statistics": {} if self.gates is None else {n: vars(s) for n, s in self.gates.statistics().items()},
        }
        return {**self.base.state_dict(), "walk": walk}

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes on where `state_dict` was taken.

        The weights have to be those of that moment too: a checkpoint keeps the trainable ones, and the frozen ones
        where `shrink` is "slices" (`TrainJob.checkpoint_frozen`). Finished slices of frozen weights are zeroed here.
        """
        state = dict(state_dict)
        walk = state.pop("walk")
        self.base.load_state_dict(state)
        self.param_groups, self.state = self.base.param_groups, self.base.state
        self.steps = int(walk["steps"])
        self.redundant = {name: rows.cpu() for name, rows in walk["redundant"].items()}
        self.newly = {name: rows.cpu() for name, rows in walk["newly"].items()}
        self._start = {
            name: [part.to(slice_.tensor.device) for part, slice_ in zip(parts, self._bases(name), strict=True)]
            for name, parts in walk["start"].items()
        }  # Trainer reads checkpoints to the CPU
        if self.gates is not None:
            self.gates.set_statistics({name: GateStatistics(**each) for name, each in walk["statistics"].items()})
        self._alive = {}
        if self.gates is not None and self.shrink == "gates":  # those of another moment may be on their way
            for name, size in self._sizes.items():
                self.gates.set_(name, torch.arange(size), 1.0)
        self._finish({name: _without(rows, self.newly.get(name)) for name, rows in self.redundant.items()})
        place = self.schedule.place(self.steps)
        if self.gates is not None and self.shrink == "gates" and place is not None and place[1] > 0:
            for name, rows in ((n, r) for n, r in self.newly.items() if len(r)):
                self.gates.set_(name, rows, (place[2] - place[1]) / place[2])

    def _begin(self, period: int) -> None:
        """Names the period's structures and, for the half-space test, keeps their composed weights."""
        chosen = self.choose(period, self.redundant)
        self.newly = {name: rows.cpu() for name, rows in chosen.items() if len(rows)}
        for name, rows in self.newly.items():
            self.redundant[name] = torch.cat([self.redundant[name], rows])
        if self.handover is not None:
            self.handover(self.newly)
            self._finish(self.newly)
            self.newly = {}
        if self.epsilon > 0.0:
            self._start = {name: self._parts(name, rows) for name, rows in self.newly.items()}

    def _mask_gradients(self) -> None:
        for (tensor, _), alive in self._alive.items():
            if tensor.grad is not None:
                tensor.grad.mul_(alive)

    def _shrink(self, at: int, length: int) -> None:
        """Uniformly to zero: after step t of T, (T - t - 1) / T of the structure is left."""
        for name, rows in self.newly.items():
            if not len(rows):
                continue
            if self.shrink == "gates":
                assert self.gates is not None
                self.gates.set_(name, rows, (length - at - 1) / length)
                continue
            for part in self._slices[name]:
                _scale(part, rows, (length - at - 1) / (length - at))

    def _half_space(self) -> None:
        """Zeroes structures whose composed weights have turned away from where the period began (paper: half-space)."""
        for name, rows in list(self.newly.items()):
            if not len(rows):
                continue
            inner = torch.zeros(len(rows))
            norm = torch.zeros(len(rows))
            left = 1.0 if self.shrink == "slices" else self._gate(name, rows)
            for now, start in zip(self._parts(name, rows), self._start[name], strict=True):
                inner += (now * start).sum(1).cpu() * left
                norm += start.square().sum(1).cpu()
            gone = inner < self.epsilon * norm
            if bool(gone.any()):
                self._finish({name: rows[gone]})
                self.newly[name] = rows[~gone]
                self._start[name] = [start[~gone.to(start.device)] for start in self._start[name]]

    def _gate(self, name: str, rows: Tensor) -> float:
        """All structures of a period have one gate."""
        assert self.gates is not None
        return float(self.gates.values[name][rows[0]])

    def _parts(self, name: str, rows: Tensor) -> list[Tensor]:
        """Composed slices of some structures, `(structures, entries)` each, float32: W = x + s B A."""
        return [self._composed.rows(part, rows).flatten(1) for part in self._bases(name)]

    def _bases(self, name: str) -> list[_Slice]:
        return [part for part in self._slices[name] if self._composed.is_base(part.name)]

    def _finish(self, structures: Mapping[str, Tensor]) -> None:
        """Exactly zero: every slice, its optimizer state, and from now on its gradient."""
        for name, rows in structures.items():
            if not len(rows):
                continue
            for part in self._slices[name]:
                places = part.rows_of(rows).to(part.tensor.device)
                part.tensor.index_fill_(part.dim, places, 0)
                if part.tensor.requires_grad:
                    self._forget(part, places)
            if self.gates is not None and self.shrink == "gates":
                self.gates.set_(name, rows, 1.0)

    def _forget(self, part: _Slice, places: Tensor) -> None:
        for value in self.state.get(part.tensor, {}).values():
            if isinstance(value, Tensor) and value.shape == part.tensor.shape:
                value.index_fill_(part.dim, places, 0)
        shape = [1] * part.tensor.dim()
        shape[part.dim] = part.tensor.shape[part.dim]
        key = (part.tensor, part.dim)
        alive = self._alive.setdefault(key, torch.ones(shape, device=part.tensor.device, dtype=part.tensor.dtype))
        alive.index_fill_(part.dim, places, 0)


def _slice(member: Member, tensors: Mapping[str, Tensor]) -> _Slice:
    return _Slice(member.parameter, tensors[member.parameter], member.dim, member.rows)


def _scale(part: _Slice, rows: Tensor, factor: float) -> None:
    places = part.rows_of(rows).to(part.tensor.device)
    shrunk = part.tensor.index_select(part.dim, places) * factor
    part.tensor.index_copy_(part.dim, places, shrunk)


def _without(rows: Tensor, others: Tensor | None) -> Tensor:
    return rows if others is None or not len(others) else rows[~torch.isin(rows, others)]


class _Composition:
    """Slices of W = x + s B A, computed for the rows that are asked for and no others."""

    def __init__(self, model: nn.Module, graph: Graph) -> None:
        self.model = model
        self.adapters = {name for name, info in graph.parameters.items() if info.adapter}

    def is_base(self, name: str) -> bool:
        return name not in self.adapters

    def rows(self, part: _Slice, structures: Tensor) -> Tensor:
        """`(structures, repeats, other entries)` float32."""
        places = part.rows[structures].to(part.tensor.device)
        weight = part.tensor.detach().movedim(part.dim, 0)[places.flatten()].float()
        if part.name.endswith(".base_layer.weight"):
            weight = weight + self._update(part, places.flatten())
        return weight.reshape(*places.shape, -1)

    def _update(self, part: _Slice, places: Tensor) -> Tensor:
        layer: Any = self.model.get_submodule(part.name.removesuffix(".base_layer.weight"))
        outputs = 1 if getattr(layer, "fan_in_fan_out", False) else 0  # GPT-2's weights lie the other way round
        total = torch.zeros((), device=part.tensor.device)
        for adapter in layer.active_adapters:
            a, b = layer.lora_A[adapter].weight.float(), layer.lora_B[adapter].weight.float()
            change = b[places] @ a if part.dim == outputs else (b @ a[:, places]).T
            total = total + layer.scaling[adapter] * change
        return total


def trainable(model: nn.Module) -> Iterable[nn.Parameter]:
    """Parameters that learn."""
    return (parameter for parameter in model.parameters() if parameter.requires_grad)
