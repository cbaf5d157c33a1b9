"""Options that several commands share, and the parsing of their values."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cpumoe.cli.errors import InputError
from cpumoe.numerics.precision import PRECISIONS, resolve_precision

if TYPE_CHECKING:
    import torch

    from cpumoe.checkpoint import ExpertReader
    from cpumoe.formats.scale_choice import ScaleChoice
    from cpumoe.runtime import Runtime

# The most tokens of one call, more than any context has.
_MOST_TOKENS = 1 << 20
# The most weights of a row that may share a scale.
_LONGEST_ROW = 1 << 20
# The environment variable of a server's key.
KEY_VARIABLE = "OPENAI_API_KEY"


def value_option(metavar: str, help: str, default: str | bool = True, **settings: Any) -> Any:
    """Returns an option that takes a value.

    Args:
        metavar: what the help shows in place of a value.
        help: what the option does.
        default: how the help describes the default; True: by the default itself.
        **settings: further arguments of `typer.Option`.
    """
    return typer.Option(metavar=metavar, help=help, show_default=default, **settings)


def count_option(help: str, default: str | bool = True, *, least: int = 1) -> Any:
    """Returns an option that takes a number of things; see `value_option`."""
    return value_option("N", help, default, min=least)


def tokens_option(default: str) -> Any:
    """Returns an option that takes numbers for `parse_token_counts`; see `value_option`."""
    return value_option("N,...", "Tokens per call, a table row for each number.", default)


def nodes_option(more: str = "") -> Any:
    """Returns an option for `make_runtime`; `more` is the end of its help."""
    return value_option(
        "auto|1|N,...",
        "NUMA nodes to compute on and to keep weights in. auto: all. 1: the machine counts as one "
        f"node. 0,2: the nodes with these numbers; a single one in brackets, \\[1]. {more}".strip(),
        "CPUMOE_NODES if set, else auto",
    )


def _isas(default: str) -> Any:
    help_text = "ISA variants to run, separated by commas."
    return value_option("all|NAME,...", help_text, f"CPUMOE_ISA if set, else {default}")


JsonOption = Annotated[
    bool,
    typer.Option("--json", help="Print one JSON document to standard output and nothing else."),
]
JsonFileOption = Annotated[
    Path | None, value_option("FILE", "Write the results as JSON. -: standard output.")
]
CompareOption = Annotated[
    Path | None,
    value_option("OLD.json", "Compare with the file that --json wrote in an earlier run."),
]
TracebackOption = Annotated[
    bool,
    typer.Option(
        "--traceback", envvar="CPUMOE_TRACEBACK", help="Show the Python traceback of an error."
    ),
]
ThreadsOption = Annotated[
    int | None, count_option("Number of threads to compute with.", "physical cores")
]
NodesOption = Annotated[str | None, nodes_option()]
IsaOption = Annotated[str | None, _isas("all supported")]
BestIsaOption = Annotated[str | None, _isas("the best")]
ScalesOption = Annotated[
    str | None,
    value_option(
        "NAME",
        "Type of the scales of made-up weights: bf16, fp16 or fp32 for int4; fp32, bf16 or e8m0 "
        "for fp8.",
        "bf16 for int4, fp32 for fp8",
    ),
]
GroupOption = Annotated[
    str | None,
    value_option(
        "N|row",
        "Successive made-up weights that share a scale: a multiple of 32, or all of a row, for "
        "int4; all of a row for fp8.",
        "32 for int4, blocks of 128 x 128 for fp8",
    ),
]
PrecisionOption = Annotated[
    str,
    value_option(
        "all|NAME,...",
        "auto, bf16 and int8, separated by commas. Each names the lowest precision to which "
        "activations may be rounded. auto: fp32 accuracy for float32 hidden states, bf16 for "
        "others.",
    ),
]


def make_runtime(threads: int | None, nodes: str | None) -> Runtime | None:
    """Returns what `--threads` and `--nodes` ask for, or None for the shared runtime.

    Raises:
        InputError: `--nodes` cannot be read.
        ValueError: the nodes do not exist, or there are too few threads for them.
    """
    if threads is None and nodes is None:
        return None
    from cpumoe._engine.nodes import parse_nodes
    from cpumoe.runtime import Runtime

    try:
        chosen = None if nodes is None else parse_nodes(nodes, "--nodes")
    except ValueError as error:
        raise InputError(str(error)) from None
    return Runtime(threads, nodes=chosen)


def parse_scales(scales: str | None, group: str | None) -> ScaleChoice:
    """Returns what `--scales` and `--group` name.

    Raises:
        InputError: a value is unknown.
    """
    from cpumoe.formats.scale_choice import SCALE_NAMES, ScaleChoice

    if scales is not None and scales not in SCALE_NAMES:
        raise InputError(f"--scales: expected one of {', '.join(SCALE_NAMES)}, got {scales!r}")
    dtype = None if scales is None else SCALE_NAMES[scales]
    if group in (None, "row"):
        return ScaleChoice(dtype, by_row=group is not None)
    if not group.isascii() or not group.isdecimal() or not 0 < int(group) <= _LONGEST_ROW:
        raise InputError(f"--group: expected row or a positive number of weights, got {group!r}")
    return ScaleChoice(dtype, int(group))


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
    check_dtype(name, names)
    import torch

    dtype: torch.dtype = getattr(torch, name)
    return dtype


def check_dtype(name: str, names: Sequence[str]) -> None:
    """Checks a name as `parse_dtype` does, without the time to import PyTorch."""
    if name not in names:
        raise InputError(f"--dtype: expected one of {', '.join(names)}, got {name!r}")


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
        InputError: the layer has no experts, or config.json does not specify their activation.
        OSError, ValueError: as `ExpertReader.expert`.
    """
    if reader.activation is None and not reader.unsupported:
        folder = reader.folder.path
        reason = f"config.json does not specify the activation of model_type {reader.model_type!r}"
        if reader.output_norm is not None:
            reason = f"{reader.output_norm}: a norm of each expert's output is not part of a layer"
        raise InputError(
            f"{folder}: {reason}; check the whole model, whose activation transformers knows: "
            f"cpumoe eval {shlex.quote(str(folder))} --text FILE --experts all"
        )
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
