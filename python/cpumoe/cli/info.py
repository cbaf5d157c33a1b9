"""``cpumoe info``: what this machine has, and what cpumoe uses."""

from __future__ import annotations

import math
import platform
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cpumoe._base.progress import progress_bar
from cpumoe.cli import console, host_threads
from cpumoe.cli.errors import BAD_INPUT, reported
from cpumoe.cli.machine import cpu_model, versions
from cpumoe.cli.options import JsonOption, TracebackOption
from cpumoe.placement import Placement

if TYPE_CHECKING:
    from cpumoe import _core

EXAMPLE = "Example: `cpumoe info --json`"

_ANSWERS = {True: "[green]yes[/]", False: "[yellow]no[/]", None: "[dim]not checked[/]"}


HostsOption = Annotated[
    bool,
    typer.Option(
        "--hosts",
        help="Also compute a tiny layer in each installed host: transformers, SGLang, vLLM.",
    ),
]


def command(
    hosts: HostsOption = False,
    json_output: JsonOption = False,
    traceback: TracebackOption = False,
) -> None:
    """Show CPU, ISA variants, threads, memory bandwidth and versions.

    Measuring the memory's read bandwidth takes about a second. Measure on an idle machine: other
    programs take a part of the bandwidth.

    `--hosts` takes up to a minute for each host, because hosts take long to start.
    """
    with reported(traceback):
        document = collect()
        if hosts:
            document["hosts"] = _hosts()
        if json_output:
            console.show_json(document)
        else:
            _render(document)
        problem = document["isa"]["error"]
        if problem:
            console.print_error(problem)
            raise typer.Exit(BAD_INPUT)


def collect() -> dict[str, Any]:
    """Returns what ``info --json`` prints."""
    from cpumoe import _core

    isas = _isas()
    return {
        "versions": versions(),
        "build_id": _core.build_id(),
        "cpu": _cpu(),
        "isa": isas,
        "amx": _amx(),
        "formats": _formats(),
        "host_threads": host_threads.describe(),
        "read_bandwidth": _bandwidth(isas["variants"]),
        "nodes_bandwidth": _nodes_bandwidth(isas["variants"]),
        "placement": _placement(isas["variants"]),
    }


def _hosts() -> list[dict[str, Any]]:
    from cpumoe.cli.hosts import HOSTS, describe

    rows = []
    with progress_bar() as progress:
        for index, host in enumerate(HOSTS):
            progress("trying hosts", index, len(HOSTS))
            rows.append(describe(host))
    return rows


def _cpu() -> dict[str, Any]:
    from cpumoe._engine import nodes

    topology = nodes.machine()
    return {
        "model": cpu_model(),
        "architecture": platform.machine(),
        "logical_cpus": len(topology.cpus),
        "cores": len(topology.cores),
        "packages": len({cpu.package for cpu in topology.cpus}),
        "l3_caches": topology.l3_groups or None,
        "numa_nodes": [_node(node) for node in topology.nodes],
        "other_numa_nodes": [_node(node) for node in topology.other_nodes],
        "cpu_quota": topology.quota if math.isfinite(topology.quota) else None,
        "default_threads": topology.default_threads,
    }


def _node(node: _core.NumaNode) -> dict[str, Any]:
    return {
        "id": node.id,
        "cpus": list(node.cpus),
        "cores": len(node.cores),
        "memory_bytes": node.memory_bytes or None,
        "memory_node": node.memory_node,
    }


def _isas() -> dict[str, Any]:
    from cpumoe import _core
    from cpumoe.isa import ENVIRONMENT_VARIABLE, missing_features, select_isa, supported_isas

    in_use, reason, error = None, None, None
    try:
        in_use, origin = select_isa(None)
        forced = origin == ENVIRONMENT_VARIABLE
        reason = f"{ENVIRONMENT_VARIABLE} is set" if forced else "the best that this CPU supports"
    except ValueError as refusal:
        error = str(refusal)
    supported = supported_isas()
    problems = {name: _problem(name) for name in supported}
    if problem := problems.get(in_use or ""):
        in_use, reason, error = None, None, problem
    variants = [
        {
            "name": row.name,
            "built": row.built,
            "supported": row.name in supported,
            "in_use": row.name == in_use,
            "features": row.features,
            "missing": missing_features(row.name),
            "problem": problems.get(row.name),
        }
        for row in _core.known_isas()
    ]
    return {"in_use": in_use, "reason": reason, "error": error, "variants": variants}


