"""``cpumoe bench --compare``: this run against an earlier one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from cpumoe.cli import console
from cpumoe.cli.bench_report import VERSION, named_nodes
from cpumoe.cli.errors import InputError

_KEY = ("isa", "precision", "format", "tokens")
# Limits that differ by more are reported: the machine has changed, not only the program.
_SAME_LIMIT = 0.15
_NUMBERS = ("seconds", "low", "high")
# Version 1 had no turns, and up to version 2 "precision" was called "compute". Rows of one format
# did not name it.
_READABLE = (1, 2, VERSION)


def read(path: Path) -> dict[str, Any]:
    """Returns what an earlier ``bench --json`` wrote.

    Raises:
        OSError: the file cannot be read.
        InputError: it does not exist, or was not written by ``bench --json``.
    """
    document = _with_new_names(read_json(path))
    if not _is_ours(document):
        raise InputError(
            f"--compare: {path}: expected a file that cpumoe bench --json wrote, of version "
            f"{' or '.join(map(str, _READABLE))}"
        )
    nodes = (document["machine"].get("placement") or {}).get("nodes")
    for row in document["rows"]:
        row.setdefault("format", document["settings"].get("format"))
        row.setdefault("nodes", nodes)
    for peak in document["machine"]["dot_peaks"]:
        peak.setdefault("format", document["settings"].get("format"))
    return dict(document)


def read_json(path: Path) -> Any:
    """Returns what the JSON file that --compare names has.

    Raises:
        OSError: the file cannot be read.
        InputError: it does not exist, or is no JSON.
    """
    try:
        return json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        raise InputError(f"--compare: {path}: no such file") from None
    except ValueError as error:
        raise InputError(f"--compare: {path}: expected JSON: {error}") from error


def render(old: dict[str, Any], new: dict[str, Any]) -> None:
    """Prints the speeds of rows that both runs have, and how else the runs differ."""
    # Runs of one --nodes each are compared whatever these nodes are.
    by_nodes = any(len({_nodes(row) for row in run["rows"]}) > 1 for run in (old, new))
    before = {_key(row, by_nodes): row for row in old["rows"]}
    several = len({row["format"] for row in new["rows"]}) > 1
    named = ["ISA", "precision", *["format"] * several, *["nodes"] * by_nodes]
    table = console.data_table(
        "Compared with the earlier run",
        (*named, "tokens", "old ms", "new ms", "new/old speed", ""),
        text_columns=len(named),
    )
    matched = 0
    for row in new["rows"]:
        match = before.get(_key(row, by_nodes))
        if match is None:
            continue
        matched += 1
        table.add_row(
            row["isa"],
            row["precision"],
            *[row["format"]] * several,
            *[named_nodes(row["nodes"])] * by_nodes,
            str(row["tokens"]),
            console.format_number(1e3 * match["seconds"]),
            console.format_number(1e3 * row["seconds"]),
            f"{match['seconds'] / row['seconds']:.3f}",
            _verdict(match, row),
        )
    if not matched:
        formats = console.escape(str(old["settings"].get("format")))
        console.show("", f"The earlier run has none of these rows. Its format: {formats}")
        return
    console.show("", table, "", "[dim]faster, slower: the rounds of the two runs do not overlap[/]")
    for name, was, value in differences(old, new):
        console.print_warning(f"the runs differ in {name}: {was} then, {value} now")


def differences(old: dict[str, Any], new: dict[str, Any]) -> list[tuple[str, Any, Any]]:
    """Returns name, old value and new value of all that makes two runs less comparable."""
    pairs = [(name, old["settings"].get(name), now) for name, now in new["settings"].items()]
    # Rows of different formats are not compared at all.
    unrelated = ("seconds", "data", "format")
    for name in ("cpu", "threads"):
        pairs.append((name, old["machine"].get(name), new["machine"][name]))
    found = [pair for pair in pairs if pair[1] != pair[2] and pair[0] not in unrelated]
    limits = _limits(new)
    for name, before in _limits(old).items():
        now = limits.get(name, before)
        if abs(before - now) > _SAME_LIMIT * max(before, now):
            found.append((name, f"{before:.3g}", f"{now:.3g}"))
    return found


def _limits(document: dict[str, Any]) -> dict[str, float]:
    """The machine's limits by name."""
    machine = document["machine"]
    limits = {"memory read, GB/s": machine["read_bandwidth"]["bytes_per_second"] / 1e9}
    for peak in machine["dot_peaks"]:
        kind = ", ".join(str(peak[key]) for key in ("isa", "format", "precision") if key in peak)
        limits[f"{kind} in registers, GFLOP/s"] = 2e-9 * peak["macs_per_second"]
    return limits


def _with_new_names(value: Any) -> Any:
    if isinstance(value, list):
        return [_with_new_names(item) for item in value]
    if not isinstance(value, dict):
        return value
    return {
        "precision" if name == "compute" else name: _with_new_names(item)
        for name, item in value.items()
    }


def _key(row: dict[str, Any], by_nodes: bool) -> tuple[Any, ...]:
    return (*(row.get(name) for name in _KEY), _nodes(row) if by_nodes else None)


def _nodes(row: dict[str, Any]) -> tuple[int, ...] | None:
    return None if row["nodes"] is None else tuple(row["nodes"])


def _verdict(old: dict[str, Any], new: dict[str, Any]) -> str:
    if new["high"] < old["low"]:
        return "[bold green]faster[/]"
    if new["low"] > old["high"]:
        return "[bold red]slower[/]"
    return ""


def _is_ours(document: Any) -> bool:
    if not isinstance(document, dict) or document.get("version") not in _READABLE:
        return False
    try:
        _limits(document)
        values = [row[name] for row in document["rows"] for name in _NUMBERS]
        return isinstance(document["settings"], dict) and all(
            isinstance(value, (int, float)) for value in values
        )
    except (KeyError, TypeError):
        return False
