"""The knowledge profile as a picture: layers against kinds, and for every kind layers against sources."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.colors import PowerNorm, to_rgba
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from numpy.typing import NDArray

from lorashear.analysis.profile import Profile, ProfileEntry
from lorashear.errors import DataError

COLOURS = "viridis"  # perceptually uniform, and legible in grey and to the colour-blind
MISSING = "#e6e6e6"
MARK = "#d7301f"
NUMBERS_UP_TO = 16
"""Most layers for which cells also carry their number."""

# Sizes in inches.
CELL_WIDTH, MARGIN, GAP, BAR_WIDTH = 0.52, 0.75, 0.3, 0.16
TALL_CELL, FLAT_CELL = 0.34, 0.2
TITLE, FOOT, LETTER = 0.65, 0.35, 0.075
LEAST_WIDTH, LEAST_BAR, MOST_BAR = 5.2, 1.4, 3.0


@dataclass(frozen=True)
class Panel:
    """One heat map: rows are the picture's layers."""

    title: str
    columns: tuple[str, ...]
    values: NDArray[np.float64]
    """`(rows, columns)`, NaN where there is no group."""
    marked: NDArray[np.bool_]
    """`(rows, columns)`: the group is unprunable."""
    by_source: bool
    """Columns are the sources of one kind; otherwise they are kinds."""


def draw_profile(profile: Profile, path: str | Path) -> None:
    """Writes `profile_figure` as a PNG to `path`, which is overwritten."""
    profile_figure(profile).savefig(path, format="png")


def profile_figure(profile: Profile) -> Figure:
    """The picture of a profile, sized so that its texts do not meet; pyplot's state is left alone.

    The first panel shows the mean over the sources, layers x kind; then each kind has one, layers x source. All share
    one colour scale, which grows with the square root of the deviation, as a few groups outweigh all others. Negative
    deviations take the colour of 0; groups left alone by pruning are framed. Several groups of one layer and kind (say,
    the channels of experts) share a cell that shows their mean.

    Raises:
        DataError: the profile has no entry.
    """
    if not profile.entries:
        raise DataError(
            "the profile has no entry to draw, at least one was expected; does the model have prunable groups?"
        )
    rows = sorted({entry.layer for entry in profile.entries}, key=lambda layer: (layer is None, layer or 0))
    panels = _panels(profile, rows)
    cell_height = TALL_CELL if len(rows) <= NUMBERS_UP_TO else FLAT_CELL
    columns = max(len(label) for panel in panels for label in panel.columns)
    labels = max(0.4, columns * LETTER)
    body = cell_height * len(rows)
    widths = [max(CELL_WIDTH * len(panel.columns), LETTER * 1.15 * len(panel.title)) for panel in panels]
    width = max(MARGIN + sum(widths) + GAP * len(panels) + BAR_WIDTH + MARGIN, LEAST_WIDTH)
    height = TITLE + body + labels + FOOT
    figure = Figure(figsize=(width, height), dpi=150)
    FigureCanvasAgg(figure)

    def place(left: float, wide: float, tall: float = body) -> Any:
        return figure.add_axes((left / width, (labels + FOOT + body - tall) / height, wide / width, tall / height))

    largest = max(1e-6, *(float(np.nanmax(panel.values)) for panel in panels))
    scale = ScalarMappable(PowerNorm(0.5, vmin=0.0, vmax=largest, clip=True), COLOURS)
    left = MARGIN
    for number, (panel, wide) in enumerate(zip(panels, widths, strict=True)):
        _draw_panel(place(left, wide), panel, rows if number == 0 else [None] * len(rows), scale, number == 0)
        left += wide + GAP
    bar_height = min(max(body, LEAST_BAR), MOST_BAR)
    ticks = [largest * (part / 4) ** 2 for part in range(5)]  # evenly spaced on the bar
    bar = figure.colorbar(scale, cax=place(left, BAR_WIDTH, bar_height), ticks=ticks)
    bar.set_ticklabels([f"{tick:.2g}" for tick in ticks])
    bar.set_label(f"rise of the loss ({profile.unit})", fontsize=8)
    bar.ax.tick_params(labelsize=7)
    _write_texts(figure, profile, width, height)
    return figure


