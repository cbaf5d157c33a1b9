"""What the engine needs to know about a layer before it gets weights."""

from __future__ import annotations

from collections.abc import Sequence

from cpumoe import _core
from cpumoe._base.scalars import boolean, integer
from cpumoe.numerics.glu import GLU, SwiGLU

_ISAS_CROSSOVER = -1
_ANY_TOKENS = 2**31 - 1  # as many as the engine can count
_LARGEST_SIZE = 2**63 - 1  # that the engine can be asked for
_GLU_FUNCTION = {
    "silu": _core.GluFunction.SILU,
    "gelu": _core.GluFunction.GELU,
    "gelu_tanh": _core.GluFunction.GELU_TANH,
    "relu": _core.GluFunction.RELU,
    "relu2": _core.GluFunction.RELU2,
    "softcapped_silu": _core.GluFunction.SOFTCAPPED_SILU,
}
_PRECISION = {
    "auto": _core.Precision.BF16,  # each fp32 call says whether it may be rounded to bf16
    "bf16": _core.Precision.BF16,
    "int8": _core.Precision.INT8,
}


def checked_activation(activation: GLU | None) -> GLU:
    """Returns the activation of experts; None is the plain SwiGLU.

    Raises:
        TypeError: `activation` is something else.
    """
    if activation is not None and not isinstance(activation, GLU):
        raise TypeError(
            f"activation: expected a cpumoe.SwiGLU, another cpumoe.GLU, or None for the default, "
            f"got {activation!r}"
        )
    return activation or SwiGLU()


def layer_config(
    *,
    num_experts: int,
    hidden_size: int,
    intermediate_size: int,
    activation: GLU,
    has_bias: bool,
    precision: str,
    batch_invariant: bool,
    few_token_limit: int | None,
    copy_of: Sequence[int],
) -> _core.MoeConfig:
    """Returns a layer's configuration; `Experts` and `ExpertsOptions` describe the arguments.

    `ExpertsOptions` has checked precision and kernels. `copy_of` has the packed copy of each
    expert, or nothing if each has its own.

    Raises:
        TypeError: a size is not an int, or `has_bias` is not a bool.
        ValueError: the engine does not support a size.
    """
    return _core.MoeConfig(
        num_experts=_size(num_experts, "num_experts"),
        hidden_size=_size(hidden_size, "hidden_size"),
        intermediate_size=_size(intermediate_size, "intermediate_size"),
        glu_function=_GLU_FUNCTION[activation.function],
        alpha=activation.alpha,
        limit=activation.limit,
        up_offset=activation.up_offset,
        gate_cap=activation.gate_cap,
        up_cap=activation.up_cap,
        gated=activation.gated,
        has_bias=boolean(has_bias, "has_bias"),
        precision=engine_precision(precision),
        batch_invariant=batch_invariant,
        few_token_limit=few_tokens(few_token_limit),
        copy_of=list(copy_of),
    )


def _size(value: int, name: str) -> int:
    size = integer(value, name)
    if size > _LARGEST_SIZE:  # the engine's own limits are lower
        raise ValueError(f"{name}: expected at most {_LARGEST_SIZE}, got {size}")
    return size


def engine_precision(precision: str) -> _core.Precision:
    """Returns the engine's name of one of `PRECISIONS`."""
    return _PRECISION[precision]


def few_tokens(limit: int | None) -> int:
    """Returns the engine's form of `ExpertsOptions.few_token_limit`."""
    return _ISAS_CROSSOVER if limit is None else min(int(limit), _ANY_TOKENS)
