"""Times a layer's calls in interleaved rounds and compares them with the machine's limits.

A machine's speed changes while one measures: other programs, clocks, temperature. Hence everything
that is to be compared takes its turn in every round, in another order each time; a number is the
median over all calls, and its spread the range of the rounds' medians. Limits are measured before
and after, on the same threads; the greater value counts, for a limit is what can be reached.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from cpumoe._packing import BATCH_PER_THREAD
from cpumoe.layer_weights import LayerWeights, Progress, silent
from cpumoe.limits import (
    ReadBandwidth,
    available_bytes,
    measure_dot_peak,
    measure_read_bandwidth,
)
from cpumoe.runtime import Runtime
from cpumoe.throughput import CallTimer, Workload, median_spread, relative_l2

# An untimed call goes before the timed ones of a turn where it takes less than this share of it.
_WARM_UP_SHARE = 0.25
# A limit that differs by more from start to end means that the machine was not quiet.
_QUIET = 0.15


@dataclass(frozen=True)
class Variant:
    """What computes: an ISA variant and one of its compute paths."""

    isa: str
    compute: str


@dataclass(frozen=True)
class Limit:
    """A limit of the machine per second, as measured before and after all calls."""

    start: float
    end: float

    @property
    def best(self) -> float:
        """The greater of the two."""
        return max(self.start, self.end)

    @property
    def steady(self) -> bool:
        """Whether the two are about the same."""
        return abs(self.start - self.end) <= _QUIET * self.best


@dataclass(frozen=True)
class Limits:
    """What the machine can do at best.

    Attributes:
        read: bytes read per second.
        dots: multiply-accumulates per second of each variant that can tell.
        buffer: how the bytes were read.
    """

    read: Limit
    dots: Mapping[Variant, Limit]
    buffer: ReadBandwidth

    @property
    def steady(self) -> bool:
        """Whether start and end agree."""
        return self.read.steady and all(limit.steady for limit in self.dots.values())


@dataclass(frozen=True)
class Timing:
    """The calls of one variant and one workload.

    Attributes:
        variant: what computed.
        tokens: tokens per call.
        seconds: the median call.
        low: the least median of a round.
        high: the greatest median of a round.
        rounds: rounds.
        calls: timed calls of all rounds.
        touched_experts: experts that a call read, on average.
        weight_bytes: bytes of these experts.
        macs: multiply-accumulates of a call.
        relative_l2: error of the first routing's result, where it is known.
    """

    variant: Variant
    tokens: int
    seconds: float
    low: float
    high: float
    rounds: int
    calls: int
    touched_experts: float
    weight_bytes: float
    macs: float
    relative_l2: float | None = None

    @property
    def spread(self) -> float:
        """Range of the rounds' medians over the median."""
        return (self.high - self.low) / self.seconds

    def share_of_read(self, limits: Limits) -> float:
        """The time that reading the weights takes at best, over the time taken."""
        return self.weight_bytes / limits.read.best / self.seconds

    def share_of_dots(self, limits: Limits) -> float | None:
        """The time that multiplying takes at best, over the time taken; None: no such limit."""
        limit = limits.dots.get(self.variant)
        return None if limit is None else self.macs / limit.best / self.seconds


@dataclass(frozen=True)
class Result:
    """Timings, variant by variant, and the limits that they are compared with."""

    timings: Sequence[Timing]
    limits: Limits


@dataclass
class _Case:
    variant: Variant
    timer: CallTimer
    warm_up: float = 0.0
    error: float | None = None
    rounds: list[list[float]] = field(default_factory=list)

    def prepare(self) -> None:
        """Makes the first call: it checks the result, and grows the runtime's scratch memory."""
        reference = self.timer.workload.reference
        if reference is not None:
            self.error = relative_l2(self.timer.call(), reference)
        self.warm_up = self.timer.run(0.0)[0]

    def turn(self, seconds: float) -> None:
        if self.warm_up < _WARM_UP_SHARE * seconds:
            self.timer.call()
        self.rounds.append(self.timer.run(seconds))

    def timing(self) -> Timing:
        work, experts = self.timer.workload, self.timer.experts
        median, low, high = median_spread(self.rounds)
        return Timing(
            variant=self.variant,
            tokens=work.tokens,
            seconds=median,
            low=low,
            high=high,
            rounds=len(self.rounds),
            calls=sum(map(len, self.rounds)),
            touched_experts=work.touched_experts,
            weight_bytes=work.weight_bytes(experts),
            macs=work.macs(experts),
            relative_l2=self.error,
        )


