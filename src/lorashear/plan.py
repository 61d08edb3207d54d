"""A plan: which structures of which node group are removed. Plain data, saved, read, diffed, applied to any
checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Self

from pydantic import BaseModel, ConfigDict, ValidationError, field_validator

from lorashear.config import Shape
from lorashear.errors import PlanError
from lorashear.graph.groups import Graph


class Plan(BaseModel):
    """Group name -> indices of the structures to remove, ascending. Groups that lose nothing are left out."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    removed: dict[str, tuple[int, ...]]
    shape: Shape = "per-layer"

    @field_validator("removed")
    @classmethod
    def _ascending(cls, removed: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
        return {name: tuple(sorted(set(rows))) for name, rows in removed.items() if rows}

    def check(self, graph: Graph, *, realisable: bool = True) -> None:
        """Raises `PlanError` where the plan does not fit the graph: unknown or pinned group, index out of range,
        too few left; with `realisable` also a group that the model's own code cannot be built with fewer of."""
        for name, rows in self.removed.items():
            group = graph[name]
            if not (group.prunable if realisable else group.exact):
                raise PlanError(f"the plan removes structures of {name}, which is not prunable: {group.reason}")
            if rows[0] < 0 or rows[-1] >= group.size:
                raise PlanError(
                    f"the plan removes structure {rows[-1]} of {name}, which has {group.size} (0..{group.size - 1})"
                )
            if len(rows) > group.size - group.minimum:
                stay = "one has" if group.minimum == 1 else f"{group.minimum} have"
                raise PlanError(
                    f"the plan removes {len(rows)} of the {group.size} structures of {name}; at least {stay} to stay"
                )

    def save(self, path: str | Path) -> None:
        """Writes the plan as JSON."""
        Path(path).write_text(self.model_dump_json(indent=1) + "\n", encoding="utf-8")

    @classmethod
    def read(cls, path: str | Path) -> Self:
        """Raises `PlanError` for a file that is missing or is not a plan."""
        try:
            return cls.model_validate_json(Path(path).read_text(encoding="utf-8"))
        except (OSError, ValidationError) as error:
            raise PlanError(
                f"{path}: not a plan as lorashear saves it ({error}); take a run folder's plan.json"
            ) from None
