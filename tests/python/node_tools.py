"""Made-up NUMA nodes: a machine's files as tests write them, with CPUs that exist or not."""

import itertools
import os

import cpumoe._engine.nodes
import cpumoe.runtime
from cpumoe import _core

CPUS = sorted(os.sched_getaffinity(0))


def make_machine(folder, nodes, *, memory_mib=4096):
    """Writes a machine with `nodes`, a list of CPUs by the node's number.

    Returns a function that reads its topology, in place of `cpumoe._engine.nodes.machine`.
    """
    for node, cpus in nodes.items():
        directory = folder / "sys/devices/system/node" / f"node{node}"
        directory.mkdir(parents=True)
        directory.joinpath("cpulist").write_text(",".join(map(str, cpus)))
        directory.joinpath("meminfo").write_text(f"Node {node} MemTotal: {memory_mib << 10} kB\n")
    everything = [cpu for cpus in nodes.values() for cpu in cpus]

    def read(affinity=None):
        return _core.topology(
            sysfs=str(folder / "sys"), proc=str(folder / "proc"), affinity=affinity or everything
        )

    return read


def see_machine(monkeypatch, folder, nodes):
    """Lets runtimes and commands see the machine that `make_machine` writes."""
    read = make_machine(folder, nodes)
    monkeypatch.setattr(cpumoe.runtime, "machine", read)
    monkeypatch.setattr(cpumoe._engine.nodes, "machine", read)
    monkeypatch.delenv("CPUMOE_NODES", raising=False)


def made_up_nodes(monkeypatch, folder, threads):
    """Lets runtimes see a node for each element of `threads`, with so many CPUs.

    The CPUs of this process come first. The others do not exist, so threads that should run there
    run anywhere.
    """
    cpus = itertools.chain(CPUS, itertools.count(CPUS[-1] + 1))
    nodes = {number: [next(cpus) for _ in range(count)] for number, count in enumerate(threads)}
    see_machine(monkeypatch, folder, nodes)
