"""The NUMA nodes among which a runtime's threads, and the memory of its layers, are divided."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

from cpumoe import _core
from cpumoe._base.scalars import integer

VARIABLE = "CPUMOE_NODES"

Nodes: TypeAlias = "Literal['auto'] | int | Sequence[int]"

_EXPECTED = '"auto", 1 for the whole machine as one node, or a list of node numbers'


@dataclass(frozen=True)
class Node:
    """A node with memory, and the CPUs whose threads use this memory.

    Attributes:
        id: the node's number.
        cpus: the CPUs that this process may use.
        cores: one of the CPUs of each physical core.
    """

    id: int
    cpus: tuple[int, ...]
    cores: tuple[int, ...]


def machine(affinity: Sequence[int] | None = None) -> _core.Topology:
    """Returns the machine, as far as this process may use it, or the CPUs that `affinity` names."""
    return _core.topology(affinity=None if affinity is None else list(affinity))


def parse_nodes(text: str, name: str) -> Nodes:
    """Returns the nodes that a command's option or an environment variable names.

    Args:
        text: ``auto``, ``1``, or node numbers separated by commas, in brackets if there is one.
        name: what has this value, for the error.

    Raises:
        ValueError: the text is something else.
    """
    stripped = text.strip()
    if stripped == "auto":
        return "auto"
    if stripped == "1":
        return 1
    bracketed = stripped.startswith("[") and stripped.endswith("]")
    numbers = (stripped[1:-1] if bracketed else stripped).split(",")
    if (bracketed or len(numbers) > 1) and all(_is_number(number) for number in numbers):
        return [int(number) for number in numbers]
    raise ValueError(
        f"{name}: expected auto, 1 for the whole machine as one node, or node numbers as in 0,2 or "
        f"[1], got {text!r}"
    )


def choose_nodes(
    nodes: Nodes | None, topology: _core.Topology, cpus: Sequence[int] | None
) -> list[Node]:
    """Returns the nodes that a runtime uses; none if it takes the machine as one node.

    Args:
        nodes: as `cpumoe.Runtime` gets them.
        topology: the machine.
        cpus: the CPUs that the caller named.

    Raises:
        TypeError: `nodes` is of another type.
        ValueError: `nodes` has a wrong value, or contradicts `cpus`; or the variable CPUMOE_NODES
            has.
    """
    if nodes is None:
        text = os.environ.get(VARIABLE, "")
        wanted: Nodes = parse_nodes(text, VARIABLE) if text else "auto"
        subject = VARIABLE
    else:
        wanted, subject = nodes, "Runtime: nodes"
    usable = usable_nodes(topology)
    if isinstance(wanted, str):
        if wanted != "auto":
            raise ValueError(f"{subject}: expected {_EXPECTED}, got {wanted!r}")
        return usable if len(usable) > 1 else []
    if not isinstance(wanted, Sequence):
        if integer(wanted, subject) != 1:
            raise ValueError(f"{subject}: expected {_EXPECTED}, got {wanted!r}")
        return []
    if cpus is not None:
        if nodes is None:  # the caller's CPUs matter more than the variable
            return usable if len(usable) > 1 else []
        raise ValueError("Runtime: cpus names the CPUs, so leave out nodes, or pass nodes=1")
    return _named(wanted, usable, subject)


def divide_threads(threads: int, nodes: Sequence[Node]) -> dict[Node, int]:
    """Returns how many threads each node gets, in proportion to its cores.

    Each node gets a thread. If there are fewer threads than nodes, the nodes with most cores get
    one each, and the others are not in the result.
    """
    chosen = sorted(nodes, key=lambda node: (-len(node.cores), node.id))[:threads]
    given = {node: 1 for node in nodes if node in chosen}
    for _ in range(threads - len(given)):
        neediest = max(given, key=lambda node: len(node.cores) / (given[node] + 1))
        given[neediest] += 1
    return given


def useful_threads(topology: _core.Topology, nodes: Sequence[Node]) -> int:
    """Returns the number of cores, of nodes if there are any, capped by the CPU quota."""
    if not nodes:
        return topology.default_threads
    return max(1, math.floor(min(topology.quota, sum(len(node.cores) for node in nodes))))


def usable_nodes(topology: _core.Topology) -> list[Node]:
    """Returns the nodes with memory, in ascending order, each with all CPUs that should use it."""
    members: dict[int, list[_core.NumaNode]] = {}
    for node in topology.nodes:
        members.setdefault(node.memory_node, []).append(node)
    return [
        Node(
            number,
            tuple(sorted(cpu for node in members[number] for cpu in node.cpus)),
            tuple(core for node in members[number] for core in node.cores),
        )
        for number in sorted(members)
    ]


def _named(wanted: Sequence[object], usable: Sequence[Node], subject: str) -> list[Node]:
    numbers = [integer(number, subject) for number in wanted]
    if not numbers:
        raise ValueError(f"{subject}: expected at least one node, got none")
    if len(set(numbers)) != len(numbers):
        raise ValueError(f"{subject}: expected each node once, got {numbers}")
    by_number = {node.id: node for node in usable}
    if missing := [number for number in numbers if number not in by_number]:
        raise ValueError(
            f"{subject}: expected nodes whose CPUs and memory this process may use, "
            f"{sorted(by_number)}; got {missing}"
        )
    return [by_number[number] for number in sorted(numbers)]


def _is_number(text: str) -> bool:
    stripped = text.strip()
    return stripped.isascii() and stripped.isdecimal() and len(stripped) < 6
