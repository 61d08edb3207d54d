"""Makes large language models smaller and keeps what they know (LoRAShear, arXiv 2310.18356)."""

from lorashear.analysis.profile import Profile, analyze
from lorashear.config import CompressSettings
from lorashear.errors import (
    DataError,
    LorashearError,
    ModelError,
    OutputError,
    PlanError,
    SettingsError,
    TrainingError,
)
from lorashear.graph.discover import discover
from lorashear.graph.groups import Graph, NodeGroup
from lorashear.pipeline import CompressResult, compress, evaluate, prune, recover
from lorashear.plan import Plan
from lorashear.pruning.planner import plan
from lorashear.surgery.cut import cut_, zero_
from lorashear.surgery.saving import load
from lorashear.verify import Verification, verify

__version__ = "0.1.0"

__all__ = [
    "CompressResult",
    "CompressSettings",
    "DataError",
    "Graph",
    "LorashearError",
    "ModelError",
    "NodeGroup",
    "OutputError",
    "Plan",
    "PlanError",
    "Profile",
    "SettingsError",
    "TrainingError",
    "Verification",
    "analyze",
    "compress",
    "cut_",
    "discover",
    "evaluate",
    "load",
    "plan",
    "prune",
    "recover",
    "verify",
    "zero_",
]
