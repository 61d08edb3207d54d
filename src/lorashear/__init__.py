"""Makes large language models smaller and keeps what they know (LoRAShear, arXiv 2310.18356)."""

from lorashear.errors import (
    DataError,
    LorashearError,
    ModelError,
    OutputError,
    PlanError,
    SettingsError,
)
from lorashear.graph.discover import discover
from lorashear.graph.groups import Graph, NodeGroup
from lorashear.plan import Plan
from lorashear.pruning.planner import plan
from lorashear.surgery.cut import cut_, zero_
from lorashear.surgery.saving import load

__version__ = "0.1.0"

__all__ = [
    "DataError",
    "Graph",
    "LorashearError",
    "ModelError",
    "NodeGroup",
    "OutputError",
    "Plan",
    "PlanError",
    "SettingsError",
    "cut_",
    "discover",
    "load",
    "plan",
    "zero_",
]
