"""The machine's limits: how fast it reads and copies memory, and how fast it multiplies and adds.

A call must read its weights and sum its products, so it cannot be faster than either limit allows.
How close it comes to the slower of the two says how much is left to gain. Writing an expert for a
GPU (`cpumoe.measure.write_back`) is compared with a copy. All limits are measured on the threads
that experts run on, by loops that do nothing else (``cpp/kernels/limits-inl.h``).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from cpumoe import _core
from cpumoe.isa import usable_isas
from cpumoe.runtime import Runtime

_MIN_BUFFER_BYTES = 256 << 20
_MAX_BUFFER_BYTES = 8 << 30
_BUFFER_PER_L3 = 4
_CPUS = Path("/sys/devices/system/cpu")
_MEMINFO = Path("/proc/meminfo")
_SMAPS = Path("/proc/self/smaps_rollup")

# A task is long enough for a clock, and short enough that threads end together. All tasks of a
# thread are long enough to make the time to wake it negligible.
_TASK_SECONDS = 0.25e-3
_TASKS_PER_THREAD = 80
_CALIBRATION_ROUNDS = 1000

_PRECISIONS = {"bf16": _core.Precision.BF16, "int8": _core.Precision.INT8}


@dataclass(frozen=True)
class ReadBandwidth:
    """Memory read bandwidth, as measured.

    Attributes:
        bytes_per_second: rate of the best run.
        isa: the variant whose load instructions read.
        threads: number of threads that read.
        buffer_bytes: size of the buffer, several times the last-level cache.
        huge_pages: whether the kernel backed the buffer with huge pages.
    """

    bytes_per_second: float
    isa: str
    threads: int
    buffer_bytes: int
    huge_pages: bool


@dataclass(frozen=True)
class DotPeak:
    """The rate of multiply-accumulates in registers, as measured.

    Attributes:
        macs_per_second: multiply-accumulates per second, the best run.
        isa: the variant whose instruction multiplies.
        format: the weight format whose calls use this instruction.
        precision: their precision.
        threads: number of threads that multiply.
    """

    macs_per_second: float
    isa: str
    format: str
    precision: str
    threads: int


class MemoryReader:
    """A buffer that a runtime's threads read or copy together, any number of times.

    The buffer lies on huge pages where the kernel grants them, and is read with the widest loads
    that this CPU has. Deleting the reader frees the buffer.
    """

    def __init__(self, runtime: Runtime, *, buffer_bytes: int | None = None) -> None:
        """Allocates the buffer.

        Args:
            runtime: the threads.
            buffer_bytes: size of the buffer; default: four times the last-level caches, at least
                256 MiB, at most 8 GiB and a quarter of the free memory.

        Raises:
            ValueError: `buffer_bytes` is not positive, or no installed variant runs here.
            RuntimeError: the runtime is closed.
        """
        size = _default_buffer_bytes() if buffer_bytes is None else buffer_bytes
        self._runtime = runtime
        self._isa = usable_isas()[-1]
        before = _kilobytes(_SMAPS, "AnonHugePages")
        self._buffer = _core.MemoryBuffer(runtime.core, size)
        gained = (_kilobytes(_SMAPS, "AnonHugePages") - before) * 1024
        self._huge_pages = gained >= 0.9 * self._buffer.nbytes

    @property
    def buffer_bytes(self) -> int:
        """Size of the buffer."""
        return self._buffer.nbytes

    @property
    def huge_pages(self) -> bool:
        """Whether the kernel backed the buffer with huge pages."""
        return self._huge_pages

    def measure_copy(self, *, seconds: float = 0.5) -> float:
        """Copies one half of the buffer to the other, past the caches.

        Args:
            seconds: time to spend (three runs at least).

        Returns:
            Bytes read and written per second, in the best run.

        Raises:
            RuntimeError: the runtime is closed.
        """
        return self._buffer.nbytes / min(self._times(self._buffer.copy, seconds, self._runtime))

    def measure(self, *, runtime: Runtime | None = None, seconds: float = 0.5) -> ReadBandwidth:
        """Returns the best run.

        Args:
            runtime: the threads that read; None: those for whom the buffer was allocated.
            seconds: time to spend (three runs at least).

        Raises:
            RuntimeError: the runtime is closed.
        """
        reader = runtime or self._runtime
        times = self._times(self._buffer.read, seconds, reader)
        return ReadBandwidth(
            bytes_per_second=self._buffer.nbytes / min(times),
            isa=self._isa,
            threads=reader.threads,
            buffer_bytes=self._buffer.nbytes,
            huge_pages=self._huge_pages,
        )

    def _times(
        self, run: Callable[[_core.Runtime, str, str], float], seconds: float, runtime: Runtime
    ) -> list[float]:
        times: list[float] = []
        while len(times) < 3 or sum(times) < seconds:
            times.append(run(runtime.core, self._isa, "isa"))
        return times


def measure_read_bandwidth(
    runtime: Runtime, *, buffer_bytes: int | None = None, seconds: float = 0.5
) -> ReadBandwidth:
    """Measures how fast a runtime's threads together read memory; see `MemoryReader`.

    Args:
        runtime: the threads.
        buffer_bytes: size of the buffer; default: see `MemoryReader`.
        seconds: time to spend on reading (three runs at least).

    Raises:
        ValueError: `buffer_bytes` is not positive, or no installed variant runs here.
        RuntimeError: the runtime is closed.
    """
    return MemoryReader(runtime, buffer_bytes=buffer_bytes).measure(seconds=seconds)


def measure_node_bandwidths(nodes: Sequence[int], *, seconds: float = 0.1) -> list[list[float]]:
    """Measures how fast the threads of each NUMA node read the memory of each.

    Args:
        nodes: numbers of nodes, each with a core of this process.
        seconds: time to spend on each pair (three runs at least).

    Returns:
        Bytes per second: of the threads of ``nodes[i]`` and the memory of ``nodes[j]`` in row i,
        column j.

    Raises:
        ValueError: this process may not use a node, or no installed variant runs here.
    """
    runtimes = [Runtime(nodes=[node]) for node in nodes]
    rates: list[list[float]] = [[] for _ in nodes]
    for owner in runtimes:
        memory = MemoryReader(owner)
        for row, runtime in zip(rates, runtimes, strict=True):
            row.append(memory.measure(runtime=runtime, seconds=seconds).bytes_per_second)
    for runtime in runtimes:
        runtime.close()
    return rates


def measure_own_bandwidths(runtime: Runtime, *, seconds: float = 0.1) -> list[float]:
    """Measures how fast each NUMA node's threads of a runtime read the node's own memory.

    The threads of one node read at a time, with as many threads as the runtime has there.

    Args:
        runtime: the threads, divided among nodes; none are measured if they are not.
        seconds: time to spend on each node (three runs at least).

    Returns:
        Bytes per second, for each of `runtime.nodes`.

    Raises:
        ValueError: no installed variant runs here.
    """
    rates = []
    for node in runtime.core.nodes:
        with warnings.catch_warnings():
            # The runtime's maker was warned already if there are more threads than cores.
            warnings.simplefilter("ignore", RuntimeWarning)
            alone = Runtime(node.threads, nodes=[node.id])
        with alone:
            rates.append(MemoryReader(alone).measure(seconds=seconds).bytes_per_second)
    return rates


def measure_dot_peak(
    runtime: Runtime, isa: str, format: str, precision: str, *, seconds: float = 0.2
) -> DotPeak | None:
    """Measures how many multiply-accumulates a runtime's threads together do per second.

    Args:
        runtime: the threads.
        isa: the variant, one that this CPU supports.
        format: the weight format. A variant may multiply formats with different instructions.
        precision: the precision of the calls.
        seconds: time to spend (three runs at least).

    Returns:
        The rate of the best run, or None if the precision does not say which instruction multiplies
        ("auto", where the hidden states' dtype decides).

    Raises:
        ValueError: the variant or the format is unknown, or this CPU does not support the variant.
    """
    if precision not in _PRECISIONS:
        return None

    def run(tasks: int, rounds: int) -> tuple[int, float]:
        loop = isa, "isa", format, _PRECISIONS[precision]
        return _core.run_dots(runtime.core, *loop, tasks, rounds)

    first = min(run(1, _CALIBRATION_ROUNDS)[1] for _ in range(3))
    rounds = max(1, round(_CALIBRATION_ROUNDS * _TASK_SECONDS / first))
    rates: list[float] = []
    spent = 0.0
    while len(rates) < 3 or spent < seconds:
        macs, taken = run(_TASKS_PER_THREAD * runtime.threads, rounds)
        rates.append(macs / taken)
        spent += taken
    return DotPeak(max(rates), isa, format, precision, runtime.threads)


def available_bytes() -> int:
    """Returns the kernel's estimate of the memory that new allocations may take; 0: unknown."""
    return _kilobytes(_MEMINFO, "MemAvailable") * 1024


def _default_buffer_bytes() -> int:
    wanted = min(max(_BUFFER_PER_L3 * _l3_bytes(), _MIN_BUFFER_BYTES), _MAX_BUFFER_BYTES)
    available = available_bytes()
    return min(wanted, available // 4) if available else wanted


def _l3_bytes() -> int:
    """Bytes of all last-level caches, of which a CPU may have several; 0: unknown."""
    sizes: dict[str, int] = {}
    for cache in _CPUS.glob("cpu[0-9]*/cache/index3"):
        try:
            size = (cache / "size").read_text().strip().removesuffix("K")
            sizes[(cache / "shared_cpu_list").read_text()] = int(size) * 1024
        except (OSError, ValueError):
            continue
    return sum(sizes.values())


def _kilobytes(path: Path, key: str) -> int:
    """The number of a line ``key:  123 kB``; 0 if the file or the line is missing."""
    try:
        lines = path.read_text().splitlines()
    except OSError:
        return 0
    for line in lines:
        name, _, value = line.partition(":")
        if name == key:
            return int(value.split()[0])
    return 0
