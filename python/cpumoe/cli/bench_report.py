"""What ``cpumoe bench`` measured, as one document and as a table.

The document (``--json``), times in seconds, rates per second::

    {"version": 3,
     "settings": {"model", "data", "format", "hidden_size", "intermediate_size", "experts", "top_k",
                  "scales", "group", "routing", "batch_invariant", "seconds"},
     "machine": {"cpu", "threads", "versions": {"cpumoe", "torch", "python"},
                 "read_bandwidth": {"bytes_per_second", "least", "isa", "buffer_bytes",
                                    "huge_pages"},
                 "dot_peaks": [{"isa", "format", "precision", "macs_per_second", "least"}],
                 "placement": {"nodes", "nbytes", "bound", "local_share"}, "steady"},
     "rows": [{"isa", "precision", "format", "tokens", "seconds", "low", "high", "spread", "rounds",
               "calls", "tokens_per_second", "touched_experts", "weight_bytes", "bytes_per_second",
               "macs", "flops_per_second", "share_of_read_bandwidth", "share_of_dot_peak",
               "bound": "memory" or "arithmetic", "share_of_bound", "speed_ratio", "relative_l2",
               "turns": [{"seconds", "bytes_per_second", "macs_per_second"}]}]}

``settings.format`` has the formats of all rows, separated by commas. ``settings.scales`` and
``settings.group`` are null unless these options were given.

``placement`` says in which NUMA nodes' memories the weights lie (`cpumoe.Placement`). It is null if
the machine counts as one node.

A row takes one turn per round. A turn has the median of its calls, and two values of each limit,
measured right before and right after these calls. A row's ``seconds`` is the median of all its
calls. ``low`` and ``high`` are the least and the greatest ``seconds`` of its turns, and ``spread``
is their difference divided by the row's ``seconds``.

A turn's share of a limit is computed with the greater of the limit's two values. A row's share is
the median of its turns' shares, and ``share_of_bound`` is the greater of its two shares. The
machine's limits are the greatest of all values; ``least`` is the smallest.

If the precision does not say which instruction multiplies, ``macs_per_second`` and
``share_of_dot_peak`` are null, and ``dot_peaks`` has no row for it. ``relative_l2`` is null without
a reference result. ``speed_ratio`` is the first format's seconds divided by the row's, for the same
variant and number of tokens; the median of the rounds. With one format it is null.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from cpumoe.cli import console
from cpumoe.cli.machine import cpu_model, versions
from cpumoe.placement import Placement

if TYPE_CHECKING:
    from cpumoe.measure.benchmark import Result, Timing, Variant
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
            {**vars(multiplier), "macs_per_second": limit.best, "least": limit.least}
            for multiplier, limit in limits.dots.items()
        ],
        "placement": None if result.placement.nodes is None else vars(result.placement),
        "steady": limits.steady,
    }
    return {**beginning, "rows": _rows(result.timings)}


def sizes(layers: Sequence[LayerWeights], top_k: int) -> dict[str, Any]:
    """Returns the settings that describe the measured layers, which differ in their format."""
    weights = layers[0]
    return {
        "format": ",".join(weights.format for weights in layers),
        "hidden_size": weights.hidden_size,
        "intermediate_size": weights.intermediate_size,
        "experts": weights.num_experts,
        "top_k": top_k,
    }


def scales_of(settings: dict[str, Any]) -> list[str]:
    """Returns what `--scales` and `--group` have chosen, in words."""
    chosen = {name: settings.get(name) for name in ("scales", "group")}
    return [f"{name} {value}" for name, value in chosen.items() if value is not None]


def _rows(timings: Sequence[Timing]) -> list[dict[str, Any]]:
    several = len({timing.format for timing in timings}) > 1
    first: dict[tuple[Variant, int], Timing] = {}
    rows = []
    for timing in timings:
        base = first.setdefault((timing.variant, timing.tokens), timing)
        rows.append(_row(timing, timing.speed_against(base) if several else None))
    return rows


def _row(timing: Timing, speed_ratio: float | None) -> dict[str, Any]:
    read, dots = timing.share_of_read, timing.share_of_dots
    return {
        **vars(timing.variant),
        "format": timing.format,
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
        "speed_ratio": speed_ratio,
        "relative_l2": timing.relative_l2,
        "turns": [vars(turn) for turn in timing.turns],
    }


def render(document: dict[str, Any]) -> None:
    """Prints the machine's limits and the table."""
    settings, machine, rows = document["settings"], document["machine"], document["rows"]
    columns = _columns(rows)
    invariant = ", batch-invariant" if settings["batch_invariant"] else ""
    fixed = [str(rows[0][name]) for name in ("isa", "precision") if name not in columns]
    several = "format" in columns
    layer = f"{settings['experts']} {'' if several else settings['format'] + ' '}experts"
    title = ", ".join([layer, *scales_of(settings), *fixed])
    table = console.data_table(
        f"{title}, routing {settings['routing']}{invariant}\n"
        f"hidden {settings['hidden_size']}, intermediate {settings['intermediate_size']}, "
        f"top {settings['top_k']}",
        list(columns.values()),
        text_columns=2 - len(fixed) + several,
    )
    before = None
    for row in rows:
        section = (row["isa"], row["precision"], row["tokens"] if several else None)
        if before not in (None, section):
            table.add_section()
        table.add_row(*map(_cells(row).__getitem__, columns))
        before = section
    legend = _legend(rows[0]["rounds"], rows[0]["format"] if several else None)
    console.show(_machine_table(machine), "", table, "", legend)
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
        "format": "format",
        "tokens": "tokens",
        "seconds": "ms",
        "tokens_per_second": "tokens/s",
        "spread": "spread",
        "bytes_per_second": "GB/s",
        "flops_per_second": "GFLOP/s",
        "share_of_read_bandwidth": "memory",
        "share_of_dot_peak": "peak",
        "bound": "bound",
        "speed_ratio": f"vs {rows[0]['format']}",
        "relative_l2": "rel. L2",
    }
    for name in ("isa", "precision", "format"):
        if len({row[name] for row in rows}) == 1:
            del columns[name]
    if "format" in columns:  # the table stays within 80 columns
        del columns["tokens_per_second"], columns["bound"]
    for name in ("speed_ratio", "relative_l2"):
        if all(row[name] is None for row in rows):
            del columns[name]
    return columns


