"""Times of a layer's calls, and the limits of the machine that they are compared with."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median

from cpumoe.measure.limits import ReadBandwidth
from cpumoe.placement import Placement

# If a limit changes by more, the machine was not quiet.
_QUIET = 0.15


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
class NodeLimits:
    """A NUMA node's part of a runtime and of its calls.

    Attributes:
        node: the node's number.
        threads: number of its threads.
        part_of_threads: these, as a part of the runtime's threads, 0 to 1.
        part_of_weights: the part of each layer's weights that lies in the node's memory, 0 to 1.
        bytes_per_second: rate at which its threads read its memory while other nodes are idle.
    """

    node: int
    threads: int
    part_of_threads: float
    part_of_weights: float
    bytes_per_second: float


@dataclass(frozen=True)
class Threads:
    """What calls ran on, and what it can do at best.

    Attributes:
        count: number of threads.
        limits: the limits of all threads together.
        placement: where the weights of one of the layers lie.
        nodes: the NUMA nodes; none if the machine counts as one node.
    """

    count: int
    limits: Limits
    placement: Placement
    nodes: Sequence[NodeLimits]


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
        runtime: index of the runtime that computed.
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
    runtime: int = 0

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

    def node_shares(self, node: NodeLimits) -> tuple[float, float | None]:
        """What `share_of_read` and `share_of_dots` are for a node: its weights, its threads."""
        least = self.weight_bytes * node.part_of_weights / node.bytes_per_second
        dots = self.share_of_dots
        if dots is not None:
            dots *= node.part_of_weights / node.part_of_threads
        return least / self.seconds, dots

    def speed_against(self, other: Timing) -> float:
        """The other's time over this one's; the median of the rounds, in which both took turns."""
        pairs = zip(other.turns, self.turns, strict=True)
        return median(theirs.seconds / own.seconds for theirs, own in pairs)


@dataclass(frozen=True)
class Result:
    """Timings by variant, workload, runtime and format, and what each runtime can do at best."""

    timings: Sequence[Timing]
    threads: Sequence[Threads]  # by runtime
