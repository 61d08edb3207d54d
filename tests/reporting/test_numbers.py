"""Numbers as people read them."""

from __future__ import annotations

import pytest

from lorashear.reporting.numbers import human_bytes, human_count, human_share


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (999, "999"),
        (1000, "1.00 k"),
        (1235, "1.24 k"),
        (12_340, "12.3 k"),
        (134_515_008, "135 M"),
        (7.24e9, "7.24 G"),
    ],
)
def test_counts(value, text):
    assert human_count(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (12, "12 B"),
        (999_600, "1.00 MB"),
        (93_400_000, "93.4 MB"),
        (1.2e9, "1.20 GB"),
        (-2500, "-2.50 kB"),
        (3e18, "3000 PB"),
    ],
)
def test_bytes(value, text):
    assert human_bytes(value) == text


@pytest.mark.parametrize(("value", "text"), [(0.2, "20.0 %"), (0.00123, "0.12 %"), (-0.034, "-3.4 %"), (0, "0.00 %")])
def test_shares(value, text):
    assert human_share(value) == text