def run(
    weights: LayerWeights,
    workloads: Sequence[Workload],
    variants: Sequence[Variant],
    runtime: Runtime,
    *,
    seconds: float = 2.0,
    rounds: int = 5,
    batch_invariant: bool = False,
    progress: Progress = silent,
) -> Result:
    """Packs a layer for each variant and times each workload on each.

    Args:
        weights: the layer.
        workloads: the calls, one size each.
        variants: what to compare; all are in memory at the same time.
        runtime: the threads.
        seconds: time to spend on each workload of each variant.
        rounds: rounds to divide it into; each makes a call at least.
        batch_invariant: see `cpumoe.Experts`.
        progress: told what is being done.

    Raises:
        ValueError: too little memory, or what the engine does not accept.
    """
    require_memory(weights, len(variants), runtime.threads)
    cases = []
    for variant in variants:
        experts = weights.pack(
            variant.isa,
            runtime,
            compute=variant.compute,
            batch_invariant=batch_invariant,
            progress=progress,
        )
        cases += [_Case(variant, CallTimer(experts, work)) for work in workloads]
    start = _measure_limits(variants, runtime, progress)
    for index, case in enumerate(cases):
        progress("warming up", index, len(cases))
        case.prepare()
    _run_rounds(cases, seconds / rounds, rounds, progress)
    end = _measure_limits(variants, runtime, progress)
    read = Limit(start[0].bytes_per_second, end[0].bytes_per_second)
    dots = {variant: Limit(start[1][variant], end[1][variant]) for variant in start[1]}
    return Result([case.timing() for case in cases], Limits(read, dots, start[0]))


def _run_rounds(cases: Sequence[_Case], seconds: float, rounds: int, progress: Progress) -> None:
    expected = [round(1e3 * max(seconds, case.warm_up)) + 1 for case in cases]
    done, total = 0, rounds * sum(expected)
    for number in range(rounds):
        first = number * len(cases) // rounds
        for i in range(len(cases)):
            # Backwards every other time, so that no case always follows the same one.
            index = (first + (i if number % 2 == 0 else -i)) % len(cases)
            case = cases[index]
            where = f"{case.variant.isa}, tokens: {case.timer.workload.tokens}"
            progress(f"round {number + 1} of {rounds}, {where}", done, total)
            case.turn(seconds)
            done += expected[index]


def _measure_limits(
    variants: Sequence[Variant], runtime: Runtime, progress: Progress
) -> tuple[ReadBandwidth, dict[Variant, float]]:
    total = len(variants) + 1
    progress("measuring the memory's read bandwidth", 0, total)
    read = measure_read_bandwidth(runtime)
    dots = {}
    for index, variant in enumerate(variants, 1):
        progress(f"measuring the dot peak of {variant.isa}", index, total)
        peak = measure_dot_peak(runtime, variant.isa, variant.compute)
        if peak is not None:
            dots[variant] = peak.macs_per_second
    return read, dots


def require_memory(weights: LayerWeights, copies: int, threads: int) -> None:
    """Raises ValueError if so many packed copies of a layer do not fit the free memory."""
    expert = weights.experts[0].nbytes
    unpacked = min(weights.num_experts, BATCH_PER_THREAD * threads)
    needed = (copies * weights.num_experts + unpacked) * expert
    available = available_bytes()
    if available and needed > available:
        raise ValueError(
            f"{weights.num_experts} experts, packed {copies} times, take {needed / 1e9:.1f} GB of "
            f"memory, {available / 1e9:.1f} GB are available; ask for fewer experts or variants"
        )
