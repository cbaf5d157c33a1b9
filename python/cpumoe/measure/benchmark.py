"""Times a layer's calls in interleaved rounds and compares them with the machine's limits.

A machine's speed changes during a measurement, because of other programs, clocks and temperature.
Hence all variants and formats take a turn in every round, in another order each time. A result is
the median over all calls, and its spread is the range of the turns' medians. The machine's limits
are measured on the same threads right before and after a turn. The turn is compared with the
greater of the two values, because a limit is what can be reached.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import astuple, dataclass, field
from statistics import median

from cpumoe._engine.packing import BATCH_PER_THREAD
from cpumoe.measure.layer_weights import LayerWeights, Progress, silent
from cpumoe.measure.limits import (
    DotPeak,
    MemoryReader,
    ReadBandwidth,
    available_bytes,
    measure_dot_peak,
)
from cpumoe.measure.throughput import CallTimer, Workload, relative_l2
from cpumoe.options import ExpertsOptions
from cpumoe.placement import Placement
from cpumoe.runtime import Runtime

# A turn begins with an untimed call if that takes less than this share of the turn.
_WARM_UP_SHARE = 0.25
# If a limit changes by more, the machine was not quiet.
_QUIET = 0.15
# Seconds to spend on each measurement of a limit (three runs at least).
_LIMIT_SECONDS = 0.05


@dataclass(frozen=True)
class Variant:
    """What is timed: an ISA variant and a precision."""

    isa: str
    precision: str


@dataclass(frozen=True)
class Multiplier:
    """What decides which instruction multiplies: variant, weight format and precision."""

    isa: str
    format: str
    precision: str


@dataclass(frozen=True)
class Limit:
    """A limit of the machine, per second.

    Attributes:
        best: the greatest measured value.
        least: the smallest measured value.
    """

    best: float
    least: float

    @classmethod
    def of(cls, values: Iterable[float]) -> Limit:
        """Returns the range of the measured values."""
        values = list(values)
        return cls(max(values), min(values))

    @property
    def steady(self) -> bool:
        """Whether all values are about the same."""
        return self.best - self.least <= _QUIET * self.best


@dataclass(frozen=True)
class Limits:
    """What the machine can do at best.

    Attributes:
        reads: every measurement of the memory's read bandwidth.
        dots: multiply-accumulates per second of all calls that say which instruction multiplies.
    """

    reads: Sequence[ReadBandwidth]
    dots: Mapping[Multiplier, Limit]

    @property
    def read(self) -> Limit:
        """Bytes read per second."""
        return Limit.of(read.bytes_per_second for read in self.reads)

    @property
    def steady(self) -> bool:
        """Whether no limit changed much."""
        return self.read.steady and all(limit.steady for limit in self.dots.values())


@dataclass(frozen=True)
class Turn:
    """One round's calls of one variant and one workload.

    Attributes:
        seconds: time of the median call.
        bytes_per_second: the memory's read bandwidth right before and right after these calls.
        macs_per_second: the rate of multiply-accumulates right before and right after these calls;
            None: the variant cannot measure it.
    """

    seconds: float
    bytes_per_second: tuple[float, float]
    macs_per_second: tuple[float, float] | None

    def share_of_read(self, weight_bytes: float) -> float:
        """The shortest time in which these bytes can be read, over the time taken."""
        return weight_bytes / max(self.bytes_per_second) / self.seconds

    def share_of_dots(self, macs: float) -> float | None:
        """The shortest time for these multiply-accumulates, over the time taken; None: unknown."""
        return macs / max(self.macs_per_second) / self.seconds if self.macs_per_second else None


@dataclass(frozen=True)
class Timing:
    """The calls of one variant, one weight format and one workload.

    Attributes:
        variant: the variant that computed.
        format: name of the weight format.
        tokens: tokens per call.
        seconds: time of the median call.
        turns: one turn per round.
        calls: number of timed calls in all rounds.
        touched_experts: number of experts that a call read, on average.
        weight_bytes: bytes of these experts.
        macs: multiply-accumulates of a call.
        relative_l2: error of the result for the first routing; None: no reference is known.
    """

    variant: Variant
    format: str
    tokens: int
    seconds: float
    turns: Sequence[Turn]
    calls: int
    touched_experts: float
    weight_bytes: float
    macs: float
    relative_l2: float | None = None

    @property
    def low(self) -> float:
        """The least median of a turn."""
        return min(turn.seconds for turn in self.turns)

    @property
    def high(self) -> float:
        """The greatest median of a turn."""
        return max(turn.seconds for turn in self.turns)

    @property
    def spread(self) -> float:
        """Range of the turns' medians over the median."""
        return (self.high - self.low) / self.seconds

    @property
    def share_of_read(self) -> float:
        """The shortest time for reading the weights, over the time taken; median of the turns."""
        return median(turn.share_of_read(self.weight_bytes) for turn in self.turns)

    @property
    def share_of_dots(self) -> float | None:
        """The shortest time for the multiply-accumulates, over the time taken; None: unknown."""
        shares = [turn.share_of_dots(self.macs) for turn in self.turns]
        known = [share for share in shares if share is not None]
        return median(known) if known else None

    def speed_against(self, other: Timing) -> float:
        """The other's time over this one's; the median of the rounds, in which both took turns."""
        pairs = zip(other.turns, self.turns, strict=True)
        return median(theirs.seconds / own.seconds for theirs, own in pairs)


