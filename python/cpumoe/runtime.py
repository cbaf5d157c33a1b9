"""The threads that expert layers run on."""

from __future__ import annotations

import math
import os
import threading
import warnings
from collections.abc import Sequence
from types import TracebackType
from typing import NoReturn

from cpumoe import _core
from cpumoe._base.scalars import boolean, integer
from cpumoe._engine.cpus import checked_cpus
from cpumoe._engine.nodes import (
    Node,
    Nodes,
    choose_nodes,
    divide_threads,
    machine,
    useful_threads,
)

# A larger number is a mistake: no machine has so many cores.
MAX_THREADS = 4096


class Runtime:
    """A pool of threads and its scratch memory, shared by any number of `Experts`.

    Threads are persistent. They poll for some microseconds after a call and then sleep, so an idle
    runtime uses no CPU. Calls from several Python threads run one after the other.

    A runtime does not survive ``fork()``. Using it in the child raises RuntimeError; the default
    runtime is made anew there. Scratch memory grows to the needs of the largest call (up to 400 MB
    for long prompts with DeepSeek-V4-Flash) and is kept until `close`.

    On a machine with several NUMA nodes, the threads are divided among the nodes and stay there. A
    layer that the runtime packs gets a share of its rows in the memory of each node, and each
    thread reads its own node's share. Results have the same bits for any number of nodes. The
    caller does not compute then: a driver thread on the first node takes its place, as for `cpus`.

    Args:
        threads: number of threads that compute, the calling one included. Default: the number of
            physical cores in this process's affinity mask (on the nodes in use), capped by its
            cgroup's CPU quota (rounded down), at least 1. A larger number causes a warning, because
            threads that share a core slow each other down.
        pin: whether each thread other than the caller stays on one core.
        cpus: numbers of the CPUs that compute, one thread on each, for example ``[0, 1, 2, 3]``.
            The affinity mask of the caller does not matter, so a host may bind its main thread to
            one CPU. The caller does not compute: a driver thread on the first CPU takes its place,
            and handing a call over takes some microseconds. Leave out `threads` and `pin`.
        nodes: NUMA nodes to use. ``"auto"``: all nodes whose CPUs and memory this process may use,
            as far as there are threads for them. ``1``: the machine counts as one node, and threads
            are not bound to nodes. A list: the nodes with these numbers, for example ``[0, 2]``, or
            ``[1]`` for one of several processes. Default: the environment variable CPUMOE_NODES
            (``auto``, ``1``, ``0,2`` or ``[1]``), else ``"auto"``.

    Raises:
        TypeError: `threads` is not an int, `pin` is not a bool, `cpus` is no sequence of ints, or
            `nodes` is neither a string nor an int nor a sequence of ints.
        ValueError: `threads` is not from 1 to 4096. `cpus` is empty, has a CPU twice, has a CPU
            that this process may not use, or contradicts `threads`, `pin` or `nodes`. `nodes` has a
            node twice, one whose CPUs or memory this process may not use, or more nodes than there
            are threads. CPUMOE_NODES has a wrong value.
        OSError: the system refuses to start more threads, or to place threads on CPUs.
    """

    def __init__(
        self,
        threads: int | None = None,
        *,
        pin: bool = False,
        cpus: Sequence[int] | None = None,
        nodes: Nodes | None = None,
    ) -> None:
        """Starts the threads."""
        boolean(pin, "Runtime: pin")
        self._cpus = None if cpus is None else checked_cpus(cpus)
        topology = machine(self._cpus)
        chosen = choose_nodes(nodes, topology, self._cpus)
        most = useful_threads(topology, chosen)
        self._threads = most if threads is None else _checked(threads)
        if self._cpus is not None:
            _refuse_contradictions(self._cpus, threads, pin)
            self._threads = len(self._cpus)
            most = max(1, math.floor(min(topology.quota, self._threads)))
        _warn_of_waiting(self._threads, most, self._cpus)
        self._pin = pin
        self._closed = False
        divided = _divided(self._threads, chosen, self._cpus, pin, nodes)
        self._nodes = tuple(node.id for node in divided) or None
        self.core = _core.Runtime(
            threads=self._threads,
            cpus=list(self._cpus or (topology.cores if pin else ())),
            callers_compute=self._cpus is None and not divided,
            nodes=list(divided.values()),
        )

    @property
    def threads(self) -> int:
        """Number of threads that compute, the calling one included."""
        return self._threads

    @property
    def cpus(self) -> tuple[int, ...] | None:
        """The CPUs that compute, one thread on each; None if they were not given."""
        return self._cpus

    @property
    def nodes(self) -> tuple[int, ...] | None:
        """Numbers of the NUMA nodes in use; None if the machine counts as one node."""
        return self._nodes

    @property
    def closed(self) -> bool:
        """Whether `close` was called."""
        return self._closed

    def close(self) -> None:
        """Finishes submitted calls, ends the threads and frees scratch memory.

        Later calls raise RuntimeError.
        """
        self._closed = True
        self.core.close()

    def __enter__(self) -> Runtime:
        """Returns itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Closes the runtime."""
        self.close()

    def __reduce__(self) -> NoReturn:
        """Refuses to be pickled or copied."""
        raise TypeError(
            "Runtime cannot be pickled or copied, because its threads belong to this process; make "
            "another one"
        )

    def __repr__(self) -> str:
        """Shows the CPUs, or threads and pinning, the nodes, and whether the runtime is closed."""
        state = "" if self._nodes is None else f", nodes={list(self._nodes)}"
        state += ", closed" if self._closed else ""
        if self._cpus is not None:
            return f"Runtime(cpus={list(self._cpus)}{state})"
        return f"Runtime(threads={self._threads}, pin={self._pin}{state})"