def _panels(profile: Profile, rows: Sequence[int | None]) -> list[Panel]:
    kinds = tuple(dict.fromkeys(entry.kind for entry in profile.entries))
    panels = [
        _panel("all sources", rows, kinds, profile, lambda entry, kind: entry.macro if entry.kind == kind else None)
    ]
    if len(profile.sources) > 1:
        for kind in kinds:

            def of_source(entry: ProfileEntry, source: str, kind: str = kind) -> float | None:
                return entry.deviation[source] if entry.kind == kind else None

            panels.append(_panel(kind, rows, profile.sources, profile, of_source))
    return panels


def _panel(
    title: str,
    rows: Sequence[int | None],
    columns: Sequence[str],
    profile: Profile,
    value: Callable[[ProfileEntry, str], float | None],
) -> Panel:
    values = np.full((len(rows), len(columns)), np.nan)
    marked = np.zeros(values.shape, dtype=np.bool_)
    for y, layer in enumerate(rows):
        for x, column in enumerate(columns):
            found = [(value(e, column), e.group in profile.unprunable) for e in profile.entries if e.layer == layer]
            numbers = [number for number, _ in found if number is not None]
            if numbers:
                values[y, x] = np.mean(numbers)
                marked[y, x] = any(mark for number, mark in found if number is not None)
    return Panel(title, tuple(map(str, columns)), values, marked, columns == profile.sources)


def _draw_panel(axes: Any, panel: Panel, rows: Sequence[int | None], scale: Any, labelled: bool) -> None:
    colours = scale.to_rgba(np.ma.masked_invalid(panel.values))
    colours[np.isnan(panel.values)] = to_rgba(MISSING)
    axes.imshow(colours, aspect="auto", interpolation="nearest")
    axes.set_title(panel.title, fontsize=9)
    axes.set_xticks(range(len(panel.columns)), panel.columns, rotation=90, fontsize=8)
    if labelled:
        axes.set_yticks(range(len(rows)), ["other" if row is None else str(row) for row in rows], fontsize=8)
        axes.set_ylabel("layer", fontsize=9)
    else:
        axes.set_yticks([])
    axes.tick_params(length=0)
    for side in axes.spines.values():
        side.set_visible(False)
    for y, x in np.argwhere(~np.isnan(panel.values)):
        if len(rows) <= NUMBERS_UP_TO:
            light = colours[y, x, :3] @ (0.2126, 0.7152, 0.0722) > 0.5
            axes.text(
                x, y, _short(panel.values[y, x]), ha="center", va="center", fontsize=7, color="k" if light else "w"
            )
    for y, x, wide in _frames(panel):
        size = wide - 0.08, 0.88
        axes.add_patch(Rectangle((x - 0.46, y - 0.44), *size, fill=False, edgecolor=MARK, linewidth=1.6))


def _frames(panel: Panel) -> list[tuple[int, int, int]]:
    """Row, first column and number of columns of each frame: a group that spans a whole row gets one frame."""
    wide = len(panel.columns)
    if panel.by_source:
        return [(int(y), 0, wide) for y in np.flatnonzero(panel.marked.any(axis=1))]
    return [(int(y), int(x), 1) for y, x in np.argwhere(panel.marked)]


def _write_texts(figure: Any, profile: Profile, width: float, height: float) -> None:
    share = f"{profile.settings.probe:.0%}"
    figure.text(
        0.12 / width,
        1 - 0.12 / height,
        f"What is lost without the least salient {share} of each group",
        fontsize=10,
        weight="bold",
        va="top",
    )
    if profile.unprunable:
        note = f"framed: left alone by pruning (the top {profile.settings.unprunable:.0%} of the groups)"
        figure.text(0.12 / width, 0.1 / height, note, fontsize=8, color=MARK, va="bottom")


def _short(value: float) -> str:
    """At most five characters: `0.12`, `.003`, `-.01`, `12.3`, `1e-5` and `0`."""
    if abs(value) < 5e-5:
        return "0"
    if abs(value) < 0.00095:
        return f"{value:.0e}".replace("e-0", "e-")
    digits = 3 if abs(value) < 0.0995 else 2 if abs(value) < 9.95 else 1 if abs(value) < 99.5 else 0
    text = f"{value:.{digits}f}"
    return text.replace("0.", ".", 1) if abs(value) < 0.0995 else text
