"""Options that several commands have."""

from __future__ import annotations

from typing import Annotated

import typer

from cpumoe.compute import COMPUTE_PATHS

JsonOption = Annotated[
    bool, typer.Option("--json", help="Print one JSON document to standard output, nothing else.")
]
TracebackOption = Annotated[
    bool,
    typer.Option("--traceback", envvar="CPUMOE_TRACEBACK", help="Show where an error comes from."),
]
ThreadsOption = Annotated[
    int | None,
    typer.Option(
        "--threads",
        min=1,
        metavar="N",
        help="Threads to compute with.",
        show_default="physical cores",
    ),
]
IsaOption = Annotated[
    str | None,
    typer.Option(
        "--isa",
        metavar="all|NAME,...",
        help="ISA variants to run.",
        show_default="CPUMOE_ISA if set, else all supported",
    ),
]
ComputeOption = Annotated[
    str,
    typer.Option(
        "--compute",
        metavar="all|NAME,...",
        help="Compute paths to run: bf16, what experts do unless asked, or int8.",
    ),
]


def parse_computes(text: str) -> list[str]:
    """Returns the compute paths that `--compute` names, checked.

    Raises:
        ValueError: an unknown one.
    """
    if text == "all":
        return list(COMPUTE_PATHS)
    names = list(dict.fromkeys(name.strip() for name in text.split(",")))
    for name in names:
        if name not in COMPUTE_PATHS:
            known = ", ".join(("all", *COMPUTE_PATHS))
            raise ValueError(f"--compute: expected one of {known}, got {name!r}")
    return names


def parse_isas(text: str | None) -> list[str]:
    """Returns the variants that `--isa` names, checked.

    Raises:
        ValueError: a variant that is unknown, not built, or that this CPU lacks.
    """
    from cpumoe.isa import ENVIRONMENT_VARIABLE, select_isa, supported_isas

    chosen, origin = select_isa(None)
    if text is None:
        return [chosen] if origin == ENVIRONMENT_VARIABLE else supported_isas()
    if text == "all":
        return supported_isas()
    names = [name.strip() for name in text.split(",")]
    return list(dict.fromkeys(select_isa(name)[0] for name in names))


def parse_counts(text: str, option: str) -> list[int]:
    """Returns the comma-separated positive integers of an option.

    Raises:
        ValueError: something else.
    """
    try:
        counts = [int(part) for part in text.split(",")]
    except ValueError:
        counts = []
    if not counts or min(counts) < 1:
        raise ValueError(
            f"{option}: expected positive integers separated by commas, as in 1,8,33, got {text!r}"
        )
    return list(dict.fromkeys(counts))
