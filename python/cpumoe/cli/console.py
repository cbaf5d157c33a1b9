"""Printing: tables, text, JSON and errors, and the formatting of numbers."""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import typer
from rich import box, markup
from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

from cpumoe.cli.streams import OutputError

# A pipe or file has no width of its own. This one is wide enough to keep tables whole.
_PIPE_WIDTH = 120
_out = Console(highlight=False)
if "COLUMNS" not in os.environ and not _out.file.isatty():
    _out.width = _PIPE_WIDTH
_err = Console(stderr=True, highlight=False)

_UNITS = ("B", "kB", "MB", "GB", "TB", "PB")

_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")

OK = "[green]yes[/]"
NOT_OK = "[bold red]NO[/]"


def show(*parts: RenderableType) -> None:
    """Prints to standard output; strings may hold rich markup."""
    for part in parts:
        _out.print(part)


def show_dim(text: str, *, aside: bool = False) -> None:
    """Prints a piece of text immediately and dimmed.

    Args:
        text: the piece.
        aside: whether to print to standard error.
    """
    console = _err if aside else _out
    console.print(Text(without_controls(text), "dim"), end="", soft_wrap=True)


def announce(message: str) -> None:
    """Prints a line to standard output. It is no error if nobody can read it."""
    with contextlib.suppress(OutputError, BrokenPipeError):
        typer.echo(message)


def show_aside(text: str) -> None:
    """Prints a remark to standard error, so that standard output holds the result alone."""
    _err.print(Text(without_controls(text), "dim"), soft_wrap=True)


def show_json(document: Mapping[str, Any]) -> None:
    """Prints the document to standard output; numbers that JSON lacks become null."""
    typer.echo(json.dumps(_jsonable(document), indent=2, allow_nan=False))


def write_json(path: Path, document: Mapping[str, Any]) -> None:
    """Writes the document to a file; numbers that JSON lacks become null."""
    path.write_text(json.dumps(_jsonable(document), indent=2, allow_nan=False) + "\n", "utf-8")


def print_error(message: str) -> None:
    """Prints ``error: message`` to standard error, on one line."""
    _print_line("error: ", "bold red", message)


def print_warning(message: str) -> None:
    """Prints ``warning: message`` to standard error, on one line."""
    _print_line("warning: ", "yellow", message)


def escape(text: str) -> str:
    """Returns text without control characters, escaped so that `show` prints it literally."""
    return markup.escape(without_controls(text))


def without_controls(text: str) -> str:
    """Returns text without control characters, which could move a cursor or change colours."""
    return _CONTROLS.sub("", text)


def fact_table(rows: Mapping[str, str]) -> Table:
    """Returns a borderless table of names and values."""
    table = Table.grid(padding=(0, 2))
    table.add_column(style="cyan", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in rows.items():
        table.add_row(name, value)
    return table


def data_table(title: str, columns: Sequence[str], *, text_columns: int = 1) -> Table:
    """Returns a table with a header; the columns after the first `text_columns` hold numbers."""
    table = Table(
        title=title,
        title_justify="left",
        title_style="bold",
        box=box.SIMPLE_HEAD,
        show_edge=False,
        pad_edge=False,
    )
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index < text_columns else "right", no_wrap=True)
    return table


def format_bytes(count: float) -> str:
    """Returns ``"13.4 MB"``: three digits, decimal units."""
    power = 0
    while power < len(_UNITS) - 1 and abs(count) >= 999.5 * 1000**power:
        power += 1
    value = count / 1000**power
    return f"{value:.0f} B" if power == 0 else f"{_three_digits(value)} {_UNITS[power]}"


def format_rate(bytes_per_second: float) -> str:
    """Returns ``"13.4 GB/s"``."""
    return f"{format_bytes(bytes_per_second)}/s"


def format_number(value: float) -> str:
    """Returns a number above about 0.01 with three digits: ``"0.123"``, ``"12.3"``, ``"1,234"``."""
    return _three_digits(value)


def format_count(number: float, noun: str) -> str:
    """Returns ``"1 thread"`` or ``"2 threads"``."""
    return f"{number:g} {noun}{'' if number == 1 else 's'}"


def format_percent(share: float) -> str:
    """Returns ``"87 %"``."""
    return f"{100 * share:.0f} %"


def format_time(seconds: float) -> str:
    """Returns ``"12.3 ms"`` or ``"4.56 s"``."""
    if seconds < 1:
        return f"{_three_digits(1000 * seconds)} ms"
    return f"{_three_digits(seconds)} s"


def _three_digits(value: float) -> str:
    size = abs(value)
    if not math.isfinite(size) or size >= 999.5:
        return f"{value:,.0f}"
    return f"{value:.{0 if size >= 99.95 else 1 if size >= 9.995 else 2 if size >= 0.9995 else 3}f}"


def _jsonable(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _jsonable(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_jsonable(item) for item in value]
    return value


def _print_line(label: str, style: str, message: str) -> None:
    line = Text.assemble((label, style), without_controls(" ".join(message.split())))
    _err.print(line, soft_wrap=True)
