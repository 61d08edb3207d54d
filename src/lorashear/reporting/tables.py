"""Tables for the terminal, and the node groups for machines."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from rich.console import Group as Lines
from rich.console import RenderableType
from rich.markup import escape
from rich.table import Table

from lorashear.analysis.profile import Profile
from lorashear.evaluation.result import ResultRow
from lorashear.graph.groups import Graph, NodeGroup
from lorashear.reporting.numbers import human_bytes, human_count, human_share
from lorashear.verify import MODULE_RUNS, TOLERANCE, Check, Verification, prunable_share

ABSENT = "-"
SOURCE_COLUMNS = 4
"""Most sources that get a column each in the profile's table; more do not fit a terminal."""


def groups_table(graph: Graph) -> RenderableType:
    """The node groups of a model, equal ones of different layers folded into one row (for `lorashear inspect`).

    Each reason is said once below the table, by the number that its groups carry. Groups cross (a head and a residual
    channel share weights), so the shares of the rows add up to more than the whole.
    """
    decoder = human_share(graph.num_decoder_parameters / graph.num_parameters)
    table = Table(
        title=f"{human_count(graph.num_parameters)} parameters, {decoder} of them in {graph.num_layers} decoder layers"
        f"; heads and FFN channels hold {human_share(prunable_share(graph, graph.gated))} that can be removed, all kinds "
        f"{human_share(prunable_share(graph))}",
    )
    table.add_column("node group", overflow="fold")
    for header in ("structures", "weights\neach", "share of\nmodel"):
        table.add_column(header, justify="right", no_wrap=True)
    table.add_column("prunable", no_wrap=True)
    notes: dict[str, int] = {}
    for alike in _folded(graph):
        first = alike[0]
        note = f" ({notes.setdefault(first.reason, len(notes) + 1)})" if first.reason else ""
        table.add_row(
            escape(_pattern(alike)),
            f"{len(alike)} x {first.size}" if len(alike) > 1 else str(first.size),
            human_count(_parameters_per_structure(graph, first)),
            human_share(len(alike) * _carried(graph, first) / graph.num_parameters),
            _verdict(first) + note,
        )
    return Lines(table, _notes(notes))


GROUPS_LEGEND = (
    "A structure is the least that can be removed; shares overlap where groups cross. yes: zeroed and cut model are equal; "
    "own: so too, but the configuration cannot tell the width, and the result loads with lorashear.load."
)


def _notes(notes: Mapping[str, int]) -> Table:
    """Numbered lines that wrap beside their number."""
    grid = Table.grid(padding=(0, 1))
    grid.add_column(justify="right", no_wrap=True, style="dim")
    grid.add_column(overflow="fold", style="dim")
    for reason, number in notes.items():
        grid.add_row(f"({number})", escape(reason))
    grid.add_row("", GROUPS_LEGEND)
    return grid


def _verdict(group: NodeGroup) -> str:
    if not group.exact or not group.realisable:
        return "no"
    return "[green]yes[/]" if group.plain else "[yellow]own[/]"


def verification_table(result: Verification) -> Table:
    """What was compared and how far zeroed and cut models were apart, one row a kind."""
    table = Table(
        title="zeroed and cut models are " + ("[green]equal[/]" if result.equal else "[red]not equal[/]"),
        caption="Largest difference of the outputs, as a share of the largest output, over random plans; up to "
        f"{TOLERANCE:.0e} counts as equal. On the model: {', '.join(MODULE_RUNS)}. Effect: how far the outputs moved.",
    )
    for header in ("kind", "groups", "structures\nremoved", "by replay", "on the\nmodel", "effect"):
        table.add_column(header, justify="left" if header == "kind" else "right", no_wrap=True)
    for kind in dict.fromkeys(check.kind for check in result.checks):
        checks = [check for check in result.checks if check.kind == kind]
        worst = [_worst(checks, on_model=on_model) for on_model in (False, True)]
        groups = max(check.groups for check in checks)
        removed = max(check.structures for check in checks)
        style = "" if all(check.equal for check in checks) else "bold red"
        effect = max(check.effect for check in checks)
        table.add_row(kind, str(groups), str(removed), *worst, f"{effect:.2g}", style=style)
    return table


def _worst(checks: Sequence[Check], *, on_model: bool) -> str:
    found = [check.difference for check in checks if (check.how in MODULE_RUNS) == on_model]
    return f"{max(found):.1e}" if found else ABSENT


def verification_json(result: Verification) -> dict[str, Any]:
    """The same for machines."""
    return {
        "equal": result.equal,
        "prunable_share": result.prunable_share,
        "checks": [asdict(check) for check in result.checks],
        "not_checked": dict(result.not_checked),
        "notes": list(result.notes),
    }


def groups_json(graph: Graph) -> dict[str, Any]:
    """The node groups for machines: plain data, counts in parameters, shares from 0 to 1."""
    each: dict[str, int] = {}
    for alike in _folded(graph):
        each |= dict.fromkeys((group.name for group in alike), _parameters_per_structure(graph, alike[0]))
    return {
        "parameters": graph.num_parameters,
        "decoder_parameters": graph.num_decoder_parameters,
        "prunable_share": prunable_share(graph),
        "gated_share": prunable_share(graph, graph.gated),
        "layers": graph.num_layers,
        "layers_path": graph.layers_path,
        "groups": [
            {
                "name": group.name,
                "kind": group.kind.value,
                "role": group.role,
                "layer": group.layer,
                "size": group.size,
                "parameters_per_structure": each[group.name],
                "prunable": group.prunable,
                "exactness": group.exactness.value,
                "realisable": group.realisable,
                "settings": list(group.settings),
                "minimum": group.minimum,
                "reason": group.reason,
                "members": [
                    {"parameter": m.parameter, "dim": m.dim, "adapter": m.adapter, "buffer": m.buffer}
                    for m in group.members
                ],
            }
            for group in graph
        ],
    }


