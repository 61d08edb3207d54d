"""lorashear's own score: what the loss says about structure gates. `lhspg` walks by it, `one-shot` cuts by it at
once."""

from __future__ import annotations

from torch import Tensor

from lorashear.analysis.saliency import score
from lorashear.pruning.gates import gate_statistics
from lorashear.pruning.methods.method import IN_LAYERS, Method, Scoring


def _gates(scoring: Scoring) -> dict[str, Tensor]:
    model, graph = scoring.model, scoring.graph
    statistics = gate_statistics(model, graph.gated, scoring.windows, batch=scoring.batch, dtype=scoring.dtype)
    return score(model, graph, statistics, scoring.saliency)


LHSPG = Method("lhspg", "https://arxiv.org/abs/2310.18356", _gates, kinds=(*IN_LAYERS, "residual"), walks=True)
ONE_SHOT = Method("one-shot", "https://arxiv.org/abs/1905.10650", _gates, kinds=(*IN_LAYERS, "residual"))
