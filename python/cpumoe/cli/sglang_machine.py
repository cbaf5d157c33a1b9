"""The machine that SGLang is to run on: cores, NUMA nodes, memory and GPUs."""

from __future__ import annotations

import csv
import math
import os
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

_MEBIBYTE = 1 << 20
_GPU_QUERY = (
    "nvidia-smi",
    "--query-gpu=index,uuid,name,memory.total",
    "--format=csv,noheader,nounits",
)
_QUERY_SECONDS = 20
# Which GPUs a process may use, as the driver numbers or names them.
_VISIBLE = "CUDA_VISIBLE_DEVICES"
# The memory that a container may use, in versions 2 and 1 of control groups.
_LIMITS = (
    Path("/sys/fs/cgroup/memory.max"),
    Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"),
)


@dataclass(frozen=True)
class Gpu:
    """A GPU.

    Attributes:
        name: its name.
        memory: its bytes.
    """

    name: str
    memory: int


@dataclass(frozen=True)
class Machine:
    """A machine, as far as this process may use it.

    Attributes:
        cores: number of physical cores that experts use by default.
        nodes: numbers of the NUMA nodes that they use by default; none: the machine counts as one.
        memory: bytes of memory that new allocations may take; 0: unknown.
        gpus: the GPUs.
        cores_of_nodes: number of physical cores of each NUMA node, by its number.
        quota: CPU time that may be used, in CPUs.
    """

    cores: int
    nodes: tuple[int, ...]
    memory: int
    gpus: tuple[Gpu, ...]
    cores_of_nodes: Mapping[int, int] = field(default_factory=dict)
    quota: float = math.inf

    def cores_on(self, nodes: Sequence[int]) -> int:
        """Returns the number of physical cores of nodes, capped by the quota."""
        return max(1, math.floor(min(self.quota, sum(self.cores_of_nodes[n] for n in nodes))))


def this_machine() -> Machine:
    """Returns this machine.

    Raises:
        ValueError: the variable CPUMOE_NODES has a wrong value.
    """
    from cpumoe._engine import nodes

    topology = nodes.machine()
    chosen = nodes.choose_nodes(None, topology, None)
    return Machine(
        nodes.useful_threads(topology, chosen),
        tuple(node.id for node in chosen),
        _free_memory(),
        visible_gpus(),
        {node.id: len(node.cores) for node in nodes.usable_nodes(topology)},
        topology.quota,
    )


def visible_gpus() -> tuple[Gpu, ...]:
    """Returns NVIDIA's GPUs that CUDA may use; none if nvidia-smi is missing or fails."""
    try:
        answer = subprocess.run(
            _GPU_QUERY, capture_output=True, text=True, timeout=_QUERY_SECONDS, check=True
        ).stdout
    except (OSError, subprocess.SubprocessError):
        return ()
    rows = [row for row in csv.reader(answer.splitlines(), skipinitialspace=True) if len(row) == 4]
    return tuple(
        Gpu(name, int(memory) * _MEBIBYTE)
        for _, _, name, memory in _visible(rows)
        if memory.isdigit()
    )


def _visible(rows: Sequence[Sequence[str]]) -> list[Sequence[str]]:
    """The rows that CUDA may use, in CUDA's order."""
    wanted = os.environ.get(_VISIBLE)
    if wanted is None:
        return list(rows)
    found: list[Sequence[str]] = []
    for device in wanted.split(","):
        name = device.strip()
        match = [row for row in rows if row[0] == name or (name and row[1].startswith(name))]
        if len(match) != 1:  # CUDA ignores what follows an unknown device.
            break
        found += match
    return found


def _free_memory() -> int:
    from cpumoe.measure.limits import available_bytes

    free = available_bytes()
    for path in _LIMITS:
        try:
            free = min(free, int(path.read_text()))
        except (OSError, ValueError):  # no such limit, or the word "max"
            continue
    return free