@dataclass(frozen=True)
class Result:
    """Timings by variant, workload and format, and the limits that they are compared with."""

    timings: Sequence[Timing]
    limits: Limits
    placement: Placement  # of one of the layers


class _LimitMeter:
    """Measures the machine's limits, each at most once between two turns."""

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime
        self._reader = MemoryReader(runtime)
        self._read: ReadBandwidth | None = None
        self._peaks: dict[Multiplier, DotPeak | None] = {}
        self.reads: list[ReadBandwidth] = []

    def now(self, multiplier: Multiplier) -> tuple[ReadBandwidth, DotPeak | None]:
        if self._read is None:
            self._read = self._reader.measure(seconds=_LIMIT_SECONDS)
            self.reads.append(self._read)
        if multiplier not in self._peaks:
            self._peaks[multiplier] = measure_dot_peak(
                self._runtime, *astuple(multiplier), seconds=_LIMIT_SECONDS
            )
        return self._read, self._peaks[multiplier]

    def outdate(self) -> None:
        self._read = None
        self._peaks.clear()


@dataclass
class _Case:
    variant: Variant
    timer: CallTimer
    warm_up: float = 0.0
    error: float | None = None
    calls: list[float] = field(default_factory=list)
    turns: list[Turn] = field(default_factory=list)

    @property
    def multiplier(self) -> Multiplier:
        return Multiplier(self.variant.isa, self.timer.experts.format, self.variant.precision)

    def prepare(self) -> None:
        """Makes the first call: it checks the result, and grows the runtime's scratch memory."""
        reference = self.timer.workload.reference
        if reference is not None:
            self.error = relative_l2(self.timer.call(), reference)
        self.warm_up = self.timer.run(0.0)[0]

    def turn(self, seconds: float, meter: _LimitMeter) -> None:
        read, peak = meter.now(self.multiplier)
        if self.warm_up < _WARM_UP_SHARE * seconds:
            self.timer.call()
        calls = self.timer.run(seconds)
        meter.outdate()
        read_after, peak_after = meter.now(self.multiplier)
        macs = None
        if peak is not None and peak_after is not None:
            macs = peak.macs_per_second, peak_after.macs_per_second
        self.turns.append(
            Turn(median(calls), (read.bytes_per_second, read_after.bytes_per_second), macs)
        )
        self.calls += calls

    def timing(self) -> Timing:
        work, experts = self.timer.workload, self.timer.experts
        return Timing(
            variant=self.variant,
            format=experts.format,
            tokens=work.tokens,
            seconds=median(self.calls),
            turns=self.turns,
            calls=len(self.calls),
            touched_experts=work.touched_experts,
            weight_bytes=work.weight_bytes(experts),
            macs=work.macs(experts),
            relative_l2=self.error,
        )


