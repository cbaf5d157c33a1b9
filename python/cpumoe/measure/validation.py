"""Compares the kernels' results with the PyTorch reference, and each error with its bound."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from typing_extensions import override

from cpumoe._base.random import normal, uniform
from cpumoe._base.seed import check_seed
from cpumoe.checkpoint import ExpertWeights
from cpumoe.experts import Experts
from cpumoe.formats import QuantizedMatrix
from cpumoe.measure.layer_weights import LayerWeights, Progress, silent
from cpumoe.numerics.precision import PRECISIONS
from cpumoe.options import ExpertsOptions
from cpumoe.reference import experts_forward_with_bounds
from cpumoe.runtime import Runtime, default_runtime

# Results must be bit-identical for these numbers of threads.
THREAD_COUNTS = (1, 2, 5)
# The most tokens of a batch that are compared with the reference.
MAX_REFERENCE_TOKENS = 320


@dataclass(frozen=True)
class Case:
    """One batch, with its results and error bounds from the reference.

    Attributes:
        hidden_states: ``[tokens, hidden]``, random normal.
        topk_ids: int64 ``[tokens, top_k]``, random, distinct in each row.
        topk_weights: float32 ``[tokens, top_k]``, positive, each row's sum is 1.
        checked: int64 indices of the tokens that the reference computed.
        expected: float64 ``[checked, hidden]``, the reference's results.
        bounds: by precision, float64 ``[checked, hidden]``, bounds on a correct kernel's error.
    """

    hidden_states: torch.Tensor
    topk_ids: torch.Tensor
    topk_weights: torch.Tensor
    checked: torch.Tensor
    expected: torch.Tensor
    bounds: Mapping[str, torch.Tensor]

    @property
    def tokens(self) -> int:
        """Number of tokens in the batch."""
        return self.hidden_states.shape[0]

    def run(self, experts: Experts) -> torch.Tensor:
        """Returns the experts' output ``[tokens, hidden]``."""
        return experts(self.hidden_states, self.topk_ids, self.topk_weights)


@dataclass(frozen=True)
class WorstElement:
    """The output element whose error is largest in relation to its bound."""

    token: int
    column: int
    expected: float
    actual: float
    bound: float


@dataclass(frozen=True)
class CaseResult:
    """The errors of one variant and precision on one batch.

    Attributes:
        tokens: number of tokens in the batch.
        checked_tokens: number of tokens that were compared with the reference.
        worst_ratio: largest absolute error / bound; infinite where the output is NaN or infinite.
        relative_l2: 2-norm of the error over that of the expected output.
        max_abs: largest absolute error.
        bit_identical: whether all of `THREAD_COUNTS` and a repeated run gave identical bits.
        worst: the element with `worst_ratio`.
    """

    tokens: int
    checked_tokens: int
    worst_ratio: float
    relative_l2: float
    max_abs: float
    bit_identical: bool
    worst: WorstElement

    @property
    def passed(self) -> bool:
        """Whether all errors are within their bounds and all runs gave identical bits."""
        return self.worst_ratio <= 1 and self.bit_identical


@dataclass(frozen=True)
class IsaResult:
    """The results of one variant with one precision.

    Attributes:
        isa: the requested variant.
        ran: the variant that ran.
        precision: the precision.
        seconds: time for packing and all runs.
        inexact_exports: experts whose export differs from the checkpoint's bytes.
        cases: one result per batch size.
    """

    isa: str
    ran: str
    precision: str
    seconds: float
    inexact_exports: tuple[int, ...]
    cases: tuple[CaseResult, ...]

    @property
    def passed(self) -> bool:
        """Whether the requested variant ran, exported exactly and passed every case."""
        exact = self.ran == self.isa and not self.inexact_exports
        return exact and all(case.passed for case in self.cases)


@dataclass(frozen=True)
class Report:
    """The results of `validate`.

    Attributes:
        reference_seconds: time that the reference took.
        isas: one result per variant and precision.
    """

    reference_seconds: float
    isas: tuple[IsaResult, ...]

    @property
    def passed(self) -> bool:
        """Whether every variant passed."""
        return all(result.passed for result in self.isas)


