"""``cpumoe bench --write-back``: how fast experts are written for a GPU.

The document (``--json``), times in seconds, rates per second::

    {"version": 1,
     "settings": {"model", "format", "hidden_size", "intermediate_size", "experts", "top_k",
                  "scales", "group", "seconds", "rounds"},
     "machine": {"cpu", "threads", "versions",
                 "copy_bandwidth": {"bytes_per_second", "least", "buffer_bytes", "huge_pages"}},
     "rows": [{"isa", "seconds", "low", "high", "calls", "bytes", "bytes_per_second",
               "share_of_copy_bandwidth",
               "turns": [{"seconds", "copy_bytes_per_second"}]}]}

All bytes are bytes read plus bytes written. A row takes one turn per round. A turn's share is
computed with the greater of the copy bandwidths right before and right after it, and a row's share
is the median of its turns' shares.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from cpumoe._base.progress import progress_bar
from cpumoe.cli import bench_report, console
from cpumoe.cli.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from cpumoe.measure.layer_weights import LayerWeights
    from cpumoe.measure.timing import Variant
    from cpumoe.measure.write_back import WriteBackTiming
    from cpumoe.runtime import Runtime

VERSION = 1


def measure(
    weights: LayerWeights,
    variants: Sequence[Variant],
    runtime: Runtime,
    settings: dict[str, Any],
) -> dict[str, Any]:
    """Measures the variants, and returns the document.

    `settings` are the document's, and say how long to measure.

    Raises:
        InputError: several precisions, which all write the same bytes.
        ValueError: see `cpumoe.measure.write_back.run`.
    """
    from cpumoe.measure import write_back

    isas = list(dict.fromkeys(variant.isa for variant in variants))
    if len(isas) < len(variants):
        raise InputError(
            "--precision: --write-back expects one precision, because all write the same bytes"
        )
    with progress_bar(still=True) as progress:
        result = write_back.run(
            weights,
            isas,
            runtime,
            seconds=settings["seconds"],
            rounds=settings["rounds"],
            progress=progress,
        )
    document = bench_report.head(VERSION, settings, runtime.threads)
    document["machine"]["copy_bandwidth"] = {
        "bytes_per_second": result.copy.best,
        "least": result.copy.least,
        "buffer_bytes": result.buffer_bytes,
        "huge_pages": result.huge_pages,
    }
    return {**document, "rows": [_row(timing) for timing in result.timings]}


def _row(timing: WriteBackTiming) -> dict[str, Any]:
    medians = [turn.seconds for turn in timing.turns]
    return {
        "isa": timing.isa,
        "seconds": timing.seconds,
        "low": min(medians),
        "high": max(medians),
        "calls": timing.calls,
        "bytes": timing.nbytes,
        "bytes_per_second": timing.bytes_per_second,
        "share_of_copy_bandwidth": timing.share_of_copy,
        "turns": [vars(turn) for turn in timing.turns],
    }


def render(document: dict[str, Any]) -> None:
    """Prints the document as a table."""
    settings, machine, rows = document["settings"], document["machine"], document["rows"]
    copy = machine["copy_bandwidth"]
    pages = "huge pages" if copy["huge_pages"] else "small pages"
    threads = console.format_count(machine["threads"], "thread")
    facts = {
        "CPU": f"{console.escape(machine['cpu'])}, {threads}",
        "memory copy": f"{console.format_rate(copy['bytes_per_second'])} [dim](least "
        f"{console.format_number(copy['least'] / 1e9)}; {pages})[/]",
    }
    table = console.data_table(
        f"Writing {settings['format']} "
        f"{', '.join(('experts', *bench_report.scales_of(settings)))}\n"
        f"hidden {settings['hidden_size']}, intermediate {settings['intermediate_size']}",
        ("ISA", "ms per expert", "spread", "GB/s", "of copy"),
        text_columns=1,
    )
    for row in rows:
        table.add_row(
            row["isa"],
            console.format_number(1e3 * row["seconds"]),
            console.format_percent((row["high"] - row["low"]) / row["seconds"]),
            console.format_number(row["bytes_per_second"] / 1e9),
            console.format_percent(row["share_of_copy_bandwidth"]),
        )
    console.show(console.fact_table(facts), "", table, "", _legend(settings["rounds"]))


def _legend(rounds: int) -> str:
    return (
        f"[dim]ms per expert: median of {console.format_count(rounds, 'round')}; spread: range of "
        "the rounds' medians\n"
        "GB/s: bytes read plus bytes written, scales as bf16, by one call of export_into per "
        "expert\n"
        "of copy: share of the bandwidth of copying memory past the caches, measured before and\n"
        "after a row's experts; median of the rounds[/]"
    )