def run(
    layers: Sequence[LayerWeights],
    workloads: Sequence[Workload],
    variants: Sequence[Variant],
    runtime: Runtime,
    *,
    seconds: float = 2.0,
    rounds: int = 5,
    batch_invariant: bool = False,
    progress: Progress = silent,
) -> Result:
    """Packs layers for each variant and times each workload on each.

    Args:
        layers: layers of equal sizes, one for each weight format to compare.
        workloads: the calls, one size each.
        variants: the variants to compare. All layers of all variants are in memory together.
        runtime: the threads.
        seconds: time to spend on the calls of each workload of each layer and variant.
        rounds: rounds to divide the time into; each makes at least one call.
        batch_invariant: see `cpumoe.ExpertsOptions`.
        progress: called with each step.

    Raises:
        ValueError: memory is too small, or the engine refuses an argument.
    """
    require_memory(layers, len(variants), runtime.threads)
    cases = []
    for variant in variants:
        options = ExpertsOptions(runtime, variant.precision, variant.isa, batch_invariant)
        packed = [weights.pack(options, progress=progress) for weights in layers]
        timers = [CallTimer(experts, work) for work in workloads for experts in packed]
        cases += [_Case(variant, timer) for timer in timers]
    for index, case in enumerate(cases):
        progress("warming up", index, len(cases))
        case.prepare()
    meter = _LimitMeter(runtime)
    _run_rounds(cases, meter, seconds / rounds, rounds, progress)
    timings = [case.timing() for case in cases]
    return Result(timings, _limits(cases, meter.reads), cases[0].timer.experts.placement)


def _run_rounds(
    cases: Sequence[_Case], meter: _LimitMeter, seconds: float, rounds: int, progress: Progress
) -> None:
    beside = 2 * _LIMIT_SECONDS
    expected = [round(1e3 * (max(seconds, case.warm_up) + beside)) + 1 for case in cases]
    done, total = 0, rounds * sum(expected)
    for number in range(rounds):
        first = number * len(cases) // rounds
        for i in range(len(cases)):
            # Every other round runs backwards, so that no case always follows the same one.
            index = (first + (i if number % 2 == 0 else -i)) % len(cases)
            case = cases[index]
            names = f"{case.variant.isa}, {case.timer.experts.format}"
            where = f"{names}, tokens: {case.timer.workload.tokens}"
            progress(f"round {number + 1} of {rounds}, {where}", done, total)
            case.turn(seconds, meter)
            done += expected[index]


def _limits(cases: Sequence[_Case], reads: Sequence[ReadBandwidth]) -> Limits:
    dots: dict[Multiplier, list[float]] = {}
    for case in cases:
        for turn in case.turns:
            if turn.macs_per_second is not None:
                dots.setdefault(case.multiplier, []).extend(turn.macs_per_second)
    return Limits(reads, {multiplier: Limit.of(values) for multiplier, values in dots.items()})


def require_memory(layers: Sequence[LayerWeights], copies: int, threads: int) -> None:
    """Raises ValueError if `copies` packed copies of each layer do not fit into free memory."""
    expert_bytes = [weights.experts[0].nbytes for weights in layers]
    count = layers[0].num_experts
    packed = copies * sum(expert_bytes)  # for each expert
    unpacked = min(count, BATCH_PER_THREAD * threads) * max(expert_bytes)
    needed = count * packed + unpacked
    available = available_bytes()
    if available and needed > available:
        formats = ", ".join(weights.format for weights in layers)
        times = "once" if copies == 1 else f"{copies} times"
        fitting = max(0, available - unpacked) // packed
        raise ValueError(
            f"{count} experts in {formats}, packed {times}, need {needed / 1e9:.1f} GB of memory; "
            f"{available / 1e9:.1f} GB are available; ask for fewer experts ({fitting} fit), "
            "formats or variants"
        )
