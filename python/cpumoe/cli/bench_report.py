"""What ``cpumoe bench`` measured, as one document and as a table.

The document (``--json``), times in seconds, rates per second::

    {"version": 3,
     "settings": {"model", "data", "format", "hidden_size", "intermediate_size", "experts", "top_k",
                  "scales", "group", "routing", "batch_invariant", "seconds"},
     "machine": {"cpu", "threads", "versions": {"cpumoe", "torch", "python"},
                 "read_bandwidth": {"bytes_per_second", "least", "isa", "buffer_bytes",
                                    "huge_pages"},
                 "dot_peaks": [{"isa", "format", "precision", "macs_per_second", "least"}],
                 "placement": {"nodes", "nbytes", "bound", "local_share"}, "steady",
                 "runtimes": [{"threads", "bytes_per_second", "least", "placement",
                               "nodes": [{"node", "threads", "bytes_per_second"}]}]},
     "rows": [{"isa", "precision", "format", "tokens", "seconds", "low", "high", "spread", "rounds",
               "calls", "tokens_per_second", "touched_experts", "weight_bytes", "bytes_per_second",
               "macs", "flops_per_second", "share_of_read_bandwidth", "share_of_dot_peak",
               "bound": "memory" or "arithmetic", "share_of_bound", "speed_ratio", "relative_l2",
               "threads", "nodes", "local_share", "nodes_speed",
               "by_node": [{"node", "share_of_read_bandwidth", "share_of_dot_peak",
                            "share_of_bound"}],
               "turns": [{"seconds", "bytes_per_second", "macs_per_second"}]}]}

``settings.format`` has the formats of all rows, separated by commas. ``settings.scales`` and
``settings.group`` are null unless these options were given.

``placement`` says in which NUMA nodes' memories the weights lie (`cpumoe.Placement`). It is null if
the machine counts as one node. ``runtimes`` has an element for each ``--nodes``. A node's
``bytes_per_second`` is the rate at which its threads read its memory while other nodes are idle.
The other fields of ``machine`` are those of the runtime with most threads.

A row's ``nodes`` are the numbers of the NUMA nodes that computed; null: the machine counted as one.
``local_share`` is the part of the pages that lies on its node. ``by_node`` compares each node's
share of the row's weights and products with the node's own limits. ``nodes_speed`` is the seconds
of the first ``--nodes`` divided by the row's, for equal rows; the median of the rounds. With one
``--nodes`` it is null.

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
variant, number of tokens and nodes; the median of the rounds. With one format it is null.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from cpumoe.cli import console
from cpumoe.cli.machine import cpu_model, versions
from cpumoe.placement import Placement

if TYPE_CHECKING:
    from cpumoe.measure.layer_weights import LayerWeights
    from cpumoe.measure.timing import Result, Threads, Timing

VERSION = 3


def head(version: int, settings: dict[str, Any], threads: int) -> dict[str, Any]:
    """Returns the beginning of a document, without what was measured."""
    return {
        "version": version,
        "settings": settings,
        "machine": {"cpu": cpu_model(), "threads": threads, "versions": versions()},
    }


def document(result: Result, settings: dict[str, Any]) -> dict[str, Any]:
    """Returns what ``bench --json`` writes."""
    most = max(result.threads, key=lambda threads: threads.count)
    limits = most.limits
    read, how = limits.read, limits.reads[0]
    beginning = head(VERSION, settings, most.count)
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
        "placement": _placement(most),
        "steady": all(threads.limits.steady for threads in result.threads),
        "runtimes": [_runtime(threads) for threads in result.threads],
    }
    return {**beginning, "rows": _rows(result)}


def _placement(threads: Threads) -> dict[str, Any] | None:
    return None if threads.placement.nodes is None else vars(threads.placement)


def _runtime(threads: Threads) -> dict[str, Any]:
    names = ("node", "threads", "bytes_per_second")
    return {
        "threads": threads.count,
        "bytes_per_second": threads.limits.read.best,
        "least": threads.limits.read.least,
        "placement": _placement(threads),
        "nodes": [{name: getattr(node, name) for name in names} for node in threads.nodes],
    }


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


def _rows(result: Result) -> list[dict[str, Any]]:
    several = len({timing.format for timing in result.timings}) > 1
    first_format: dict[object, Timing] = {}
    first_nodes: dict[object, Timing] = {}
    rows = []
    for timing in result.timings:
        key = (timing.variant, timing.tokens)
        base = first_format.setdefault((*key, timing.runtime), timing)
        other = first_nodes.setdefault((*key, timing.format), timing)
        row = _row(timing, result.threads[timing.runtime])
        row["speed_ratio"] = timing.speed_against(base) if several else None
        row["nodes_speed"] = timing.speed_against(other) if len(result.threads) > 1 else None
        rows.append(row)
    return rows


def _row(timing: Timing, threads: Threads) -> dict[str, Any]:
    read, dots = timing.share_of_read, timing.share_of_dots
    nodes = threads.placement.nodes
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
        **_shares(read, dots),
        "bound": "memory" if dots is None or read >= dots else "arithmetic",
        "relative_l2": timing.relative_l2,
        "threads": threads.count,
        "nodes": None if nodes is None else list(nodes),
        "local_share": threads.placement.local_share,
        "by_node": [
            {"node": node.node, **_shares(*timing.node_shares(node))} for node in threads.nodes
        ],
        "turns": [vars(turn) for turn in timing.turns],
    }


def _shares(read: float, dots: float | None) -> dict[str, float | None]:
    return {
        "share_of_read_bandwidth": read,
        "share_of_dot_peak": dots,
        "share_of_bound": read if dots is None else max(read, dots),
    }


def render(document: dict[str, Any]) -> None:
    """Prints the machine's limits and the table."""
    settings, machine, rows = document["settings"], document["machine"], document["rows"]
    columns = _columns(rows)
    invariant = ", batch-invariant" if settings["batch_invariant"] else ""
    fixed = [str(rows[0][name]) for name in ("isa", "precision") if name not in columns]
    several, compared = "format" in columns, "nodes" in columns
    layer = f"{settings['experts']} {'' if several else settings['format'] + ' '}experts"
    title = ", ".join([layer, *scales_of(settings), *fixed])
    table = console.data_table(
        f"{title}, routing {settings['routing']}{invariant}\n"
        f"hidden {settings['hidden_size']}, intermediate {settings['intermediate_size']}, "
        f"top {settings['top_k']}",
        list(columns.values()),
        text_columns=2 - len(fixed) + several + compared,
    )
    before = None
    for row in rows:
        tokens = row["tokens"] if several or compared else None
        section = (row["isa"], row["precision"], tokens)
        if before not in (None, section):
            table.add_section()
        table.add_row(*map(_cells(row).__getitem__, columns))
        before = section
    console.show(_machine_table(machine), "", table, "", _legend(rows[0], columns))
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
        "nodes": "nodes",
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
        "by_node": "by node",
        "local_share": "local",
        "nodes_speed": f"vs {named_nodes(rows[0]['nodes'])}",
        "relative_l2": "rel. L2",
    }
    for name in ("isa", "precision", "format"):
        if len({row[name] for row in rows}) == 1:
            del columns[name]
    if rows[0]["nodes_speed"] is None:  # else the lines above the table have its placement
        del columns["nodes"], columns["local_share"]
    if all(len(row["by_node"]) < 2 for row in rows):
        del columns["by_node"]
    # The table stays within 80 columns.
    if "format" in columns or "nodes" in columns:
        del columns["tokens_per_second"]
    if "format" in columns or "nodes" in columns or "by_node" in columns:
        del columns["bound"]
    if "nodes" in columns:
        del columns["flops_per_second"], columns["spread"]
    for name in ("speed_ratio", "nodes_speed", "relative_l2"):
        if all(row[name] is None for row in rows):
            del columns[name]
    return columns


