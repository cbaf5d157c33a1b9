"""Progress bars on standard error; they disappear at the end."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

T = TypeVar("T")


@contextmanager
def progress_bar(
    enabled: bool | None = None, *, still: bool = False
) -> Iterator[Callable[[str, int, int], None]]:
    """Yields a function that shows progress: (step in words, units done, units in all).

    Args:
        enabled: whether to show a bar; None: if standard error is a terminal.
        still: whether to draw only when called, so that no other thread runs during a measurement.
    """
    if not (sys.stderr.isatty() if enabled is None else enabled):
        yield lambda _step, _done, _total: None
        return
    # Imported late, because calls without a terminal and the command line's help show no bar.
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TimeRemainingColumn(),
        TextColumn("left"),
        console=Console(stderr=True, highlight=False),
        transient=True,
        auto_refresh=not still,
    ) as progress:
        task = progress.add_task("", total=None, visible=False)
        stage = ""

        def update(step: str, done: int, total: int) -> None:
            nonlocal task, stage
            # A new stage has a new total, so the estimate of the time left starts again.
            if done == 0 or not stage:
                progress.remove_task(task)
                task = progress.add_task(step, total=total)
                stage = step
            progress.update(task, description=step, completed=done, total=total, refresh=still)

        yield update


def track(items: Sequence[T], description: str, *, enabled: bool | None = None) -> Iterator[T]:
    """Yields `items` with a progress bar; `enabled` as in `progress_bar`."""
    with progress_bar(enabled) as update:
        for done, item in enumerate(items):
            update(f"{description} ({done}/{len(items)})", done, len(items))
            yield item
