"""A progress bar for what turns out to be slow."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

from rich.console import Console
from rich.progress import Progress

T = TypeVar("T")


def track(items: Iterable[T], *, total: int, description: str, after: float = 2.0, show: bool = True) -> Iterator[T]:
    """Yields `items` and, once `after` seconds have passed, shows on stderr how many of `total` are done.

    The bar vanishes at the end, and never appears where stderr is no terminal.
    """
    console = Console(stderr=True)
    progress = Progress(console=console, transient=True)
    task = progress.add_task(description, total=total)
    visible, begin = False, time.monotonic()
    try:
        for item in items:
            yield item
            progress.advance(task)
            if show and not visible and console.is_terminal and time.monotonic() - begin > after:
                visible = True
                progress.start()
    finally:
        if visible:
            progress.stop()