def validate(
    weights: LayerWeights,
    tokens: Sequence[int],
    isas: Sequence[str],
    precisions: Sequence[str] = PRECISIONS[:1],
    *,
    dtype: torch.dtype = torch.bfloat16,
    seed: int = 0,
    threads: int | None = None,
    progress: Progress = silent,
) -> Report:
    """Runs `validate_isa` for each variant and precision against one reference.

    Args:
        weights: the layer.
        tokens: batch sizes.
        isas: names of the variants.
        precisions: names of the precisions.
        dtype: dtype of hidden states.
        seed: seed of hidden states and routing.
        threads: see `validate_isa`.
        progress: called with each step.

    Raises:
        ValueError: see `make_cases` and `validate_isa`.
    """
    start = time.perf_counter()
    cases = make_cases(weights, tokens, precisions, dtype=dtype, seed=seed, progress=progress)
    seconds = time.perf_counter() - start
    results = [
        validate_isa(weights, cases, isa, precision, threads=threads, progress=progress)
        for isa in isas
        for precision in precisions
    ]
    return Report(seconds, tuple(results))


def make_cases(
    weights: LayerWeights,
    tokens: Sequence[int],
    precisions: Sequence[str] = PRECISIONS[:1],
    *,
    dtype: torch.dtype = torch.bfloat16,
    seed: int = 0,
    progress: Progress = silent,
) -> list[Case]:
    """Draws a batch for each number of tokens, and computes the reference for all of them together.

    Hidden states and outputs have dtype `dtype`. Each case has bounds for each of the precisions.

    The reference is float64 and dequantizes each expert once. If a batch has more than
    `MAX_REFERENCE_TOKENS` tokens, the reference computes that many of them, evenly spread.

    Raises:
        ValueError: `tokens` is empty or has a number below 1, or the seed is not from 0 to
            2**63 - 1.
    """
    if not tokens or min(tokens) < 1:
        raise ValueError(f"tokens: expected numbers of at least 1, got {list(tokens)}")
    check_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    batches = [_random_batch(weights, count, dtype, generator) for count in tokens]
    checked = [_checked_tokens(count) for count in tokens]
    hidden_states, topk_ids, topk_weights = (
        torch.cat([batch[i][rows] for batch, rows in zip(batches, checked, strict=True)])
        for i in range(3)
    )
    used = len(set(topk_ids.flatten().tolist()))
    experts = weights.experts
    expected, bounds = experts_forward_with_bounds(
        hidden_states,
        topk_ids,
        topk_weights,
        _Announced([expert.gate for expert in experts], used, progress),
        [expert.up for expert in experts],
        [expert.down for expert in experts],
        format=weights.format,
        activation=weights.activation,
        gate_bias=[expert.gate_bias for expert in experts],
        up_bias=[expert.up_bias for expert in experts],
        down_bias=[expert.down_bias for expert in experts],
        precisions=precisions,
        output_dtype=dtype,
    )
    sizes = [len(rows) for rows in checked]
    wanted = torch.split(expected, sizes)
    limits = {precision: torch.split(bound, sizes) for precision, bound in bounds.items()}
    return [
        Case(*batch, rows, want, {precision: limit[i] for precision, limit in limits.items()})
        for i, (batch, rows, want) in enumerate(zip(batches, checked, wanted, strict=True))
    ]


def validate_isa(
    weights: LayerWeights,
    cases: Sequence[Case],
    isa: str,
    precision: str = PRECISIONS[0],
    *,
    threads: int | None = None,
    progress: Progress = silent,
) -> IsaResult:
    """Runs all cases on one variant, and checks errors, exports, threads and repeated runs.

    Args:
        weights: the layer.
        cases: cases from `make_cases` that have bounds for this precision.
        isa: the variant.
        precision: the precision.
        threads: threads of the run that is compared with the reference; default: as many as the
            default runtime has.
        progress: called for each batch, in tokens.

    Raises:
        ValueError: the variant is unknown, or this CPU does not support it.
    """
    start = time.perf_counter()
    main = default_runtime().threads if threads is None else threads
    others = [count for count in THREAD_COUNTS if count != main]
    total = sum(case.tokens for case in cases) * (2 + len(others))
    done = 0

    def run(experts: Experts) -> list[torch.Tensor]:
        nonlocal done
        outputs: list[torch.Tensor] = []
        for case in cases:
            progress(f"{isa}, {precision}: {case.tokens} tokens", done, total)
            outputs.append(case.run(experts))
            done += case.tokens
        return outputs

    with _quiet_runtime(main) if threads is None else Runtime(main) as runtime:
        experts = weights.pack(ExpertsOptions(runtime, precision, isa))
        ran = experts.isa
        outputs = run(experts)
        repeats = [run(experts)]
        inexact = tuple(i for i, e in enumerate(weights.experts) if not _same(experts.export(i), e))
    for count in others:
        with _quiet_runtime(count) as runtime:
            experts.runtime = runtime
            repeats.append(run(experts))
    results = tuple(
        _compare(case, precision, output, [repeat[i] for repeat in repeats])
        for i, (case, output) in enumerate(zip(cases, outputs, strict=True))
    )
    return IsaResult(isa, ran, precision, time.perf_counter() - start, inexact, results)


