"""Measures up to how many tokens of an expert a variant's few-token kernels are faster.

The few-token kernels decode weights in registers. The many-token kernel decodes a panel of weights
into the cache first. Each variant has a constant that chooses between them. This module times both
for every number of tokens that both can take. Calls alternate, because a machine's speed drifts.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

from cpumoe import _core
from cpumoe.measure.benchmark import require_memory
from cpumoe.measure.layer_weights import LayerWeights, Progress, silent
from cpumoe.measure.throughput import CallTimer, make_workload, median_spread
from cpumoe.options import ExpertsOptions
from cpumoe.runtime import Runtime

TOKENS = (*range(1, 17), 20, 24, 32, 40, 48, 64, 96, 128)
# A variant's constant for few-token kernels that take any number (``kAnyTokens``, kernels/isa.h).
ANY_TOKENS = 2**31 - 1


@dataclass(frozen=True)
class Form:
    """The calls of one form, which is the few-token kernels or the many-token kernel.

    Attributes:
        seconds: time of the median call.
        low: the least median of a round.
        high: the greatest median of a round.
    """

    seconds: float
    low: float
    high: float


@dataclass(frozen=True)
class Comparison:
    """Both forms with equal calls. All tokens of a call go to the same experts.

    Attributes:
        tokens: number of tokens of each expert.
        few_token: the few-token kernels.
        many_token: the many-token kernel.
    """

    tokens: int
    few_token: Form
    many_token: Form

    @property
    def ratio(self) -> float:
        """Time of the few-token kernels over that of the many-token kernel."""
        return self.few_token.seconds / self.many_token.seconds

    @property
    def faster(self) -> str | None:
        """Name of the faster form; None: their rounds overlap."""
        if self.few_token.high < self.many_token.low:
            return "few-token"
        return "many-token" if self.many_token.high < self.few_token.low else None


@dataclass(frozen=True)
class Crossover:
    """One variant's comparisons, by number of tokens.

    Attributes:
        isa: the variant.
        compiled: the most tokens for which the variant uses its few-token kernels, or `ANY_TOKENS`.
        most: the most tokens that the variant's few-token kernels support, or `ANY_TOKENS`.
        rows: the comparisons.
    """

    isa: str
    compiled: int
    most: int
    rows: Sequence[Comparison]

    @property
    def best(self) -> int:
        """The crossover that loses the least time, summed as logarithms of ratios over all rows."""
        gains = itertools.accumulate((math.log(row.ratio) for row in self.rows), initial=0.0)
        counts = [0, *(row.tokens for row in self.rows)]
        return min(zip(counts, gains, strict=True), key=lambda item: item[1])[0]


def measure_crossover(
    weights: LayerWeights,
    isa: str,
    runtime: Runtime,
    *,
    seconds: float = 2.0,
    rounds: int = 5,
    progress: Progress = silent,
) -> Crossover:
    """Times both forms of a variant for the numbers `TOKENS` that its few-token kernels support.

    All tokens of a call go to the same experts. The next call uses other experts, so that caches do
    not hold them.

    Args:
        weights: the layer.
        isa: the variant.
        runtime: the threads.
        seconds: time to spend on each number of tokens.
        rounds: rounds to divide the time into; each calls both forms at least once.
        progress: called with each step.

    Raises:
        ValueError: memory is too small, or this CPU does not support the variant.
    """
    limits = _core.few_tokens(isa, "isa", weights.format)
    require_memory([weights], copies=2, threads=runtime.threads)
    counts = [tokens for tokens in TOKENS if tokens <= limits.most]
    few_token, many_token = (
        weights.pack(ExpertsOptions(runtime, isa=isa, few_token_limit=tokens), progress=progress)
        for tokens in (limits.most, 0)
    )
    cases = []
    for tokens in counts:
        work = make_workload(
            tokens,
            hidden_size=weights.hidden_size,
            num_experts=weights.num_experts,
            top_k=weights.top_k,
            routing="concentrated",
            seed=tokens,
        )
        cases.append(_Case(CallTimer(few_token, work), CallTimer(many_token, work)))
    for case in cases:
        case.warm_up()
    for number in range(rounds):
        for index, case in enumerate(cases):
            done = number * len(cases) + index
            progress(f"{isa}, tokens: {case.tokens}", done, rounds * len(cases))
            case.turn(seconds / rounds)
    return Crossover(isa, limits.crossover, limits.most, [case.result() for case in cases])


class _Case:
    def __init__(self, few_token: CallTimer, many_token: CallTimer) -> None:
        self.tokens = few_token.workload.tokens
        self._timers = (few_token, many_token)
        self._rounds: tuple[list[list[float]], list[list[float]]] = ([], [])

    def warm_up(self) -> None:
        for timer in self._timers:
            timer.call()

    def turn(self, seconds: float) -> None:
        order = (0, 1) if len(self._rounds[0]) % 2 == 0 else (1, 0)
        for form in order:
            self._rounds[form].append(self._timers[form].run(seconds / 2))

    def result(self) -> Comparison:
        few_token, many_token = (Form(*median_spread(rounds)) for rounds in self._rounds)
        return Comparison(self.tokens, few_token, many_token)
