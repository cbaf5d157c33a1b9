"""What ``cpumoe bench`` measured, as one document and as a table.

The document (``--json``), times in seconds, rates per second::

    {"version": 3,
     "settings": {"model", "data", "format", "hidden_size", "intermediate_size", "experts", "top_k",
                  "routing", "batch_invariant", "seconds"},
     "machine": {"cpu", "threads", "versions": {"cpumoe", "torch", "python"},
                 "read_bandwidth": {"bytes_per_second", "least", "isa", "buffer_bytes",
                                    "huge_pages"},
                 "dot_peaks": [{"isa", "precision", "macs_per_second", "least"}],
                 "steady"},
     "rows": [{"isa", "precision", "tokens", "seconds", "low", "high", "spread", "rounds", "calls",
               "tokens_per_second", "touched_experts", "weight_bytes", "bytes_per_second", "macs",
               "flops_per_second", "share_of_read_bandwidth", "share_of_dot_peak",
               "bound": "memory" or "arithmetic", "share_of_bound", "relative_l2",
               "turns": [{"seconds", "bytes_per_second", "macs_per_second"}]}]}

A row takes one turn per round. A turn has the median of its calls, and two values of each limit,
measured right before and right after these calls. A row's ``seconds`` is the median of all its
calls. ``low`` and ``high`` are the least and the greatest ``seconds`` of its turns, and ``spread``
is their difference divided by the row's ``seconds``.

A turn's share of a limit is computed with the greater of the limit's two values. A row's share is
the median of its turns' shares, and ``share_of_bound`` is the greater of its two shares. The
machine's limits are the greatest of all values; ``least`` is the smallest.

If a variant cannot measure its peak, ``macs_per_second`` and ``share_of_dot_peak`` are null, and
``dot_peaks`` has no row for it. ``relative_l2`` is null without a reference result.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from cpumoe.cli import console
from cpumoe.cli.machine import cpu_model, versions

if TYPE_CHECKING:
    from cpumoe.measure.benchmark import Result, Timing
    from cpumoe.measure.layer_weights import LayerWeights

VERSION = 3


def head(version: int, settings: dict[str, Any], threads: int) -> dict[str, Any]:
    """Returns the beginning of a document, without what was measured."""
    return {
        "version": version,
        "settings": settings,
        "machine": {"cpu": cpu_model(), "threads": threads, "versions": versions()},
    }


def document(result: Result, settings: dict[str, Any], threads: int) -> dict[str, Any]:
    """Returns what ``bench --json`` writes."""
    limits = result.limits
    read, how = limits.read, limits.reads[0]
    beginning = head(VERSION, settings, threads)
    beginning["machine"] |= {
        "read_bandwidth": {
            "bytes_per_second": read.best,
            "least": read.least,
            "isa": how.isa,
            "buffer_bytes": how.buffer_bytes,
            "huge_pages": how.huge_pages,
        },
        "dot_peaks": [
            {**vars(variant), "macs_per_second": limit.best, "least": limit.least}
            for variant, limit in limits.dots.items()
        ],
        "steady": limits.steady,
    }
    return {**beginning, "rows": [_row(timing) for timing in result.timings]}


def sizes(weights: LayerWeights, top_k: int) -> dict[str, Any]:
    """Returns the settings that describe the measured layer."""
    return {
        "format": weights.format,
        "hidden_size": weights.hidden_size,
        "intermediate_size": weights.intermediate_size,
        "experts": weights.num_experts,
        "top_k": top_k,
    }


def _row(timing: Timing) -> dict[str, Any]:
    read, dots = timing.share_of_read, timing.share_of_dots
    return {
        **vars(timing.variant),
        "tokens": timing.tokens,
        "seconds": timing.seconds,
        "low": timing.low,
        "high": timing.high,
        "spread": timing.spread,
        "rounds": len(timing.turns),
        "calls": timing.calls,
        "tokens_per_second": timing.tokens / timing.seconds,
        "touched_experts": timing.touched_experts,
        "weight_bytes": timing.weight_bytes,
        "bytes_per_second": timing.weight_bytes / timing.seconds,
        "macs": timing.macs,
        "flops_per_second": 2 * timing.macs / timing.seconds,
        "share_of_read_bandwidth": read,
        "share_of_dot_peak": dots,
        "bound": "memory" if dots is None or read >= dots else "arithmetic",
        "share_of_bound": read if dots is None else max(read, dots),
        "relative_l2": timing.relative_l2,
        "turns": [vars(turn) for turn in timing.turns],
    }


def render(document: dict[str, Any]) -> None:
    """Prints the machine's limits and the table."""
    settings, machine, rows = document["settings"], document["machine"], document["rows"]
    columns = _columns(rows)
    invariant = ", batch-invariant" if settings["batch_invariant"] else ""
    fixed = [str(rows[0][name]) for name in ("isa", "precision") if name not in columns]
    title = ", ".join([f"{settings['experts']} {settings['format']} experts", *fixed])
    table = console.data_table(
        f"{title}, routing {settings['routing']}{invariant}\n"
        f"hidden {settings['hidden_size']}, intermediate {settings['intermediate_size']}, "
        f"top {settings['top_k']}",
        list(columns.values()),
        text_columns=2 - len(fixed),
    )
    before = None
    for row in rows:
        variant = (row["isa"], row["precision"])
        if before not in (None, variant):
            table.add_section()
        table.add_row(*map(_cells(row).__getitem__, columns))
        before = variant
    console.show(_machine_table(machine), "", table, "", _legend(rows[0]["rounds"]))
    if not machine["steady"]:
        console.print_warning(
            "the machine's limits changed during the run, perhaps because other programs were "
            "busy; run it again for reliable numbers"
        )


