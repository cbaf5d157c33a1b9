"""How fast this machine reads memory, and how close an expert layer comes to that.

Few tokens are bound by reading weights: a token of a layer reads its experts once, so that bytes
read per second over the memory's read bandwidth is the share of the possible that was reached.
"""

from __future__ import annotations

import contextlib
import math
import mmap
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from cpumoe import _core
from cpumoe.experts import Experts

_MIN_BUFFER_BYTES = 256 << 20
_MAX_BUFFER_BYTES = 1 << 30
_BUFFER_PER_L3 = 4
_MATRIX_COLUMNS = 4096
_L3_SIZE = Path("/sys/devices/system/cpu/cpu0/cache/index3/size")
_MEMINFO = Path("/proc/meminfo")
_SMAPS = Path("/proc/self/smaps_rollup")


@dataclass(frozen=True)
class ReadBandwidth:
    """Memory read bandwidth, as measured.

    Attributes:
        bytes_per_second: the best run of the fastest way to read.
        method: that way.
        methods: every way tried, with its best bytes per second.
        threads: threads that read.
        buffer_bytes: size of the buffer, several times the last-level cache.
        huge_pages: whether the kernel backed the buffer with huge pages.
    """

    bytes_per_second: float
    method: str
    methods: Mapping[str, float]
    threads: int
    buffer_bytes: int
    huge_pages: bool


def measure_read_bandwidth(
    threads: int | None = None,
    *,
    buffer_bytes: int | None = None,
    seconds: float = 0.5,
    clock: Callable[[], float] = time.perf_counter,
) -> ReadBandwidth:
    """Measures how fast `threads` threads together read memory.

    Several PyTorch kernels read one buffer on huge pages (where the kernel grants them); which of
    them is bound by memory alone depends on the machine, so the fastest counts.

    Args:
        threads: default: as many as a `Runtime` takes.
        buffer_bytes: default: four times the last-level cache, at least 256 MiB, at most 1 GiB and
            a quarter of the free memory.
        seconds: time to spend on reading (each way runs three times at least).
        clock: seconds, for tests.
    """
    count = _core.topology().default_threads if threads is None else threads
    size = _default_buffer_bytes() if buffer_bytes is None else buffer_bytes
    size -= size % (8 * _MATRIX_COLUMNS)
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        buffer, huge_pages = _huge_buffer(size)
        methods = {
            name: size / _best_seconds(read, seconds / 3, clock)
            for name, read in _readers(buffer).items()
        }
    finally:
        torch.set_num_threads(before)
    method = max(methods, key=lambda name: methods[name])
    return ReadBandwidth(methods[method], method, methods, count, size, huge_pages)


@dataclass(frozen=True)
class Throughput:
    """The speed of an expert layer at one batch size.

    Attributes:
        tokens: tokens per call.
        seconds: median time of a call.
        calls: calls timed.
        weight_bytes: bytes of the experts that a call uses, each counted once.
        flops: multiplications and additions of a call's matrix products.
    """

    tokens: int
    seconds: float
    calls: int
    weight_bytes: int
    flops: int

    @property
    def tokens_per_second(self) -> float:
        """Tokens through this layer per second."""
        return self.tokens / self.seconds

    @property
    def bytes_per_second(self) -> float:
        """Weight bytes read per second, if each expert is read once per call."""
        return self.weight_bytes / self.seconds

    @property
    def flops_per_second(self) -> float:
        """Multiplications and additions per second."""
        return self.flops / self.seconds


def measure_throughput(
    experts: Experts,
    tokens: int,
    top_k: int,
    *,
    seconds: float = 0.5,
    seed: int = 0,
    clock: Callable[[], float] = time.perf_counter,
) -> Throughput:
    """Times calls of `tokens` bf16 tokens.

    The calls' routing goes round all experts, so that each call reads equally many bytes, and those
    that the caches are least likely to hold.

    Args:
        experts: the layer.
        tokens: tokens per call, at least 1.
        top_k: experts per token, at most the layer's.
        seconds: time to spend (two calls to warm up and five timed ones at least).
        seed: of the hidden states.
        clock: seconds, for tests.

    Raises:
        ValueError: `tokens` or `top_k` out of range.
    """
    if tokens < 1:
        raise ValueError(f"tokens: must be at least 1, got {tokens}")
    if not 1 <= top_k <= experts.num_experts:
        raise ValueError(f"top_k: expected 1..{experts.num_experts}, got {top_k}")
    generator = torch.Generator().manual_seed(seed)
    hidden_states = torch.randn(tokens, experts.hidden_size, generator=generator).bfloat16()
    weights = torch.full((tokens, top_k), 1 / top_k)
    slots = torch.arange(tokens * top_k).view(tokens, top_k)
    times: list[float] = []
    call = 0
    end = math.inf
    while len(times) < 5 or clock() < end:
        topk_ids = (slots + call * slots.numel()) % experts.num_experts
        start = clock()
        experts(hidden_states, topk_ids, weights)
        call += 1
        if call > 2:
            times.append(clock() - start)
        else:
            end = clock() + seconds
    used = min(experts.num_experts, slots.numel())
    weight_bytes = experts.nbytes * used // experts.num_experts
    flops = 2 * slots.numel() * 3 * experts.hidden_size * experts.intermediate_size
    return Throughput(tokens, statistics.median(times), len(times), weight_bytes, flops)


def _readers(buffer: torch.Tensor) -> dict[str, Callable[[], object]]:
    floats, longs = buffer.view(torch.float32), buffer.view(torch.int64)
    matrix = floats.view(-1, _MATRIX_COLUMNS)
    vector = torch.zeros(_MATRIX_COLUMNS)
    halves = floats.view(2, -1)
    return {
        "float32 matrix-vector product": lambda: matrix @ vector,
        "float32 dot product": lambda: torch.dot(halves[0], halves[1]),
        "int64 sum": lambda: longs.sum(),
    }


def _best_seconds(read: Callable[[], object], seconds: float, clock: Callable[[], float]) -> float:
    times: list[float] = []
    while len(times) < 3 or sum(times) < seconds:
        start = clock()
        read()
        times.append(clock() - start)
    return min(times)


def _huge_buffer(size: int) -> tuple[torch.Tensor, bool]:
    """Returns a touched buffer of zeros, and whether it lies on huge pages."""
    before = _kilobytes(_SMAPS, "AnonHugePages")
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a kernel without huge pages
            memory.madvise(mmap.MADV_HUGEPAGE)
    buffer = torch.frombuffer(memory, dtype=torch.uint8).zero_()
    gained = (_kilobytes(_SMAPS, "AnonHugePages") - before) * 1024
    # The first and the last pages may not be aligned to a huge one.
    return buffer, gained >= 0.9 * size


def _default_buffer_bytes() -> int:
    try:
        l3 = int(_L3_SIZE.read_text().strip().removesuffix("K")) * 1024
    except (OSError, ValueError):
        l3 = 0
    wanted = min(max(_BUFFER_PER_L3 * l3, _MIN_BUFFER_BYTES), _MAX_BUFFER_BYTES)
    available = _kilobytes(_MEMINFO, "MemAvailable") * 1024
    return min(wanted, available // 4) if available else wanted


def _kilobytes(path: Path, key: str) -> int:
    """A ``key:  123 kB`` line's number; 0 where file or line is missing."""
    try:
        lines = path.read_text().splitlines()
    except OSError:
        return 0
    for line in lines:
        name, _, value = line.partition(":")
        if name == key:
            return int(value.split()[0])
    return 0
