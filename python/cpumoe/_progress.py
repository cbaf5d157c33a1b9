"""Progress bars, on terminals only."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from typing import TypeVar

T = TypeVar("T")


def track(items: Sequence[T], description: str, *, enabled: bool | None = None) -> Iterator[T]:
    """Yields `items` with a progress bar on standard error that disappears at the end.

    Args:
        items: what to go through.
        description: shown before the bar.
        enabled: whether to show it; None: if standard error is a terminal.
    """
    if not (sys.stderr.isatty() if enabled is None else enabled):
        yield from items
        return
    # Imported late: a library call without a terminal needs no terminal library.
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        transient=True,
    ) as progress:
        yield from progress.track(items, description=description)
