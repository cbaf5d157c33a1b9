"""Options that several commands share, and the parsing of their values."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from cpumoe.cli.errors import InputError
from cpumoe.numerics.precision import PRECISIONS, resolve_precision

if TYPE_CHECKING:
    import torch

    from cpumoe.checkpoint import ExpertReader

# The most tokens of one call, more than any context has.
_MOST_TOKENS = 1 << 20

JsonOption = Annotated[
    bool,
    typer.Option("--json", help="Print one JSON document to standard output and nothing else."),
]
TracebackOption = Annotated[
    bool,
    typer.Option(
        "--traceback", envvar="CPUMOE_TRACEBACK", help="Show the Python traceback of an error."
    ),
]
ThreadsOption = Annotated[
    int | None,
    typer.Option(
        "--threads",
        min=1,
        metavar="N",
        help="Number of threads to compute with.",
        show_default="physical cores",
    ),
]
IsaOption = Annotated[
    str | None,
    typer.Option(
        "--isa",
        metavar="all|NAME,...",
        help="ISA variants to run, separated by commas.",
        show_default="CPUMOE_ISA if set, else all supported",
    ),
]
BestIsaOption = Annotated[
    str | None,
    typer.Option(
        "--isa",
        metavar="all|NAME,...",
        help="ISA variants to run, separated by commas.",
        show_default="CPUMOE_ISA if set, else the best",
    ),
]
PrecisionOption = Annotated[
    str,
    typer.Option(
        "--precision",
        metavar="all|NAME,...",
        help="auto, bf16 and int8, separated by commas. Each names the lowest precision to which "
        "activations may be rounded. auto: fp32 accuracy for float32 hidden states, bf16 for "
        "others.",
    ),
]


def parse_precisions(text: str, dtype: torch.dtype) -> list[str]:
    """Returns the precisions that `--precision` names, resolved for hidden states of `dtype`.

    Each of them appears once.

    Raises:
        ValueError: a name is unknown.
    """
    names = PRECISIONS if text == "all" else [name.strip() for name in text.split(",")]
    for name in names:
        if name not in PRECISIONS:
            known = ", ".join(("all", *PRECISIONS))
            raise ValueError(f"--precision: expected one of {known}, got {name!r}")
    return list(dict.fromkeys(resolve_precision(name, dtype) for name in names))


def parse_dtype(name: str, names: Sequence[str]) -> torch.dtype:
    """Returns the dtype that `--dtype` names, one of `names`.

    Raises:
        InputError: `name` is not in `names`.
    """
    import torch

    if name not in names:
        raise InputError(f"--dtype: expected one of {', '.join(names)}, got {name!r}")
    dtype: torch.dtype = getattr(torch, name)
    return dtype


def parse_isas(text: str | None) -> list[str]:
    """Returns the variants that `--isa` names, checked.

    Raises:
        ValueError: a variant is unknown, not built or not supported by this CPU, or none runs here.
    """
    from cpumoe.isa import ENVIRONMENT_VARIABLE, select_isa, usable_isas

    if text is None:
        chosen, origin = select_isa(None)
        return [chosen] if origin == ENVIRONMENT_VARIABLE else usable_isas()
    if text == "all":
        return usable_isas()
    names = [name.strip() for name in text.split(",")]
    return list(dict.fromkeys(select_isa(name)[0] for name in names))


def parse_isas_or_best(text: str | None) -> list[str]:
    """Returns the variants that `--isa` names, by default the one that `cpumoe.isa` returns.

    Raises:
        ValueError: see `parse_isas`.
    """
    from cpumoe.isa import isa

    return [isa()] if text is None else parse_isas(text)


def choose_layer(reader: ExpertReader, layer: int | None) -> int:
    """Returns `layer`, by default the first with experts, and checks that its experts can be read.

    Raises:
        InputError: the layer has no experts.
        OSError, ValueError: as `ExpertReader.expert`.
    """
    layers = reader.layers()
    chosen = layers[0] if layer is None and layers else layer or 0
    try:
        reader.expert(chosen, 0)
    except IndexError as error:
        raise InputError(str(error)) from error
    return chosen


def parse_token_counts(text: str, option: str) -> list[int]:
    """Returns the comma-separated numbers of tokens per call that an option gives.

    Raises:
        ValueError: `text` is something else.
    """
    try:
        counts = [int(part) for part in text.split(",")]
    except ValueError:
        counts = []
    if not counts or min(counts) < 1 or max(counts) > _MOST_TOKENS:
        raise ValueError(
            f"{option}: expected positive integers up to {_MOST_TOKENS} separated by commas, as in "
            f"1,8,33, got {text!r}"
        )
    return list(dict.fromkeys(counts))
