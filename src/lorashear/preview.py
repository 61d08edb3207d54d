"""What a ratio leads to, before anything is loaded: sizes from the configuration alone."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from lorashear.config import CompressSettings
from lorashear.graph.discover import discover
from lorashear.models import load_config_model
from lorashear.plan import Plan
from lorashear.pruning.prune import even_plan


@dataclass(frozen=True)
class Preview:
    """Sizes that a plan leads to."""

    plan: Plan
    parameters: int
    kept: int
    widths: dict[str, tuple[int, int, int]]
    """Role -> (structures, fewest left in a layer, most left in a layer)."""

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        return {
            "parameters": self.parameters,
            "kept": self.kept,
            "widths": {role: list(widths) for role, widths in self.widths.items()},
        }

    def table(self) -> Table:
        """For the terminal."""
        table = Table(title=f"{self.parameters:,} -> {self.kept:,} parameters ({self.kept / self.parameters - 1:+.1%})")
        for title in ("group", "structures", "left in a layer"):
            table.add_column(title)
        for role, (size, fewest, most) in self.widths.items():
            table.add_row(role, str(size), str(most) if fewest == most else f"{fewest} to {most}")
        return table


def preview(model: str | Path, *, settings: CompressSettings | None = None, trust_remote_code: bool = False) -> Preview:
    """What a ratio leads to with every structure counting alike; needs only a configuration."""
    empty, _ = load_config_model(model, trust_remote_code=trust_remote_code)
    graph = discover(empty)
    chosen = even_plan(graph, (settings or CompressSettings()).prune)
    widths: dict[str, tuple[int, int, int]] = {}
    for group in [*graph.gated, *(graph[name] for name in chosen.removed if not graph[name].gated)]:
        left = group.size - len(chosen.removed.get(group.name, ()))
        _, fewest, most = widths.get(group.role, (0, left, left))
        widths[group.role] = (group.size, min(fewest, left), max(most, left))
    return Preview(chosen, graph.num_parameters, graph.kept_parameters(chosen.removed), widths)
