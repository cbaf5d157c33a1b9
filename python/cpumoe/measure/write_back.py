"""Times how fast experts are written to memory from which a GPU takes them.

A GPU that computes a long prompt by itself needs every expert of a layer (`Experts.export_into`).
Writing an expert reads its packed weights and writes about as many bytes, so it cannot be faster
than a copy of them. The memory's copy bandwidth is measured right before and after each turn.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import median

import torch

from cpumoe.experts import Experts
from cpumoe.formats import QuantizedMatrix
from cpumoe.measure.benchmark import require_memory
from cpumoe.measure.layer_weights import LayerWeights, Progress, silent
from cpumoe.measure.limits import MemoryReader
from cpumoe.measure.timing import Limit
from cpumoe.options import ExpertsOptions
from cpumoe.runtime import Runtime

_Slot = tuple[QuantizedMatrix, QuantizedMatrix, QuantizedMatrix]  # gate, up, down

# SGLang has memory for two experts: while the GPU takes one, the other is written.
_SLOTS = 2
# Seconds to spend on each measurement of the copy bandwidth (three copies at least).
_COPY_SECONDS = 0.05


@dataclass(frozen=True)
class Turn:
    """One round's writings of one variant.

    Attributes:
        seconds: time of the median expert.
        copy_bytes_per_second: the memory's copy bandwidth right before and right after.
    """

    seconds: float
    copy_bytes_per_second: tuple[float, float]


@dataclass(frozen=True)
class WriteBackTiming:
    """How fast one variant writes experts.

    Attributes:
        isa: the variant.
        seconds: time of the median expert.
        nbytes: bytes read and bytes written for an expert.
        calls: number of experts written.
        turns: one turn per round.
    """

    isa: str
    seconds: float
    nbytes: int
    calls: int
    turns: Sequence[Turn]

    @property
    def bytes_per_second(self) -> float:
        """Bytes read and written per second."""
        return self.nbytes / self.seconds

    @property
    def share_of_copy(self) -> float:
        """The shortest time for a copy of as many bytes, over the time taken; median of turns."""
        return median(
            self.nbytes / max(turn.copy_bytes_per_second) / turn.seconds for turn in self.turns
        )


@dataclass(frozen=True)
class WriteBackResult:
    """Timings by variant.

    Attributes:
        timings: one for each variant.
        copy: bytes that copying reads and writes per second.
        buffer_bytes: size of the buffer of which one half is copied to the other.
        huge_pages: whether the kernel backed that buffer with huge pages.
    """

    timings: Sequence[WriteBackTiming]
    copy: Limit
    buffer_bytes: int
    huge_pages: bool


@dataclass
class _Case:
    isa: str
    experts: Experts
    slots: Sequence[_Slot]
    clock: Callable[[], float]
    calls: list[float] = field(default_factory=list)
    turns: list[Turn] = field(default_factory=list)
    next: int = 0

    def write(self) -> float:
        """Writes the next expert and returns the seconds taken."""
        expert = self.next % self.experts.num_experts
        gate, up, down = self.slots[self.next % _SLOTS]
        self.next += 1
        start = self.clock()
        self.experts.export_into(expert, gate=gate, up=up, down=down)
        return self.clock() - start

    def turn(self, seconds: float, copies: Callable[[], float]) -> None:
        before = copies()
        self.write()  # untimed
        times: list[float] = []
        while not times or sum(times) < seconds:
            times.append(self.write())
        self.turns.append(Turn(median(times), (before, copies())))
        self.calls += times

    def timing(self, nbytes: int) -> WriteBackTiming:
        return WriteBackTiming(self.isa, median(self.calls), nbytes, len(self.calls), self.turns)


def run(
    weights: LayerWeights,
    isas: Sequence[str],
    runtime: Runtime,
    *,
    seconds: float = 2.0,
    rounds: int = 5,
    progress: Progress = silent,
    clock: Callable[[], float] = time.perf_counter,
) -> WriteBackResult:
    """Packs a layer for each variant and writes its experts one after the other, scales as bf16.

    Args:
        weights: the layer.
        isas: the variants, which take turns.
        runtime: the threads.
        seconds: time to spend on the experts of each variant.
        rounds: rounds to divide the time into; each writes at least two experts.
        progress: called with each step.
        clock: returns the time in seconds; tests pass their own.

    Raises:
        ValueError: memory is too small, or this CPU does not support a variant.
    """
    require_memory([weights], len(isas), runtime.threads)
    slots = [_slot(weights) for _ in range(_SLOTS)]
    cases = [
        _Case(isa, weights.pack(ExpertsOptions(runtime, isa=isa), progress=progress), slots, clock)
        for isa in isas
    ]
    memory = MemoryReader(runtime)
    copies: list[float] = []

    def measure_copy() -> float:
        copies.append(memory.measure_copy(seconds=_COPY_SECONDS))
        return copies[-1]

    for number in range(rounds):
        # Every other round runs backwards, so that no case always follows the same one.
        for index, case in enumerate(cases if number % 2 == 0 else reversed(cases)):
            done = number * len(cases) + index
            progress(f"{case.isa}, writing experts", done, rounds * len(cases))
            case.turn(seconds / rounds, measure_copy)
    read = weights.experts[0].nbytes
    written = sum(matrix.nbytes for matrix in slots[0])
    return WriteBackResult(
        [case.timing(read + written) for case in cases],
        Limit.of(copies),
        memory.buffer_bytes,
        memory.huge_pages,
    )


def _slot(weights: LayerWeights) -> _Slot:
    expert = weights.experts[0]

    def matrix(like: QuantizedMatrix) -> QuantizedMatrix:
        codes = torch.zeros_like(like.codes.view(torch.uint8)).view(like.codes.dtype)
        if like.scales is None:
            return QuantizedMatrix(codes)
        dtype = torch.bfloat16 if like.scales.dtype == torch.uint8 else like.scales.dtype
        scales = torch.zeros(like.scales.shape, dtype=dtype, device="cpu")
        return QuantizedMatrix(codes, scales, None if like.factor is None else like.factor.clone())

    return matrix(expert.gate), matrix(expert.up), matrix(expert.down)
