"""Divides a machine's CPUs among the ranks that run on it."""

from __future__ import annotations

import os
from collections.abc import Sequence

from cpumoe import _core


def share_of_cpus(index: int, count: int) -> list[int] | None:
    """Returns the CPUs for one of several ranks of this machine; None: there are too few cores.

    Successive ranks get successive cores, by NUMA node, so that ranks on a machine with as many
    nodes have a node each. SMT siblings stay together.

    Args:
        index: the rank's place among the machine's ranks.
        count: the number of ranks on the machine, all of which may use the same CPUs.
    """
    permitted = os.sched_getaffinity(0)
    cores: dict[tuple[int, int, int], list[int]] = {}
    for each in _core.topology().cpus:
        if each.cpu in permitted:
            cores.setdefault((each.node, each.package, each.core), []).append(each.cpu)
    ordered = [cores[place] for place in sorted(cores)]
    if len(ordered) < count:
        return None
    chosen = ordered[index * len(ordered) // count : (index + 1) * len(ordered) // count]
    return sorted(cpu for core in chosen for cpu in core)


def same_machine(hosts: Sequence[str], cpus: Sequence[Sequence[int]], rank: int) -> list[int]:
    """Returns the ranks with which a rank must divide its CPUs, itself included.

    Ranks that were bound to other CPUs need not divide anything.

    Args:
        hosts: the name of each rank's machine.
        cpus: the CPUs that each rank may use.
        rank: the rank.
    """
    own = (hosts[rank], set(cpus[rank]))
    return [each for each in range(len(hosts)) if (hosts[each], set(cpus[each])) == own]
