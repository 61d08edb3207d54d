"""The tables of `benchmarks/quality.py`: runs as JSON objects in, Markdown out.

Several seeds of a method and ratio make one line: the mean of their logarithms for perplexities, the plain mean for the
rest. *Excess* is ln(macro perplexity) over that of a reference: `dense`, the dense model after the same fine-tuning, and
a number that is given, e.g. the dense model after a published recovery.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from statistics import mean
from typing import Any

from records import markdown

Run = dict[str, Any]
Case = tuple[str, float]
"""Method and ratio."""


def render(runs: Sequence[Run], *, reference: float | None = None, source: str | None = None) -> str:
    """The main table and, below it, the perplexities per source.

    Args:
        runs: rows of `runs.jsonl`; that of the method `whole` is the model as it was.
        reference: macro perplexity of a second reference; None leaves its column out.
        source: whose own perplexity, before and after recovery, is to stand in the main table too.
    """
    whole = next(run for run in runs if run["method"] == "whole")
    cases: dict[Case, list[Run]] = {}
    for run in runs:
        if run["method"] != "whole":
            cases.setdefault((run["method"], run["ratio"]), []).append(run)
    ordered = sorted(cases.items(), key=lambda item: (item[0][1], item[0][0] != "lhspg", item[0]))
    return f"{_main_table(whole, ordered, reference, source)}\n{_source_table(whole, ordered)}"


def _main_table(
    whole: Run, cases: Sequence[tuple[Case, list[Run]]], reference: float | None, source: str | None
) -> str:
    dense = next((_mean_log(_macros(each)) for (method, _), each in cases if method == "dense"), None)
    references = {"excess over dense + same": dense}
    if reference is not None:
        references[f"excess over {reference:g}"] = math.log(reference)
    columns: dict[str, Callable[[list[Run]], str]] = {
        "seeds": lambda each: str(len(each)),
        "net": lambda each: f"{mean(run['net'] for run in each):.1%}" if each[0]["ratio"] else "",
        "before recovery": _before,
        "after": lambda each: f"**{math.exp(_mean_log(_macros(each))):.2f}**",
        "spread": _spread,
        **{name: _excess(log) for name, log in references.items()},
        "worst source": lambda each: "{} {:.1f}".format(*max(_per_source(each).items(), key=lambda item: item[1])),
        "zero-shot": _zeroshot,
        "tokens": lambda each: f"{mean(run['tokens'] for run in each):,.0f}",
        "s": lambda each: f"{mean(run['seconds'] for run in each):.0f}",
        **({f"{source} {when}": _of_source(source, when) for when in ("before", "after")} if source else {}),
    }
    first = dict.fromkeys(columns, "") | {
        "before recovery": f"{whole['before']['macro']:.2f}",
        "worst source": "{} {:.1f}".format(*max(whole["before"]["per_source"].items(), key=lambda item: item[1])),
        "zero-shot": _zeroshot([whole]),
        **({f"{source} before": _of_source(source, "before")([whole])} if source else {}),
    }
    rows = [["whole model", "", *first.values()]]
    rows += [[*_names(case), *(show(each) for show in columns.values())] for case, each in cases]
    return markdown(["method", "ratio", *columns], rows)


def _source_table(whole: Run, cases: Sequence[tuple[Case, list[Run]]]) -> str:
    sources = list(whole["before"]["per_source"])
    rows = [["whole model", "", *_numbers(whole["before"]["per_source"][source] for source in sources)]]
    rows += [[*_names(case), *_numbers(_per_source(each)[source] for source in sources)] for case, each in cases]
    return markdown(["perplexity after", "ratio", *sources], rows)


def _names(case: Case) -> tuple[str, str]:
    method, ratio = case
    return method if method != "dense" else "dense + same fine-tuning", f"{ratio:.0%}" if ratio else ""


def _numbers(values: Iterable[float]) -> list[str]:
    return [f"{value:.2f}" for value in values]


def _macros(each: Sequence[Run]) -> list[float]:
    return [run["after"]["macro"] for run in each]


def _per_source(each: Sequence[Run]) -> dict[str, float]:
    """Perplexity after recovery by source."""
    sources = each[0]["after"]["per_source"]
    return {source: math.exp(_mean_log([run["after"]["per_source"][source] for run in each])) for source in sources}


def _of_source(source: str, when: str) -> Callable[[Sequence[Run]], str]:
    def show(each: Sequence[Run]) -> str:
        values = [run[when]["per_source"][source] for run in each if run.get(when)]
        return f"{math.exp(_mean_log(values)):.2f}" if values else ""

    return show


def _mean_log(values: Sequence[float]) -> float:
    return mean(map(math.log, values))


def _before(each: Sequence[Run]) -> str:
    macros = [run["before"]["macro"] for run in each if run.get("before")]
    return f"{math.exp(_mean_log(macros)):.2f}" if macros else ""


def _spread(each: Sequence[Run]) -> str:
    """Largest minus smallest logarithm over the seeds."""
    logs = [math.log(value) for value in _macros(each)]
    return f"{max(logs) - min(logs):.4f}" if len(logs) > 1 else ""


def _excess(reference: float | None) -> Callable[[Sequence[Run]], str]:
    return lambda each: "" if reference is None else f"{_mean_log(_macros(each)) - reference:.4f}"


def _zeroshot(each: Sequence[Run]) -> str:
    """Mean accuracy over tasks; items by task as `runs.jsonl` has them."""
    measured = [run["zeroshot"] for run in each if run.get("zeroshot")]
    return f"{mean(mean(map(mean, tasks.values())) for tasks in measured):.1%}" if measured else ""
