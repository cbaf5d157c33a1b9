"""How a layer's experts are computed, said once for everything that packs experts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace

from typing_extensions import TypedDict

from cpumoe._base.scalars import boolean, integer
from cpumoe.isa import select_isa
from cpumoe.numerics.precision import PRECISIONS, check_precision
from cpumoe.runtime import Runtime, check_runtime


@dataclass(frozen=True)
class ExpertsOptions:
    """How a layer's experts are computed. Layers of one model usually share one object.

    Attributes:
        runtime: the threads to run on; None: the process's shared runtime.
        precision: the lowest precision to which activations may be rounded: "auto" (as the hidden
            states' dtype asks), "bf16" or "int8". `cpumoe.Experts` describes them.
        isa: the variant to use; None: `cpumoe.isa()`.
        batch_invariant: whether one kernel takes any number of tokens, so that a token's result
            does not depend on the rest of the batch. This is slower for few tokens. It changes
            nothing where one kernel takes any number of tokens anyway: on avx512_vnni and
            avx2_vnni, on avx512_bf16 and amx for fp32 hidden states with "auto", and with "int8" on
            all variants except amx.
        few_token_limit: the most tokens of one expert that the few-token kernels take. The kernels
            may support fewer. None: the variant's constant. ``cpumoe bench --tune`` finds the best
            limit for this machine. The limit has no effect with `batch_invariant`, nor where one
            kernel takes any number of tokens anyway.

    Raises:
        TypeError: a value is of another type.
        ValueError: the precision is unknown, the limit is negative, or this CPU cannot run the
            variant.
    """

    runtime: Runtime | None = None
    precision: str = PRECISIONS[0]
    isa: str | None = None
    batch_invariant: bool = False
    few_token_limit: int | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        """Checks the values, before a layer or a model is loaded."""
        check_runtime(self.runtime)
        check_precision(self.precision)
        select_isa(self.isa)
        boolean(self.batch_invariant, "batch_invariant")
        limit = self.few_token_limit
        if limit is not None and integer(limit, "few_token_limit") < 0:
            raise ValueError(
                f"few_token_limit: expected 0 or more, or None for the variant's limit, got {limit}"
            )


class ExpertsKeywords(TypedDict, total=False):
    """The fields of `ExpertsOptions` as keyword arguments."""

    runtime: Runtime | None
    precision: str
    isa: str | None
    batch_invariant: bool
    few_token_limit: int | None


def with_overrides(
    options: ExpertsOptions | None, overrides: ExpertsKeywords, function: str
) -> ExpertsOptions:
    """Returns `options`, or the default ones, with the values of keyword arguments.

    Args:
        options: the options; None: the default ones.
        overrides: the keyword arguments of a function.
        function: the function's name, for error messages.

    Raises:
        TypeError: a keyword names no option, or `options` are no `ExpertsOptions`.
        ValueError: see `ExpertsOptions`.
    """
    if options is not None and not isinstance(options, ExpertsOptions):
        raise TypeError(
            f"{function}(): options: expected cpumoe.ExpertsOptions, got {type(options).__name__}"
        )
    known = [option.name for option in fields(ExpertsOptions)]
    values: Mapping[str, object] = overrides
    unknown = [name for name in values if name not in known]
    if unknown:
        raise TypeError(
            f"{function}() got an unexpected keyword argument {unknown[0]!r}; options are "
            f"{', '.join(known)}"
        )
    if options is None:
        return ExpertsOptions(**overrides)
    return replace(options, **overrides) if overrides else options
