"""How experts are made for a model that is being loaded."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

from cpumoe._renamed import warn_renamed, with_old_arguments
from cpumoe.isa import select_isa
from cpumoe.precision import PRECISIONS, check_precision
from cpumoe.runtime import Runtime


@dataclass(frozen=True)
class ExpertsOptions:
    """What `cpumoe.Experts` is told for each layer, and how the host routes to them.

    Attributes:
        runtime: threads to run on; None: the process's shared runtime.
        precision: "auto", "bf16" or "int8", see `cpumoe.Experts`.
        isa: the variant; None: `cpumoe.isa()`.
        batch_invariant: see `cpumoe.Experts.from_checkpoint`.
        fp32_router: run DeepSeek-V4's routers in fp32, as its reference implementation does. The
            host's own code runs them in the model's dtype, and in bf16 then sends one token in
            twelve to another set of experts.
        progress: show a bar while packing; None: if standard error is a terminal.

    Raises:
        ValueError: an unknown precision or variant.
    """

    runtime: Runtime | None = None
    precision: str = PRECISIONS[0]
    isa: str | None = None
    batch_invariant: bool = False
    fp32_router: bool = True
    progress: bool | None = None

    def __post_init__(self) -> None:
        """Checks the values, so that a mistake costs no loading of a model."""
        check_precision(self.precision)
        select_isa(self.isa)

    @property
    def compute(self) -> str:
        """The old name of `precision`; it warns."""
        warn_renamed("ExpertsOptions.compute", "ExpertsOptions.precision", stacklevel=2)
        return self.precision


ExpertsOptions.__init__ = with_old_arguments("compute")(  # type: ignore[method-assign]
    ExpertsOptions.__init__
)

# The host makes its quantizers itself and passes them nothing of ours, so options travel beside it.
_current: ContextVar[ExpertsOptions | None] = ContextVar("cpumoe_experts_options", default=None)
_default: ExpertsOptions | None = None


def current_options() -> ExpertsOptions:
    """Returns the options of the load that is going on, else those of `enable`.

    Raises:
        ValueError: there are neither, and ``CPUMOE_ISA`` names no variant that runs here.
    """
    return _current.get() or _default or ExpertsOptions()


def set_default_options(options: ExpertsOptions | None) -> None:
    """Sets the options of loads that name none; None: as they were at first."""
    global _default
    _default = options


@contextmanager
def loading_with(options: ExpertsOptions) -> Iterator[None]:
    """Makes `options` those of a load inside the block, in this thread."""
    token = _current.set(options)
    try:
        yield
    finally:
        _current.reset(token)
