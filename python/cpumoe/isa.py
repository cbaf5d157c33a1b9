"""Which ISA variant runs: the best that this CPU supports, or the one that CPUMOE_ISA names."""

from __future__ import annotations

from cpumoe import _core

ENVIRONMENT_VARIABLE = "CPUMOE_ISA"


def known_isas() -> list[str]:
    """Returns all ISA variants of this version, the most general one first."""
    return [row.name for row in _core.known_isas()]


def supported_isas() -> list[str]:
    """Returns the installed variants that this CPU can run, the best one last."""
    return _core.supported_isas()


def usable_isas() -> list[str]:
    """Returns `supported_isas`, and requires at least one.

    Raises:
        ValueError: there is none. The message says which features each installed variant misses.
    """
    return _core.usable_isas()


def missing_features(isa: str) -> list[str]:
    """Returns the CPU features that variant `isa` needs and this CPU lacks.

    Raises:
        ValueError: there is no such variant.
    """
    for row in _core.known_isas():
        if row.name == isa:
            return [f for f in row.features if f not in _core.cpu_features()]
    raise ValueError(f"unknown ISA {isa!r}; known are {', '.join(known_isas())}")


def isa() -> str:
    """Returns the variant that new `Experts` use.

    It is the best supported one, unless the environment variable ``CPUMOE_ISA`` names another.

    Raises:
        ValueError: ``CPUMOE_ISA`` names a variant that is unknown or not installed, or that needs
            features which this CPU lacks; or no installed variant runs here. There is no fallback.
    """
    return select_isa(None)[0]


def check_isa(requested: object) -> None:
    """Raises TypeError unless an object may be a variant's name, or is None for the best one."""
    if requested is not None and not isinstance(requested, str):
        raise TypeError(
            f"isa: expected a variant's name, or None for the best one, got {requested!r}; known "
            f"are {', '.join(known_isas())}"
        )


def select_isa(requested: str | None) -> tuple[str, str]:
    """Returns the variant to use, and what named it (for error messages).

    Raises:
        TypeError: `requested` is no str.
        ValueError: see `isa`.
    """
    check_isa(requested)
    return _core.select_isa(requested, "isa")