class _Announced(Sequence[QuantizedMatrix]):
    """Matrices that report each access, which shows the reference's progress."""

    def __init__(self, matrices: Sequence[QuantizedMatrix], used: int, progress: Progress) -> None:
        self._matrices = matrices
        self._used = used
        self._progress = progress
        self._asked = 0

    @override
    def __len__(self) -> int:
        return len(self._matrices)

    @override
    def __getitem__(self, index: int) -> QuantizedMatrix:  # type: ignore[override]
        self._progress("reference", self._asked, self._used)
        self._asked += 1
        return self._matrices[index]


def _random_batch(
    weights: LayerWeights, tokens: int, dtype: torch.dtype, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    hidden_states = normal(tokens, weights.hidden_size, generator=generator).to(dtype)
    keys = uniform(tokens, weights.num_experts, generator=generator)
    topk_ids = keys.topk(weights.top_k).indices
    # Routing weights are above zero, as a router's are.
    raw = 0.1 + uniform(tokens, weights.top_k, generator=generator)
    return hidden_states, topk_ids, raw / raw.sum(-1, keepdim=True)


def _checked_tokens(tokens: int) -> torch.Tensor:
    count = min(tokens, MAX_REFERENCE_TOKENS)
    return torch.linspace(0, tokens - 1, count, dtype=torch.float64, device="cpu").round().long()


def _quiet_runtime(threads: int) -> Runtime:
    with warnings.catch_warnings():
        # More threads than cores are intended here.
        warnings.simplefilter("ignore", RuntimeWarning)
        return Runtime(threads)


# The parts of a matrix.
_PARTS = ("codes", "scales", "factor")


def _same(exported: ExpertWeights, original: ExpertWeights) -> bool:
    tensors = (
        (getattr(exported, name), getattr(original, name))
        for name in ("gate_bias", "up_bias", "down_bias")
    )
    for name in ("gate", "up", "down"):
        ours, theirs = getattr(exported, name), getattr(original, name)
        parts = ((getattr(ours, part), getattr(theirs, part)) for part in _PARTS)
        if not all(_bits(a, b) for a, b in parts):
            return False
    return all(_bits(a, b) for a, b in tensors)


def _bits(a: torch.Tensor | None, b: torch.Tensor | None) -> bool:
    """Whether two tensors have the same shape, dtype and bytes, or neither exists."""
    if a is None or b is None:
        return a is b
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    # Flat, because a factor has no dimension whose size could change.
    return torch.equal(*(each.flatten().view(torch.uint8) for each in (a, b)))


def _compare(
    case: Case, precision: str, output: torch.Tensor, repeats: Sequence[torch.Tensor]
) -> CaseResult:
    bound = case.bounds[precision]
    actual = output[case.checked].double()
    error = (actual - case.expected).abs()
    ratio = (error / bound).nan_to_num(nan=math.inf, posinf=math.inf)
    row, column = divmod(int(ratio.argmax()), ratio.shape[1])
    worst = WorstElement(
        int(case.checked[row]),
        column,
        float(case.expected[row, column]),
        float(actual[row, column]),
        float(bound[row, column]),
    )
    return CaseResult(
        tokens=case.tokens,
        checked_tokens=len(case.checked),
        worst_ratio=float(ratio.max()),
        relative_l2=float(error.norm() / case.expected.norm().clamp_min(1e-300)),
        max_abs=float(error.max()),
        bit_identical=all(_bits(output, repeat) for repeat in repeats),
        worst=worst,
    )
