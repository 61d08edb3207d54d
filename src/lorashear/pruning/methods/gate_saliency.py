"""lorashear's own score: what the loss says about structure gates. `lhspg` walks by it, `one-shot` cuts by it at
once."""

from __future__ import annotations

from torch import Tensor

from lorashear.analysis.saliency import score
from lorashear.graph.groups import Kind
from lorashear.graph.writers import expert_writers
from lorashear.pruning.gates import gate_statistics
from lorashear.pruning.methods.method import IN_LAYERS, Method, Scoring


def _gates(scoring: Scoring) -> dict[str, Tensor]:
    model, graph = scoring.model, scoring.graph
    writers = expert_writers(graph, [group for group in scoring.groups if group.kind is Kind.EXPERTS])
    statistics = gate_statistics(
        model, graph.gated, scoring.windows, batch=scoring.batch, dtype=scoring.dtype, writers=writers
    )
    return score(model, graph, statistics, scoring.saliency, groups=scoring.groups)


LHSPG = Method("lhspg", "https://arxiv.org/abs/2310.18356", _gates, kinds=(*IN_LAYERS, "residual"), walks=True)
ONE_SHOT = Method(
    "one-shot", "https://arxiv.org/abs/1905.10650", _gates, kinds=(*IN_LAYERS, "residual"), also=("experts",)
)