def _problem(isa: str) -> str | None:
    """Why a variant that this CPU supports cannot be used, or None."""
    from cpumoe import _core

    try:
        _core.open_variant(isa, "info")
    except _core.VariantError as problem:
        return str(problem)
    return None


def _amx() -> list[dict[str, Any]]:
    """The conditions for AMX, checked one by one because CPUID alone is not enough."""
    from cpumoe import _core

    return [
        {"step": s.name, "question": s.question, "passed": s.passed, "found": s.found}
        for s in _core.tile_steps()
    ]


def _formats() -> list[dict[str, Any]]:
    from cpumoe._base.tensors import dtype_name
    from cpumoe.formats import WEIGHT_FORMATS

    return [
        {
            "name": row.name,
            "bits_per_weight": row.bits_per_weight,
            "group_size": row.group_size or None,
            "scale": None if row.scale_dtype is None else dtype_name(row.scale_dtype),
        }
        for row in WEIGHT_FORMATS.values()
    ]


def _bandwidth(variants: list[dict[str, Any]]) -> dict[str, Any] | None:
    """Measured with the best variant's loads; None if there is no such variant to use."""
    from cpumoe.measure.limits import measure_read_bandwidth
    from cpumoe.runtime import Runtime

    if not _can_measure(variants):
        return None
    with progress_bar() as progress, Runtime() as runtime:
        progress("measuring memory bandwidth", 0, 1)
        return dict(vars(measure_read_bandwidth(runtime)))


def _can_measure(variants: list[dict[str, Any]]) -> bool:
    supported = [row for row in variants if row["supported"]]
    return bool(supported) and not supported[-1]["problem"]


def _nodes_bandwidth(variants: list[dict[str, Any]]) -> dict[str, Any] | None:
    """How fast each NUMA node reads the memory of each; None if there is only one."""
    from cpumoe.measure.limits import measure_node_bandwidths
    from cpumoe.runtime import default_runtime

    nodes = default_runtime().nodes
    if nodes is None or not _can_measure(variants):
        return None
    with progress_bar() as progress:
        progress("measuring the bandwidth of NUMA nodes", 0, 1)
        return {"nodes": list(nodes), "bytes_per_second": measure_node_bandwidths(nodes)}


def _placement(variants: list[dict[str, Any]]) -> dict[str, Any] | None:
    """Where a layer of 32 MiB lies; None if layers are not divided among NUMA nodes."""
    import torch

    from cpumoe.linear import Linear
    from cpumoe.runtime import default_runtime

    if default_runtime().nodes is None or not _can_measure(variants):
        return None
    weight = torch.zeros(4096, 4096, dtype=torch.bfloat16, device="cpu")
    return dict(vars(Linear.from_tensors(weight, format="bf16").placement))


