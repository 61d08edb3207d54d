"""Numbers as people read them: three digits and a decimal unit."""

from __future__ import annotations

PREFIXES = ("", "k", "M", "G", "T", "P")


def human_count(value: float) -> str:
    """`999`, `1.23 k`, `135 M`, `7.24 G`."""
    return _scaled(value, "").rstrip()


def human_bytes(value: float) -> str:
    """`512 B`, `93.4 MB`, `1.20 GB`; decimal, as disks and download pages count."""
    return _scaled(value, "B")


def human_share(value: float) -> str:
    """A share in percent: `20.0 %`, `0.12 %`, `-3.4 %`."""
    percent = 100 * value
    return f"{percent:.2f} %" if abs(percent) < 0.995 else f"{percent:.1f} %"


def _scaled(value: float, unit: str) -> str:
    size, step = abs(value), 0
    while size >= 999.5 and step < len(PREFIXES) - 1:
        size, step = size / 1000, step + 1
    digits = 0 if step == 0 or size >= 99.95 else 1 if size >= 9.995 else 2
    sign = "-" if value < 0 else ""
    return f"{sign}{size:.{digits}f} {PREFIXES[step]}{unit}"
