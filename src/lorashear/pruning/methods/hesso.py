"""HESSO, the same authors' later optimizer: a preset of the walk.

The same hybrid training: warm-up with the base optimizer; then, period by period, all criteria are taken anew, and the
slices of the least salient structures are scaled to zero by (T - t - 1) / (T - t) while *all* weights train. Five criteria
with equal weights: norm, mean norm, cosine between weight and gradient, first- and second-order Taylor term.

Structures are compared with one another whatever they save, not per parameter: their norms make heads look cheap there.

Where this departs from the authors' code: a criterion is divided by its mean over the model, not by its Euclidean norm; the
Taylor terms are means over the samples of a period, not those of one batch; the cosine is with the gradient, not with the
optimizer's step; and the budget is one of parameters. Left out is CRIC, the cycle that tries structures and takes the
weights back before it decides: a second schedule with a copy of all weights.
"""

from __future__ import annotations

from torch import Tensor

from lorashear.analysis.saliency import score
from lorashear.config import SaliencySettings
from lorashear.pruning.gates import gate_statistics
from lorashear.pruning.methods.method import Method, Scoring, per_structure

MIX = SaliencySettings(magnitude=0.2, mean_magnitude=0.2, cosine=0.2, taylor=0.2, taylor2=0.2)


def _dense(scoring: Scoring) -> dict[str, Tensor]:
    """Before training there is no update for the cosine to look at."""
    model, graph = scoring.model, scoring.graph
    statistics = gate_statistics(model, graph.gated, scoring.windows, batch=scoring.batch, dtype=scoring.dtype)
    return per_structure(graph, score(model, graph, statistics, scoring.saliency.model_copy(update={"cosine": 0.0})))


HESSO = Method(
    "hesso",
    "https://arxiv.org/abs/2409.09085",
    _dense,
    walks=True,
    adjust=per_structure,
    prune={"train": "all", "shrink": "slices", "memory": 0.0},
    saliency=MIX,
)