def _cells(row: dict[str, Any]) -> dict[str, str]:
    number, percent = console.format_number, console.format_percent
    memory, peak = row["share_of_read_bandwidth"], row["share_of_dot_peak"]
    error, ratio = row["relative_l2"], row["speed_ratio"]
    return {
        "isa": row["isa"],
        "precision": row["precision"],
        "format": row["format"],
        "tokens": str(row["tokens"]),
        "seconds": number(1e3 * row["seconds"]),
        "tokens_per_second": number(row["tokens_per_second"]),
        "spread": percent(row["spread"]),
        "bytes_per_second": number(row["bytes_per_second"] / 1e9),
        "flops_per_second": number(row["flops_per_second"] / 1e9),
        "share_of_read_bandwidth": percent(memory),
        "share_of_dot_peak": "unknown" if peak is None else percent(peak),
        "bound": row["bound"],
        "speed_ratio": "" if ratio is None else f"{ratio:.2f}",
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
    if machine.get("placement"):
        facts["weights"] = str(Placement(**machine["placement"]))
    for peak in machine["dot_peaks"]:
        least = console.format_number(2e-9 * peak["least"])
        best = console.format_number(2e-9 * peak["macs_per_second"])
        name = f"{peak['isa']}, {peak['format']}, {peak['precision']}"
        facts[name] = f"{best} GFLOP/s in registers [dim](least {least})[/]"
    return console.fact_table(facts)


def _legend(rounds: int, first: str | None) -> str:
    last = "bound: the limit with the greater share"
    if first is not None:
        last = f"vs {first}: time of {first} divided by the row's; median of the rounds"
    return (
        f"[dim]ms: median of all calls of {console.format_count(rounds, 'round')}; "
        "spread: range of the rounds' medians\n"
        "GB/s: weights of the experts that a call uses, each read once\n"
        "memory: share of the memory's read bandwidth; peak: share of the multiply-adds\n"
        "in registers; both measured before and after a row's calls; median of rounds\n"
        "At 100 % a call cannot be faster; with more, caches held some of the weights.\n"
        f"{last}[/]"
    )