def profile_table(profile: Profile) -> Table:
    """The groups by what the model loses without their least salient structures, largest loss first.

    Few sources get a column each; of many, the most and the least affected one are named.
    """
    each_source = len(profile.sources) <= SOURCE_COLUMNS
    base = sum(profile.base.values()) / len(profile.base)
    table = Table(
        title=f"Rise of the loss ({profile.unit}) without the least salient {profile.settings.probe:.0%} of a group",
        caption=f"Loss of the whole model: {base:.3f} {profile.unit}, mean over {len(profile.base)} source(s). "
        "Unprunable groups are left alone by per-layer pruning.",
    )
    table.add_column("node group", overflow="fold")
    for header in ("removed", "mean", *(profile.sources if each_source else ("most", "least"))):
        table.add_column(header, justify="right", no_wrap=True)
    table.add_column("")
    for entry in sorted(profile.entries, key=lambda entry: entry.macro, reverse=True):
        ranked = sorted(entry.deviation.items(), key=lambda item: item[1])
        extremes = [f"{name} {value:+.3f}" for name, value in (ranked[-1], ranked[0])]
        single = [f"{entry.deviation[source]:+.3f}" for source in profile.sources]
        unprunable = entry.group in profile.unprunable
        table.add_row(
            escape(entry.group),
            f"{entry.probed} of {entry.size}",
            f"{entry.macro:+.3f}",
            *(single if each_source else extremes),
            "unprunable" if unprunable else "",
            style="bold" if unprunable else None,
        )
    return table


def result_table(rows: Sequence[ResultRow]) -> Table:
    """Models side by side, the first as the yardstick: changes against it stand in brackets.

    Lines without any number are left out, as are sources that no row measured.
    """
    table = Table(title="Result")
    table.add_column("")
    for row in rows:
        table.add_column(escape(row.label), justify="right")
    sources = dict.fromkeys(source for row in rows for source in row.perplexity)

    def line(name: str, values: Iterable[float | None], show: Callable[[float], str], *, compared: bool = True) -> None:
        yardstick, *others = values
        if yardstick is None and not any(other is not None for other in others):
            return
        cells = [ABSENT if yardstick is None else show(yardstick)]
        for other in others:
            change = f" ({other / yardstick - 1:+.1%})" if compared and other is not None and yardstick else ""
            cells.append(ABSENT if other is None else show(other) + change)
        table.add_row(escape(name), *cells)

    line("parameters", (row.parameters for row in rows), human_count)
    line("size on disk", (row.bytes_on_disk for row in rows), human_bytes)
    for source in sources:
        line(f"perplexity, {source}", (row.perplexity.get(source) for row in rows), _perplexity, compared=False)
    line("perplexity, macro", (row.macro_perplexity for row in rows), _perplexity)
    line("prefill (tokens/s)", (row.prefill_tokens_per_second for row in rows), _rate)
    line("decode (tokens/s)", (row.decode_tokens_per_second for row in rows), _rate)
    return table


def _rate(value: float) -> str:
    return f"{value:,.0f}" if value >= 99.95 else f"{value:.1f}"


def _perplexity(value: float) -> str:
    return f"{value:.2f}" if value < 9999.5 else f"{value:.1e}"


def _folded(graph: Graph) -> list[list[NodeGroup]]:
    """Groups of equal role, verdict and members' sizes: they weigh the same, so one of them is counted for all."""
    folded: dict[tuple[object, ...], list[NodeGroup]] = {}
    for group in graph:
        weights = {member.parameter for member in group.members if member.parameter in graph.parameters}
        sizes = sorted(graph.parameters[weight].numel for weight in weights)
        folded.setdefault((group.role, group.size, group.prunable, *sizes), []).append(group)
    return list(folded.values())


def _pattern(alike: Sequence[NodeGroup]) -> str:
    """`model.layers.{0-5}.mlp: ffn-channels` for the groups of one role; a narrow column breaks it at the space."""
    first = alike[0]
    name = first.name
    if len(alike) > 1:
        layers = _ranges(sorted({group.layer for group in alike if group.layer is not None}))
        name = first.role.replace("*", f"{{{layers}}}", 1) if "*" in first.role else f"{first.role} (layers {layers})"
    return name.replace(":", ": ")


def _ranges(numbers: Sequence[int]) -> str:
    """`0-3,5` for 0, 1, 2, 3, 5."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ",".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def _parameters_per_structure(graph: Graph, group: NodeGroup) -> int:
    return graph.num_parameters - graph.kept_parameters({group.name: [0]})


def _carried(graph: Graph, group: NodeGroup) -> int:
    """Base parameters that have a dimension in the group: what would go with all its structures."""
    return graph.num_parameters - graph.kept_parameters({group.name: range(group.size)})
