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
from PIL import Image

from lorashear.analysis.profile import Profile, ProfileEntry
from lorashear.errors import DataError

COLOURS = "viridis"  # perceptually uniform, and legible in grey and to the colour-blind
MISSING = "#e6e6e6"
MARK = "#d7301f"
NUMBERS_UP_TO = 16
"""Most layers for which cells also carry their number."""

# Sizes in inches.
NUMBERED_CELL, PLAIN_CELL = (0.42, 0.3), (0.26, 0.18)
"""Width and height."""
MARGIN, GAP, BAR_WIDTH = 0.75, 0.3, 0.16
HEAD, PANEL_TITLE, FOOT, LETTER = 0.35, 0.32, 0.35, 0.075
LEAST_WIDTH, MOST_WIDTH, LEAST_BAR, MOST_BAR = 5.2, 10.6, 1.4, 3.0


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
    """Writes `profile_figure` as a PNG to `path`, which is overwritten; 256 colours make a file of a third of the size."""
    canvas = FigureCanvasAgg(profile_figure(profile))
    canvas.draw()
    picture = Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")
    picture.quantize(256, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE).save(path, format="PNG", optimize=True)


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
    layout = _layout(panels, len(rows))
    figure = Figure(figsize=(layout.width, layout.height), dpi=150)
    FigureCanvasAgg(figure)

    def place(box: tuple[float, float, float, float]) -> Any:
        left, top, wide, tall = box
        bottom = layout.height - top - tall
        return figure.add_axes((left / layout.width, bottom / layout.height, wide / layout.width, tall / layout.height))

    largest = max(1e-6, *(float(np.nanmax(panel.values)) for panel in panels))
    scale = ScalarMappable(PowerNorm(0.5, vmin=0.0, vmax=largest, clip=True), COLOURS)
    for panel, box in zip(panels, layout.boxes, strict=True):
        _draw_panel(place(box), panel, rows, scale, labelled=box[0] == MARGIN)
    ticks = [largest * (part / 4) ** 2 for part in range(5)]  # evenly spaced on the bar
    bar = figure.colorbar(scale, cax=place(layout.bar), ticks=ticks)
    bar.set_ticklabels([f"{tick:.2g}" for tick in ticks])
    bar.set_label(f"rise of the loss ({profile.unit})", fontsize=8)
    bar.ax.tick_params(labelsize=7)
    _write_texts(figure, profile, layout.width, layout.height)
    return figure


@dataclass(frozen=True)
class _Layout:
    """Where things are, in inches from the upper left corner: (left, top, width, height)."""

    width: float
    height: float
    boxes: tuple[tuple[float, float, float, float], ...]
    """One a panel."""
    bar: tuple[float, float, float, float]


def _layout(panels: Sequence[Panel], rows: int) -> _Layout:
    """Panels side by side, in as many lines as keep the picture narrow enough to be read on a page."""
    numbered = rows <= NUMBERS_UP_TO
    cell_width, cell_height = NUMBERED_CELL if numbered else PLAIN_CELL
    body = cell_height * rows
    boxes: list[tuple[float, float, float, float]] = []
    left, top, labels, right = MARGIN, HEAD + PANEL_TITLE, 0.0, 0.0
    for panel in panels:
        wide = max(cell_width * len(panel.columns), LETTER * 1.15 * len(panel.title))
        if boxes and left + wide > MOST_WIDTH:
            left, top, labels = MARGIN, top + body + labels + PANEL_TITLE, 0.0
        boxes.append((left, top, wide, body))
        labels = max(labels, 0.4, LETTER * max(map(len, panel.columns)))
        right = max(right, left + wide)
        left += wide + GAP
    width = max(right + GAP + BAR_WIDTH + MARGIN, LEAST_WIDTH)
    bar = (right + GAP, HEAD + PANEL_TITLE, BAR_WIDTH, min(max(body, LEAST_BAR), MOST_BAR))
    height = max(top + body + labels, bar[1] + bar[3]) + FOOT
    return _Layout(width, height, tuple(boxes), bar)


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


def _draw_panel(axes: Any, panel: Panel, rows: Sequence[int | None], scale: Any, *, labelled: bool) -> None:
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
        note = f"framed: left alone by per-layer pruning (the top {profile.settings.unprunable:.0%} of the groups)"
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
