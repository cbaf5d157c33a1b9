"""Calls to time: hidden states, routings, and the bytes and products that they need."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch

from cpumoe._base.random import normal, uniform
from cpumoe.experts import Experts

Routing = Literal["balanced", "concentrated", "zipf"]
ROUTINGS: tuple[Routing, ...] = get_args(Routing)

# Calls have different routings, so that caches do not hold a call's experts from the call before.
NUM_ROUTINGS = 8


@dataclass(frozen=True)
class Workload:
    """Calls of one size, which are made one after the other, again and again.

    Attributes:
        hidden_states: ``[tokens, hidden]`` bf16.
        topk_ids: ``[calls, tokens, top_k]`` int32; -1: skipped.
        topk_weights: ``[tokens, top_k]`` fp32.
        reference: fp32 ``[tokens, hidden]``, the exact result of call 0, or None if it is unknown.
    """

    hidden_states: torch.Tensor
    topk_ids: torch.Tensor
    topk_weights: torch.Tensor
    reference: torch.Tensor | None = None

    @property
    def tokens(self) -> int:
        """Tokens per call."""
        return self.hidden_states.shape[0]

    @property
    def top_k(self) -> int:
        """Experts per token."""
        return self.topk_weights.shape[1]

    @property
    def touched_experts(self) -> float:
        """Number of experts that a call reads, on average over the calls."""
        return statistics.fmean(len(ids[ids >= 0].unique()) for ids in self.topk_ids)

    def weight_bytes(self, experts: Experts) -> float:
        """Bytes of the experts that a call reads, each counted once, on average over the calls."""
        return experts.nbytes / experts.num_experts * self.touched_experts

    def macs(self, experts: Experts) -> float:
        """Multiply-accumulates of a call's matrix products, on average over the calls."""
        pairs = int((self.topk_ids >= 0).sum()) / len(self.topk_ids)
        matrices = 3 if experts.activation.gated else 2
        return pairs * matrices * experts.hidden_size * experts.intermediate_size


def make_workload(
    tokens: int,
    *,
    hidden_size: int,
    num_experts: int,
    top_k: int,
    routing: Routing = "balanced",
    seed: int = 0,
) -> Workload:
    """Returns calls with random hidden states and `NUM_ROUTINGS` routings, drawn by a rule.

    Args:
        tokens: tokens per call, at least 1.
        hidden_size: width of the layer's hidden states.
        num_experts: number of the layer's experts.
        top_k: experts per token, all different; at most `num_experts`.
        routing: ``balanced``: all experts are equally likely. ``concentrated``: all tokens of a
            call go to the same experts. ``zipf``: an expert's popularity is 1/rank.
        seed: seed of the random numbers.

    Raises:
        ValueError: an argument is out of range.
    """
    if tokens < 1:
        raise ValueError(f"tokens: must be at least 1, got {tokens}")
    if not 1 <= top_k <= num_experts:
        raise ValueError(f"top_k: expected 1..{num_experts}, got {top_k}")
    if routing not in ROUTINGS:
        raise ValueError(f"routing: expected one of {', '.join(ROUTINGS)}, got {routing!r}")
    generator = torch.Generator().manual_seed(seed)
    hidden_states = normal(tokens, hidden_size, generator=generator).bfloat16()
    weights = uniform(tokens, top_k, generator=generator) + 0.1
    popularity = torch.ones(num_experts, dtype=torch.float32, device="cpu")
    if routing == "zipf":
        ranks = 1 + torch.randperm(num_experts, device="cpu", generator=generator)
        popularity = popularity / ranks
    rows = 1 if routing == "concentrated" else tokens
    draws = popularity.expand(NUM_ROUTINGS * rows, num_experts)
    ids = torch.multinomial(draws, top_k, generator=generator).int()
    return Workload(
        hidden_states,
        ids.view(NUM_ROUTINGS, rows, top_k).expand(-1, tokens, -1).contiguous(),
        weights / weights.sum(1, keepdim=True),
    )


class CallTimer:
    """Makes a workload's calls and measures their seconds.

    Args:
        experts: the layer.
        workload: the calls.
        clock: returns the time in seconds; tests pass their own.
    """

    def __init__(
        self,
        experts: Experts,
        workload: Workload,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        """Makes no call yet."""
        self.experts = experts
        self.workload = workload
        self._clock = clock
        self._next = 0

    def call(self) -> torch.Tensor:
        """Makes the next call and returns its output."""
        work, index = self.workload, self._next
        self._next = (index + 1) % len(work.topk_ids)
        return self.experts(work.hidden_states, work.topk_ids[index], work.topk_weights)

    def run(self, seconds: float, least: int = 1) -> list[float]:
        """Makes calls for about `seconds`, at least `least` calls; returns each call's seconds."""
        times: list[float] = []
        end = self._clock() + seconds
        while len(times) < least or self._clock() < end:
            start = self._clock()
            self.call()
            times.append(self._clock() - start)
        return times


def relative_l2(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Returns ``|actual - expected| / |expected|`` in the Euclidean norm, in double precision."""
    exact = expected.double()
    return float((actual.double() - exact).norm() / exact.norm())


def median_spread(rounds: Sequence[Sequence[float]]) -> tuple[float, float, float]:
    """Returns the median of all calls' seconds, and the least and greatest median of a round."""
    medians = [statistics.median(times) for times in rounds]
    return statistics.median(t for times in rounds for t in times), min(medians), max(medians)
