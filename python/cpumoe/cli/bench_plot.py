"""``cpumoe bench --plot``: a roofline plot."""

from __future__ import annotations

import math
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cpumoe.cli.errors import InputError, require_package

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SUFFIXES = (".png", ".svg", ".pdf")

# Colours that can be told apart with any colour vision (Okabe and Ito).
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
# Fewer than colours, so that a series with the colour of another one has another marker.
_MARKERS = "osD^vP"


def require(path: Path) -> None:
    """Refuses a plot that cannot be drawn.

    Raises:
        InputError: matplotlib is missing, or the file's suffix is not in `SUFFIXES`.
    """
    if path.suffix.lower() not in SUFFIXES:
        raise InputError(f"--plot: expected a name that ends in {', '.join(SUFFIXES)}, got {path}")
    require_package("matplotlib", "plot", "--plot")


def draw(path: Path, document: dict[str, Any]) -> None:
    """Draws each row's speed over its arithmetic intensity, below the machine's roof.

    Args:
        path: the file to write.
        document: what `cpumoe.cli.bench_report.document` returns.
    """
    # Unlike pyplot, a Figure needs no window system and leaves no state behind.
    from matplotlib.figure import Figure
    from matplotlib.ticker import FormatStrFormatter, LogLocator, NullLocator

    rows, machine, settings = document["rows"], document["machine"], document["settings"]
    figure = Figure(figsize=(8, 5.5), layout="constrained")
    axes = figure.add_subplot()
    bandwidth = machine["read_bandwidth"]["bytes_per_second"]
    peaks = {
        (p["isa"], p["precision"], p["format"]): 2 * p["macs_per_second"]
        for p in machine["dot_peaks"]
    }
    low, high = min(map(_intensity, rows)) / 1.5, max(map(_intensity, rows)) * 1.5
    several = len({row["format"] for row in rows}) > 1
    series = dict.fromkeys(map(_series, rows))
    roofed = set()
    for name, colour, marker in zip(series, cycle(_COLOURS), cycle(_MARKERS), strict=False):
        label = name if several else name[:2]
        peak = peaks.get(name, math.inf)
        if (name[:2], peak) not in roofed:  # other formats may have the same roof
            corners = sorted({low, min(max(low, peak / bandwidth), high), high})
            roof = [min(x * bandwidth, peak) / 1e9 for x in corners]
            axes.plot(corners, roof, linewidth=1.2, color=colour)
            roofed.add((name[:2], peak))
        own = [row for row in rows if _series(row) == name]
        _draw_points(axes, own, colour, marker, ", ".join(label))
    axes.set(xscale="log", yscale="log")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(LogLocator(base=2))
        axis.set_major_formatter(FormatStrFormatter("%g"))
        axis.set_minor_locator(NullLocator())
    axes.set_xlabel("FLOP per byte of weights read")
    axes.set_ylabel("GFLOP/s")
    axes.set_title(
        f"{machine['cpu']}, threads: {machine['threads']}\n"
        f"{settings['experts']} {'' if several else settings['format'] + ' '}experts, "
        f"routing {settings['routing']}; "
        "numbers: tokens per call; lines: the machine's limits",
        fontsize="medium",
    )
    axes.grid(visible=True, which="major", alpha=0.3)
    axes.legend(loc="lower right")
    figure.savefig(path, dpi=150)


def _series(row: dict[str, Any]) -> tuple[str, str, str]:
    return row["isa"], row["precision"], row["format"]


def _draw_points(
    axes: Axes, rows: list[dict[str, Any]], colour: str, marker: str, label: str
) -> None:
    points = [(_intensity(row), row["flops_per_second"] / 1e9) for row in rows]
    axes.plot(
        *zip(*points, strict=True), linestyle="none", marker=marker, color=colour, label=label
    )
    for row, point in zip(rows, points, strict=True):
        axes.annotate(
            str(row["tokens"]),
            point,
            xytext=(5, -11),
            textcoords="offset points",
            fontsize="small",
            color=colour,
        )


def _intensity(row: dict[str, Any]) -> float:
    return 2 * float(row["macs"]) / float(row["weight_bytes"])
