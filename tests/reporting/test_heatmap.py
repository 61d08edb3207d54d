"""The picture of a profile: what it shows, and that its texts stay apart."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
from matplotlib.image import imread
from matplotlib.patches import Rectangle

from lorashear.analysis.profile import Profile, ProfileEntry
from lorashear.config import AnalysisSettings
from lorashear.errors import DataError
from lorashear.reporting.heatmap import _short, draw_profile, profile_figure

TEN = ("wikipedia", "math", "code", "web", "stories", "instructions", "chat", "news", "textbooks", "dialogue")


def profile_of(layers: int, sources: tuple[str, ...], kinds: tuple[str, ...] = ("heads", "ffn-channels")) -> Profile:
    """Deviations fall with depth; source k is k + 1 times as sensitive as the first."""
    entries = []
    for layer in range(layers):
        for kind in kinds:
            deviation = {source: (k + 1) / (1 + layer) for k, source in enumerate(sources)}
            macro = sum(deviation.values()) / len(deviation)
            name = f"layers.{layer}.{kind}"
            entries.append(
                ProfileEntry(group=name, kind=kind, layer=layer, size=8, probed=2, deviation=deviation, macro=macro)
            )
    return Profile(
        entries=tuple(entries),
        base=dict.fromkeys(sources, 2.0),
        unprunable=(entries[0].group,),
        settings=AnalysisSettings(unprunable=0.1),
    )


@pytest.mark.parametrize(("layers", "sources"), [(6, TEN), (30, TEN), (2, ("wiki",)), (80, TEN[:2])])
def test_no_two_texts_overlap_and_none_leaves_the_picture(layers, sources):
    figure = profile_figure(profile_of(layers, sources))
    figure.draw_without_rendering()
    texts = list(figure.texts)
    for axes in figure.axes:
        texts += [axes.title, axes.xaxis.label, axes.yaxis.label, *axes.texts, *axes.get_xticklabels()]
        texts += axes.get_yticklabels()
    boxes = [(text.get_text(), text.get_window_extent()) for text in texts if text.get_text()]
    assert len(boxes) > layers
    for (a, box), (b, other) in combinations(boxes, 2):
        overlap = min(box.x1, other.x1) - max(box.x0, other.x0), min(box.y1, other.y1) - max(box.y0, other.y0)
        assert min(overlap) <= 0.5, f"{a!r} meets {b!r}"
    for text, box in boxes:
        assert box.x0 >= 0, text
        assert box.y0 >= 0, text
        assert box.x1 <= figure.bbox.x1, text
        assert box.y1 <= figure.bbox.y1, text


def test_a_wide_picture_is_wrapped():
    figure = profile_figure(profile_of(6, TEN, ("heads", "query-slots", "ffn-channels")))
    assert figure.get_figwidth() < 11.5  # inches
    *panels, bar = (axes.get_position() for axes in figure.axes)
    assert [round(panel.y0, 3) == round(panels[0].y0, 3) for panel in panels] == [True, True, False, False]
    assert bar.x0 > max(panel.x1 for panel in panels)
    assert [bool(axes.get_ylabel()) for axes in figure.axes[:-1]] == [True, False, True, False]


def test_the_panels_are_the_mean_and_one_for_each_kind():
    figure = profile_figure(profile_of(3, ("wiki", "math")))
    *panels, bar = figure.axes
    assert [axes.get_title() for axes in panels] == ["all sources", "heads", "ffn-channels"]
    assert [label.get_text() for label in panels[0].get_xticklabels()] == ["heads", "ffn-channels"]
    assert [label.get_text() for label in panels[1].get_xticklabels()] == ["wiki", "math"]
    assert [text.get_text() for text in panels[1].texts] == ["1.00", "2.00", "0.50", "1.00", "0.33", "0.67"]
    assert bar.get_ylabel() == "rise of the loss (nats/token)"
    assert bar.get_yticklabels()[-1].get_text() == "2"


def test_a_single_source_needs_no_panel_of_its_own():
    assert len(profile_figure(profile_of(3, ("wiki",))).axes) == 2  # the mean and the colour bar


def test_unprunable_groups_are_framed():
    figure = profile_figure(profile_of(3, ("wiki", "math")))
    frames = [[p for p in axes.patches if isinstance(p, Rectangle)] for axes in figure.axes[:3]]
    assert [len(found) for found in frames] == [1, 1, 0]
    assert frames[1][0].get_width() > 1.5  # both sources in one frame
    assert any("top 10%" in text.get_text() for text in figure.texts)


def test_groups_of_one_cell_are_averaged_and_missing_cells_are_grey():
    profile = profile_of(2, ("wiki",))
    entries = list(profile.entries)[:3]  # layer 1 has no channels
    twin = entries[0].model_copy(update={"group": "twin", "macro": 3.0})
    outside = entries[0].model_copy(update={"group": "outside", "layer": None})
    axes = profile_figure(profile.model_copy(update={"entries": (*entries, twin, outside)})).axes[0]
    assert axes.texts[0].get_text() == "2.00"
    assert [label.get_text() for label in axes.get_yticklabels()] == ["0", "1", "other"]
    red, green, blue, _ = axes.images[0].get_array()[1, 1]
    assert red == green == blue


def test_the_file_is_a_picture(tmp_path):
    draw_profile(profile_of(2, ("wiki", "math")), tmp_path / "profile.png")
    pixels = imread(tmp_path / "profile.png")
    assert pixels.shape[0] > 200
    assert len(np.unique(pixels.reshape(-1, pixels.shape[2]), axis=0)) > 50


def test_a_profile_where_nothing_is_lost_can_be_drawn():
    profile = profile_of(2, ("wiki",))
    harmless = tuple(entry.model_copy(update={"macro": -0.01}) for entry in profile.entries)
    figure = profile_figure(profile.model_copy(update={"entries": harmless}))
    assert {text.get_text() for text in figure.axes[0].texts} == {"-.010"}


def test_an_empty_profile_is_refused():
    empty = profile_of(1, ("wiki",)).model_copy(update={"entries": ()})
    with pytest.raises(DataError, match="no entry to draw"):
        profile_figure(empty)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0, "0"),
        (-1e-6, "0"),
        (0.0004, "4e-4"),
        (-0.0123, "-.012"),
        (0.0999, "0.10"),
        (0.5, "0.50"),
        (9.96, "10.0"),
        (123.4, "123"),
    ],
)
def test_numbers_in_cells_are_short(value, text):
    assert _short(value) == text
    assert len(text) <= 5
