"""What the engine needs to know about a layer before it gets weights."""

from __future__ import annotations

from cpumoe import _core
from cpumoe._engine.arguments import integer
from cpumoe.numerics.precision import check_precision
from cpumoe.numerics.swiglu import SwiGLU

_ISAS_CROSSOVER = -1
_ANY_TOKENS = 2**31 - 1  # as many as the engine can count
_PRECISION = {
    "auto": _core.Precision.BF16,  # each fp32 call says whether it may be rounded to bf16
    "bf16": _core.Precision.BF16,
    "int8": _core.Precision.INT8,
}


def layer_config(
    *,
    num_experts: int,
    hidden_size: int,
    intermediate_size: int,
    swiglu: SwiGLU,
    has_bias: bool,
    precision: str,
    batch_invariant: bool,
    few_token_limit: int | None,
) -> _core.MoeConfig:
    """Returns a layer's configuration; `Experts` describes the arguments.

    Raises:
        TypeError: `few_token_limit` is neither an int nor None.
        ValueError: `precision` or `few_token_limit` has an unknown value.
    """
    check_precision(precision)
    return _core.MoeConfig(
        num_experts=num_experts,
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        alpha=swiglu.alpha,
        limit=swiglu.limit,
        up_offset=swiglu.up_offset,
        has_bias=has_bias,
        precision=_PRECISION[precision],
        batch_invariant=batch_invariant,
        few_token_limit=_crossover(few_token_limit),
    )


def _crossover(few_token_limit: int | None) -> int:
    if few_token_limit is None:
        return _ISAS_CROSSOVER
    limit = min(integer(few_token_limit, "few_token_limit"), _ANY_TOKENS)
    if limit < 0:
        raise ValueError(
            f"few_token_limit: expected 0 or more, or None for the variant's limit, got {limit}"
        )
    return limit