def named_nodes(nodes: list[int] | None) -> str:
    """NUMA nodes as `--nodes` takes them."""
    if nodes is None:
        return "1"
    numbers = ",".join(map(str, nodes))
    return numbers if len(nodes) > 1 else f"[{numbers}]"


def _cells(row: dict[str, Any]) -> dict[str, str]:
    number, percent = console.format_number, console.format_percent
    memory, peak = row["share_of_read_bandwidth"], row["share_of_dot_peak"]
    error, ratio = row["relative_l2"], row["speed_ratio"]
    local, speed = row["local_share"], row["nodes_speed"]
    by_node = [node["share_of_bound"] for node in row["by_node"]]
    return {
        "isa": row["isa"],
        "precision": row["precision"],
        "format": row["format"],
        "nodes": console.escape(named_nodes(row["nodes"])),
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
        "by_node": f"{100 * min(by_node):.0f}-{percent(max(by_node))}" if by_node else "",
        "local_share": "" if local is None else percent(local),
        "nodes_speed": "" if speed is None else f"{speed:.2f}",
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
    rates = {
        node["node"]: node["bytes_per_second"]
        for runtime in machine.get("runtimes", ())
        for node in runtime["nodes"]
    }
    if len(rates) > 1:
        each = [
            f"{console.format_number(rates[node] / 1e9)} [dim](node {node})[/]"
            for node in sorted(rates)
        ]
        facts["each node"] = f"reads its own memory at {', '.join(each)} GB/s"
    for peak in machine["dot_peaks"]:
        least = console.format_number(2e-9 * peak["least"])
        best = console.format_number(2e-9 * peak["macs_per_second"])
        name = f"{peak['isa']}, {peak['format']}, {peak['precision']}"
        facts[name] = f"{best} GFLOP/s in registers [dim](least {least})[/]"
    return console.fact_table(facts)


def _legend(row: dict[str, Any], columns: dict[str, str]) -> str:
    spread = "; spread: range of the rounds' medians" if "spread" in columns else ""
    lines = [
        f"ms: median of all calls of {console.format_count(row['rounds'], 'round')}{spread}",
        "GB/s: weights of the experts that a call uses, each read once",
        "memory: share of the memory's read bandwidth; peak: share of the multiply-adds",
        "in registers; both measured before and after a row's calls; median of rounds",
        "At 100 % a call cannot be faster; with more, caches held some of the weights.",
    ]
    if "bound" in columns:
        lines.append("bound: the limit with the greater share")
    if "by_node" in columns:
        lines.append("by node: the greater share, of each node's own limits; least to greatest")
    if "local_share" in columns:
        lines.append("nodes: as --nodes names them; local: pages of weights on their node")
    for name, text in (
        ("speed_ratio", row["format"]),
        ("nodes_speed", f"--nodes {named_nodes(row['nodes'])}"),
    ):
        if name in columns:
            lines.append(
                f"{columns[name]}: time of {text} divided by the row's; median of the rounds"
            )
    return "[dim]" + "\n".join(map(console.escape, lines)) + "[/]"