def _render(document: dict[str, Any]) -> None:
    used, cpu = document["versions"], document["cpu"]
    count = console.format_count
    quota = "none" if cpu["cpu_quota"] is None else count(cpu["cpu_quota"], "CPU")
    sockets, nodes = count(cpu["packages"], "socket"), count(len(cpu["numa_nodes"]), "NUMA node")
    facts = {
        "cpumoe": f"{used['cpumoe']} [dim](torch {used['torch']}, Python {used['python']})[/]",
        "CPU": f"{console.escape(cpu['model'])} [dim]({cpu['architecture']})[/]",
        "cores": f"{cpu['cores']} physical, {cpu['logical_cpus']} logical; {sockets}, {nodes}; "
        f"CPU quota: {quota}",
        "threads": f"{cpu['default_threads']} by default",
        "PyTorch": _host_threads(document["host_threads"]),
        "memory read": _memory_read(document["read_bandwidth"]),
    }
    if document["placement"] is not None:
        facts["weights"] = str(Placement(**document["placement"]))
    console.show(console.fact_table(facts))
    if len(cpu["numa_nodes"]) > 1 or cpu["other_numa_nodes"]:
        console.show("", _nodes_table(cpu, document["nodes_bandwidth"]))
    table = console.data_table(
        "ISA variants", ("name", "status", "missing or wrong"), text_columns=3
    )
    table.columns[-1].no_wrap = False
    for row in document["isa"]["variants"]:
        why = console.escape(row["problem"]) if row["problem"] else " ".join(row["missing"])
        table.add_row(row["name"], _status(row, document["isa"]), why)
    amx = console.data_table("AMX", ("requirement", "met", "found"), text_columns=3)
    for row in document["amx"]:
        amx.add_row(row["question"], _ANSWERS[row["passed"]], console.escape(row["found"]))
    formats = console.data_table(
        "Weight formats", ("name", "scale", "group", "bits/weight"), text_columns=2
    )
    for row in document["formats"]:
        bits = f"{row['bits_per_weight']:g}"
        scale, group = row["scale"] or "none", str(row["group_size"] or "")
        formats.add_row(row["name"], scale, group, bits)
    console.show("", table, "", amx, "", formats)
    if "hosts" in document:
        from cpumoe.cli import hosts

        console.show("", hosts.table(document["hosts"]))


def _nodes_table(cpu: dict[str, Any], bandwidth: dict[str, Any] | None) -> Any:
    measured = [] if bandwidth is None else bandwidth["nodes"]
    reads = [f"GB/s from {node}" for node in measured]
    table = console.data_table("NUMA nodes", ("node", "cores", "memory", *reads), text_columns=1)
    for node in cpu["numa_nodes"] + cpu["other_numa_nodes"]:
        memory = node["memory_bytes"]
        rates = [""] * len(measured)
        if node["id"] in measured:
            row = bandwidth["bytes_per_second"][measured.index(node["id"])] if bandwidth else []
            rates = [console.format_number(rate / 1e9) for rate in row]
        table.add_row(
            str(node["id"]),
            str(node["cores"]),
            "unknown or none" if memory is None else f"{memory / (1 << 30):.0f} GiB",
            *rates,
        )
    return table


def _host_threads(used: dict[str, Any]) -> str:
    threads = console.format_count(used["threads"], "thread")
    if used["threads_variable"]:
        threads += f" ({used['threads_variable']} is set)"
    else:
        threads += f", 1 to decode if it multiplies up to {used['small_model_bytes'] >> 20} MiB"
    waiting = used["waiting"]
    if waiting is None:
        return f"{threads}; {used['openmp'] or 'no OpenMP library found'}"
    origin = " [dim](set by cpumoe)[/]" if waiting["set_by"] == "cpumoe" else ""
    bound = console.escape(f"{waiting['variable']}={waiting['value']}")
    return f"{threads}; {used['openmp']} waits according to {bound}{origin}"


def _memory_read(measured: dict[str, Any] | None) -> str:
    if measured is None:
        return "not measured: it needs this CPU's best variant"
    threads = console.format_count(measured["threads"], "thread")
    pages = "huge pages" if measured["huge_pages"] else "small pages"
    buffer = f"{measured['buffer_bytes'] >> 20} MiB on {pages}"
    return (
        f"[bold]{console.format_rate(measured['bytes_per_second'])}[/] "
        f"[dim]({threads}, {buffer}, loads of {measured['isa']})[/]"
    )


def _status(row: dict[str, Any], isa: dict[str, Any]) -> str:
    if row["in_use"]:
        return f"[bold green]in use[/] [dim]({isa['reason']})[/]"
    if not row["built"]:
        return "not built"
    if row["problem"]:
        return "[red]unusable[/]"
    return "supported" if row["supported"] else "[yellow]not supported[/]"