def check_runtime(runtime: object) -> None:
    """Raises TypeError unless an object is a `Runtime`, or None for the shared one."""
    if runtime is not None and not isinstance(runtime, Runtime):
        raise TypeError(
            f"runtime: expected a cpumoe.Runtime, or None for the shared one, got {runtime!r}"
        )


def _checked(threads: object) -> int:
    number = integer(threads, "Runtime: threads")
    if not 1 <= number <= MAX_THREADS:
        raise ValueError(f"Runtime: threads: expected 1 to {MAX_THREADS}, got {number}")
    return number


def _refuse_contradictions(cpus: tuple[int, ...], threads: int | None, pin: bool) -> None:
    if pin:
        raise ValueError("Runtime: cpus places every thread on a CPU, so leave out pin")
    if threads is not None and threads != len(cpus):
        raise ValueError(
            f"Runtime: cpus has {len(cpus)} CPUs, for one thread each, but threads is {threads}; "
            "leave out threads"
        )


def _divided(
    threads: int,
    nodes: Sequence[Node],
    cpus: tuple[int, ...] | None,
    pin: bool,
    wanted: Nodes | None,
) -> dict[Node, _core.NodeThreads]:
    """Returns the threads of each node; nothing if the machine counts as one node."""
    if not nodes:
        return {}
    if cpus is not None:
        places = {node: [cpu for cpu in cpus if cpu in node.cpus] for node in nodes}
        return {node: _node_threads(node, len(its), its, True) for node, its in places.items()}
    given = divide_threads(threads, nodes)
    if len(given) == 1 and len(nodes) > 1 and wanted in (None, "auto"):
        return {}  # a single thread needs no node
    if len(given) < len(nodes) and wanted not in (None, "auto"):
        raise ValueError(
            f"Runtime: nodes: expected at most as many nodes as threads, {threads}, got "
            f"{[node.id for node in nodes]}"
        )
    return {
        node: _node_threads(node, count, node.cores if pin else node.cpus, pin)
        for node, count in given.items()
    }


def _node_threads(
    node: Node, threads: int, cpus: Sequence[int], one_cpu_each: bool
) -> _core.NodeThreads:
    return _core.NodeThreads(
        id=node.id, threads=threads, cpus=list(cpus), one_cpu_each=one_cpu_each
    )


def _warn_of_waiting(threads: int, most: int, cpus: tuple[int, ...] | None) -> None:
    """Warns if threads will wait for each other; for `Runtime.__init__`."""
    limit = "its cgroup's CPU quota"
    if cpus is None:
        limit = "physical cores in its affinity mask, capped by its cgroup's CPU quota"
    if threads > most:
        warnings.warn(
            f"Runtime: {threads} threads requested, but this process may use {most} ({limit}); "
            "calls will be slower, not faster",
            RuntimeWarning,
            stacklevel=3,
        )


_default: Runtime | None = None
_default_lock = threading.Lock()


def default_runtime() -> Runtime:
    """Returns the process's shared runtime, made on first use (and anew in a forked child)."""
    global _default
    runtime = _default
    if runtime is not None and not runtime._closed:
        return runtime  # the usual case, without the lock: every call of a layer passes here
    with _default_lock:
        if _default is None or _default.closed:
            _default = Runtime()
        return _default


def _forget_default() -> None:
    # The child has none of the parent's threads, one of which may have held the lock.
    global _default, _default_lock
    _default = None
    _default_lock = threading.Lock()


os.register_at_fork(after_in_child=_forget_default)