def _columns(rows: list[dict[str, Any]]) -> dict[str, str]:
    """Headers of the columns to show, without those that are equal in all rows, or empty."""
    columns = {
        "isa": "ISA",
        "precision": "precision",
        "tokens": "tokens",
        "seconds": "ms",
        "tokens_per_second": "tokens/s",
        "spread": "spread",
        "bytes_per_second": "GB/s",
        "flops_per_second": "GFLOP/s",
        "share_of_read_bandwidth": "memory",
        "share_of_dot_peak": "peak",
        "bound": "bound",
        "relative_l2": "rel. L2",
    }
    for name in ("isa", "precision"):
        if len({row[name] for row in rows}) == 1:
            del columns[name]
    if all(row["relative_l2"] is None for row in rows):
        del columns["relative_l2"]
    return columns


def _cells(row: dict[str, Any]) -> dict[str, str]:
    number, percent = console.format_number, console.format_percent
    memory, peak = row["share_of_read_bandwidth"], row["share_of_dot_peak"]
    error = row["relative_l2"]
    return {
        "isa": row["isa"],
        "precision": row["precision"],
        "tokens": str(row["tokens"]),
        "seconds": number(1e3 * row["seconds"]),
        "tokens_per_second": number(row["tokens_per_second"]),
        "spread": percent(row["spread"]),
        "bytes_per_second": number(row["bytes_per_second"] / 1e9),
        "flops_per_second": number(row["flops_per_second"] / 1e9),
        "share_of_read_bandwidth": percent(memory),
        "share_of_dot_peak": "unknown" if peak is None else percent(peak),
        "bound": row["bound"],
        "relative_l2": "" if error is None else f"{error:.1e}",
    }


def _machine_table(machine: dict[str, Any]) -> Any:
    read = machine["read_bandwidth"]
    pages = "huge pages" if read["huge_pages"] else "small pages"
    threads = console.format_count(machine["threads"], "thread")
    least = console.format_number(read["least"] / 1e9)
    facts = {
        "CPU": f"{console.escape(machine['cpu'])}, {threads}",
        "memory read": f"{console.format_rate(read['bytes_per_second'])} "
        f"[dim](least {least}; {pages})[/]",
    }
    for peak in machine["dot_peaks"]:
        least = console.format_number(2e-9 * peak["least"])
        best = console.format_number(2e-9 * peak["macs_per_second"])
        name = f"{peak['isa']}, {peak['precision']}"
        facts[name] = f"{best} GFLOP/s in registers [dim](least {least})[/]"
    return console.fact_table(facts)


def _legend(rounds: int) -> str:
    return (
        f"[dim]ms: median of all calls of {console.format_count(rounds, 'round')}; "
        "spread: range of the rounds' medians\n"
        "GB/s: weights of the experts that a call uses, each read once\n"
        "memory, peak: share of the memory's read bandwidth, and of the rate of multiply-adds in\n"
        "registers, both measured before and after a row's calls; median of the rounds\n"
        "bound: the limit with the greater share; at 100 % a call cannot be faster, and more\n"
        "than 100 % means that caches held weights[/]"
    )
