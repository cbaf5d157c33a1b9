"""Times a layer's calls in interleaved rounds and compares them with the machine's limits.

A machine's speed changes during a measurement, because of other programs, clocks and temperature.
Hence all variants, formats and runtimes take a turn in every round, in another order each time. A
result is the median over all calls, and its spread is the range of the turns' medians. The
machine's limits are measured on the same threads right before and after a turn. The turn is
compared with the greater of the two values, because a limit is what can be reached.

Each NUMA node of a runtime has a limit of its own, because it reads its own share of the weights.
"""

from __future__ import annotations

from collections.abc import Sequence
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
    measure_own_bandwidths,
)
from cpumoe.measure.throughput import CallTimer, Workload, relative_l2
from cpumoe.measure.timing import (
    Limit,
    Limits,
    Multiplier,
    NodeLimits,
    Result,
    Threads,
    Timing,
    Turn,
    Variant,
)
from cpumoe.options import ExpertsOptions
from cpumoe.placement import Placement
from cpumoe.runtime import Runtime

# A turn begins with an untimed call if that takes less than this share of the turn.
_WARM_UP_SHARE = 0.25
# Seconds to spend on each measurement of a limit (three runs at least).
_LIMIT_SECONDS = 0.05


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
    runtime: int
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
            runtime=self.runtime,
        )


def run(
    layers: Sequence[LayerWeights],
    workloads: Sequence[Workload],
    variants: Sequence[Variant],
    runtimes: Sequence[Runtime],
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
        variants: the variants to compare.
        runtimes: the threads to compare. The layers of all variants and runtimes are in memory
            together.
        seconds: time to spend on the calls of each workload of each layer, variant and runtime.
        rounds: rounds to divide the time into; each makes at least one call.
        batch_invariant: see `cpumoe.ExpertsOptions`.
        progress: called with each step.

    Raises:
        ValueError: memory is too small, or the engine refuses an argument.
    """
    copies = len(variants) * len(runtimes)
    require_memory(layers, copies, max(runtime.threads for runtime in runtimes))
    cases = []
    for variant in variants:
        packed = []  # by runtime and format
        for runtime in runtimes:
            options = ExpertsOptions(runtime, variant.precision, variant.isa, batch_invariant)
            packed.append([weights.pack(options, progress=progress) for weights in layers])
        cases += [
            _Case(variant, CallTimer(experts, work), index)
            for work in workloads
            for index, each in enumerate(packed)
            for experts in each
        ]
    for index, case in enumerate(cases):
        progress("warming up", index, len(cases))
        case.prepare()
    meters = [_LimitMeter(runtime) for runtime in runtimes]
    before = [_own_bandwidths(runtime, progress) for runtime in runtimes]
    _run_rounds(cases, meters, seconds / rounds, rounds, progress)
    after = [_own_bandwidths(runtime, progress) for runtime in runtimes]
    threads = []
    for index, runtime in enumerate(runtimes):
        own = [case for case in cases if case.runtime == index]
        limits = _limits(own, meters[index].reads)
        rates = [max(pair) for pair in zip(before[index], after[index], strict=True)]
        threads.append(_threads(runtime, limits, own[0].timer.experts.placement, rates))
    return Result([case.timing() for case in cases], threads)


def _own_bandwidths(runtime: Runtime, progress: Progress) -> list[float]:
    if runtime.nodes is not None:
        progress("measuring the bandwidth of NUMA nodes", 0, 1)
    return measure_own_bandwidths(runtime, seconds=_LIMIT_SECONDS)


def _threads(
    runtime: Runtime, limits: Limits, placement: Placement, own_bandwidths: Sequence[float]
) -> Threads:
    nodes = [
        NodeLimits(
            node=node.id,
            threads=node.threads,
            part_of_threads=node.threads / runtime.threads,
            part_of_weights=nbytes / sum(placement.nbytes),
            bytes_per_second=rate,
        )
        for node, nbytes, rate in zip(
            runtime.core.nodes, placement.nbytes, own_bandwidths, strict=False
        )
    ]
    return Threads(runtime.threads, limits, placement, nodes)


def _run_rounds(
    cases: Sequence[_Case],
    meters: Sequence[_LimitMeter],
    seconds: float,
    rounds: int,
    progress: Progress,
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
            case.turn(seconds, meters[case.runtime])
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
            "formats, variants or nodes"
        )
