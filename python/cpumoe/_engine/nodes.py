"""The NUMA nodes among which a runtime's threads, and the memory of its layers, are divided."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Literal, TypeAlias, cast

from cpumoe import _core
from cpumoe._base.scalars import integer

VARIABLE = "CPUMOE_NODES"

Nodes: TypeAlias = "Literal['auto'] | int | Sequence[int]"
Node: TypeAlias = _core.UsableNode

_MOST_NODES = 1 << 10  # of Linux, in any configuration (CONFIG_NODES_SHIFT)
_EXPECTED = '"auto", 1 for the whole machine as one node, or a list of node numbers'


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
    return cast("Nodes", _core.parse_nodes(text, name))


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
    if isinstance(wanted, str):
        if wanted != "auto":
            raise ValueError(f"{subject}: expected {_EXPECTED}, got {wanted!r}")
    elif not isinstance(wanted, Sequence):
        if integer(wanted, subject) != 1:
            raise ValueError(f"{subject}: expected {_EXPECTED}, got {wanted!r}")
        wanted = 1
    elif cpus is None:
        wanted = [_node_number(number, subject) for number in wanted]
    elif nodes is None:
        wanted = "auto"  # the caller's CPUs matter more than the variable
    else:
        raise ValueError("Runtime: cpus names the CPUs, so leave out nodes, or pass nodes=1")
    return _core.choose_nodes(wanted, topology, subject)


def divide_threads(threads: int, nodes: Sequence[Node]) -> dict[Node, int]:
    """Returns how many threads each node gets, in proportion to its cores.

    Each node gets a thread. If there are fewer threads than nodes, the nodes with most cores get
    one each, and the others are not in the result.
    """
    given = _core.divide_threads(threads, [len(node.cores) for node in nodes])
    return {node: count for node, count in zip(nodes, given, strict=True) if count}


def useful_threads(topology: _core.Topology, nodes: Sequence[Node]) -> int:
    """Returns the number of cores, of nodes if there are any, capped by the CPU quota."""
    return _core.useful_threads(topology, list(nodes))


def usable_nodes(topology: _core.Topology) -> list[Node]:
    """Returns the nodes with memory, in ascending order, each with all CPUs that should use it."""
    return _core.usable_nodes(topology)


def _node_number(value: object, subject: str) -> int:
    number = integer(value, subject)
    if not 0 <= number < _MOST_NODES:
        raise ValueError(
            f"{subject}: expected node numbers, which are 0 to {_MOST_NODES - 1}, got {number}"
        )
    return number
