"""Options for the experts of a model that is being loaded."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING

import cpumoe
from cpumoe._base.renamed import warn_renamed, with_old_arguments
from cpumoe._base.scalars import boolean
from cpumoe.formats import WEIGHT_FORMATS

if TYPE_CHECKING:
    from cpumoe.distributed import Ranks

HOST = "host"
NATIVE = "native"


@dataclass(frozen=True)
class ExpertsOptions(cpumoe.ExpertsOptions):
    """The fields of `cpumoe.ExpertsOptions` for each layer, and what concerns the whole model.

    Attributes:
        fp32_router: whether DeepSeek-V4's routers run in fp32, as in its reference implementation.
            transformers runs them in the model's dtype; in bf16, one token in twelve then goes to
            another set of experts.
        progress: whether to show a bar while packing; None: if standard error is a terminal.
        weight_format: the format to which ``experts_implementation="cpumoe"`` rounds weights that
            are in memory, such as "int4". This changes the model. None: weights are packed exactly,
            or refused. Experts that are read from a checkpoint keep the checkpoint's format.
        dense: who computes the dense layers and the RMS norms of a model whose experts are read
            from a checkpoint.
            None: cpumoe's `from_pretrained` chooses "native", or "host" if the layers have less
            than 16 MiB together or PyTorch has an accelerator; `enable` chooses "host".
            "host": transformers. "native": cpumoe, with the weights as the checkpoint stores them.
            A weight format, such as "fp8": cpumoe, with weights rounded to the format, which
            changes the model.
        attention: who computes attention in a model whose experts are read from a checkpoint.
            "host": transformers. "native": cpumoe, in each module where it computes what
            transformers computes. Sums are fp32, so that results differ by roundings.
        ranks: the processes that share the experts that are read from a checkpoint, of which this
            one is rank 0 (`cpumoe.distributed.join`). None: this process has all experts.

    Raises:
        TypeError, ValueError: see `cpumoe.ExpertsOptions`.
    """

    fp32_router: bool = True
    progress: bool | None = None
    weight_format: str | None = field(default=None, kw_only=True)
    dense: str | None = field(default=None, kw_only=True)
    attention: str = field(default=HOST, kw_only=True)
    ranks: Ranks | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        """Checks the values, before a model is loaded."""
        super().__post_init__()
        boolean(self.fp32_router, "fp32_router")
        if self.progress is not None:
            boolean(self.progress, "progress")
        if self.weight_format is not None and self.weight_format not in WEIGHT_FORMATS:
            raise ValueError(
                f"weight_format: expected {', '.join(WEIGHT_FORMATS)} or None, got "
                f"{self.weight_format!r}"
            )
        if self.dense not in (None, HOST, NATIVE, *WEIGHT_FORMATS):
            raise ValueError(
                f"dense: expected {HOST}, {NATIVE} or a weight format "
                f"({', '.join(WEIGHT_FORMATS)}), got {self.dense!r}"
            )
        if self.attention not in (HOST, NATIVE):
            raise ValueError(f"attention: expected {HOST} or {NATIVE}, got {self.attention!r}")

    @property
    def compute(self) -> str:
        """The old name of `precision`. Using it warns."""
        warn_renamed("ExpertsOptions.compute", "ExpertsOptions.precision", stacklevel=2)
        return self.precision


ExpertsOptions.__init__ = with_old_arguments("compute")(  # type: ignore[method-assign]
    ExpertsOptions.__init__
)


def whole_options(options: cpumoe.ExpertsOptions | None) -> ExpertsOptions:
    """Returns options for a whole model: those given, or with defaults for what they lack.

    Raises:
        TypeError: `options` are no options.
    """
    if options is None:
        return ExpertsOptions()
    if isinstance(options, ExpertsOptions):
        return options
    if not isinstance(options, cpumoe.ExpertsOptions):
        raise TypeError(f"options: expected ExpertsOptions, got {type(options).__name__}")
    known = {each.name: getattr(options, each.name) for each in fields(cpumoe.ExpertsOptions)}
    return ExpertsOptions(**known)


# transformers makes quantizers itself and cannot pass them these options, so they are kept here.
_current: ContextVar[ExpertsOptions | None] = ContextVar("cpumoe_experts_options", default=None)
_default: ExpertsOptions | None = None


def current_options() -> ExpertsOptions:
    """Returns the options of the load in progress, or else those of `enable`.

    Raises:
        ValueError: there are none, and ``CPUMOE_ISA`` names no variant that runs here.
    """
    return _current.get() or _default or ExpertsOptions()


def set_default_options(options: ExpertsOptions | None) -> None:
    """Sets the options of loads without options; None: restores the initial ones."""
    global _default
    _default = options


@contextmanager
def loading_with(options: ExpertsOptions) -> Iterator[None]:
    """Applies `options` to loads inside the block, in this thread."""
    token = _current.set(options)
    try:
        yield
    finally:
        _current.reset(token)
