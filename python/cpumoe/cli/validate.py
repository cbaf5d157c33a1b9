"""``cpumoe validate``: compares every ISA variant with the PyTorch reference."""

from __future__ import annotations

import shlex
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from cpumoe._base.progress import progress_bar
from cpumoe.cli import console
from cpumoe.cli.errors import VALIDATION_FAILED, InputError, reported
from cpumoe.cli.options import (
    IsaOption,
    JsonOption,
    PrecisionOption,
    ThreadsOption,
    TracebackOption,
    choose_layer,
    count_option,
    parse_dtype,
    parse_isas,
    parse_precisions,
    parse_token_counts,
    tokens_option,
    value_option,
)
from cpumoe.numerics.precision import PRECISIONS

if TYPE_CHECKING:
    from cpumoe.measure.layer_weights import LayerWeights, Progress
    from cpumoe.measure.validation import CaseResult, IsaResult, Report

EXAMPLE = "Example: `cpumoe validate path/to/model --layer 3 --tokens 1,8 --precision all`"

_CHECKPOINT = "checkpoint"
_TOKENS = "1,3,8,33,257"
_DTYPES = ("bfloat16", "float16", "float32")


def command(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A checkpoint folder.")],
    layer: Annotated[
        int | None, value_option("N", "Decoder layer to check.", "the first with experts")
    ] = None,
    tokens: Annotated[list[str] | None, tokens_option(_TOKENS)] = None,
    isa: IsaOption = None,
    precision: PrecisionOption = PRECISIONS[0],
    dtype: Annotated[
        str, value_option("|".join(_DTYPES), "Dtype of hidden states and outputs.")
    ] = _DTYPES[0],
    pattern: Annotated[
        str,
        value_option(
            "NAME",
            "Weights. checkpoint: the checkpoint's. uniform, alternating, ramp, random or normal: "
            "made-up ones of the checkpoint's sizes and format.",
        ),
    ] = _CHECKPOINT,
    experts: Annotated[int | None, count_option("Use only the first N experts.", "all")] = None,
    seed: Annotated[
        int, value_option("N", "Seed of hidden states, routing and made-up weights.")
    ] = 0,
    threads: ThreadsOption = None,
    json_output: JsonOption = False,
    traceback: TracebackOption = False,
) -> None:
    """Compare every ISA variant with a float64 PyTorch reference.

    Three things are checked. Each error stays within the bound that follows from the roundings of
    a correct kernel. Results are bit-identical on 1, 2 and 5 threads and from run to run. Each
    expert exports to the checkpoint's bytes. The exit code is 1 if a check fails.

    Precision int8 rounds activations to int8. Its errors are larger than those of bf16. Its bound
    predicts them better, so error/bound is closer to 1.
    """
    with reported(traceback):
        from cpumoe.measure.validation import validate

        isas = parse_isas(isa)
        hidden_dtype = parse_dtype(dtype, _DTYPES)
        precisions = parse_precisions(precision, hidden_dtype)
        counts = parse_token_counts(",".join(tokens or [_TOKENS]), "--tokens")
        with progress_bar() as progress:
            weights = _read(model, layer, pattern, experts, seed, progress)
            report = validate(
                weights,
                counts,
                isas,
                precisions,
                dtype=hidden_dtype,
                seed=seed,
                threads=threads,
                progress=progress,
            )
        if json_output:
            settings = {"model": model, "pattern": pattern, "dtype": dtype}
            console.show_json({**settings, **report_document(report)})
        else:
            console.show(_describe(weights, pattern), "")
            render(report)
        if not report.passed:
            raise typer.Exit(VALIDATION_FAILED)


def report_document(report: Report) -> dict[str, Any]:
    """Returns a report as ``validate --json`` and ``demo --json`` print it."""
    return {
        "passed": report.passed,
        "reference_seconds": report.reference_seconds,
        "isas": [
            {
                **asdict(result),
                "passed": result.passed,
                "cases": [{**asdict(case), "passed": case.passed} for case in result.cases],
            }
            for result in report.isas
        ],
    }


def render(report: Report) -> None:
    """Prints the table of errors, what went wrong, and the verdict."""
    from cpumoe.measure.validation import THREAD_COUNTS

    columns = (
        "ISA",
        "precision",
        "tokens",
        "error/bound",
        "rel. L2",
        "max abs",
        "same bits",
        "exports",
    )
    table = console.data_table("Against the float64 reference", columns)
    for result in report.isas:
        for index, case in enumerate(result.cases):
            exports = "" if index else _verdict(not result.inexact_exports, "exact", "NOT EXACT")
            table.add_row(
                result.ran if index == 0 else "",
                result.precision if index == 0 else "",
                _tokens(case),
                _ratio(case),
                f"{case.relative_l2:.2e}",
                f"{case.max_abs:.2e}",
                _verdict(case.bit_identical, "yes", "NO"),
                exports,
            )
        table.add_section()
    console.show(table, "", *_problems(report))
    counts = ", ".join(map(str, THREAD_COUNTS))
    console.show(
        "[dim]error/bound: of the worst element; at most 1 is correct\n"
        f"same bits: on {counts} threads and from run to run[/]",
        _conclusion(report),
    )


def _read(
    model: str,
    layer: int | None,
    pattern: str,
    limit: int | None,
    seed: int,
    progress: Progress,
) -> LayerWeights:
    from cpumoe.checkpoint import open_checkpoint
    from cpumoe.measure.layer_weights import LayerWeights
    from cpumoe.models.synth import PATTERNS, Pattern

    if pattern not in (_CHECKPOINT, *PATTERNS):
        known = ", ".join((_CHECKPOINT, *PATTERNS))
        raise InputError(f"--pattern: expected one of {known}, got {pattern!r}")
    _require_folder(model)
    if pattern != _CHECKPOINT and layer is not None:
        raise InputError(
            f"--layer cannot be combined with --pattern {pattern}, which has no layers"
        )
    with open_checkpoint(model) as reader:
        chosen = choose_layer(reader, layer)
        if pattern == _CHECKPOINT:
            return LayerWeights.from_checkpoint(reader, chosen, limit=limit)
        return LayerWeights.from_pattern(
            reader, chosen, cast(Pattern, pattern), limit=limit, seed=seed, progress=progress
        )


def _require_folder(model: str) -> None:
    """Refuses the name of a registered model. `open_checkpoint` refuses other missing folders."""
    from cpumoe.models import find_model

    if Path(model).exists():
        return
    try:
        find_model(model)
    except ValueError:
        return
    raise InputError(
        f"{model} is a model, not a folder; make a checkpoint with: "
        f"cpumoe synth OUT --model {shlex.quote(model)}"
    )


def _describe(weights: LayerWeights, pattern: str) -> str:
    source = "from the checkpoint" if pattern == _CHECKPOINT else f"of pattern {pattern}"
    return (
        f"{weights.num_experts} {weights.format} experts {source}, hidden {weights.hidden_size}, "
        f"intermediate {weights.intermediate_size}, top {weights.top_k}"
    )


def _tokens(case: CaseResult) -> str:
    if case.checked_tokens == case.tokens:
        return str(case.tokens)
    return f"{case.checked_tokens} of {case.tokens}"


def _ratio(case: CaseResult) -> str:
    text = f"{case.worst_ratio:.3f}" if case.worst_ratio < 1000 else f"{case.worst_ratio:.1e}"
    return text if case.worst_ratio <= 1 else f"[bold red]{text}[/]"


def _verdict(good: bool, yes: str, no: str) -> str:
    return yes if good else f"[bold red]{no}[/]"


def _problems(report: Report) -> list[str]:
    lines = []
    for result in report.isas:
        if result.ran != result.isa:
            lines.append(f"{_name(result)}: {result.ran} ran instead")
        if result.inexact_exports:
            ids = ", ".join(map(str, result.inexact_exports))
            lines.append(f"{_name(result)}: exports differ from the checkpoint for experts: {ids}")
        lines.extend(_case_problem(result, case) for case in result.cases if not case.passed)
    return [f"[bold red]failed[/] {line}" for line in lines]


def _case_problem(result: IsaResult, case: CaseResult) -> str:
    where = f"{_name(result)}, {case.tokens} tokens:"
    if case.worst_ratio <= 1:
        return f"{where} the result depends on the number of threads or on the run"
    worst = case.worst
    return (
        f"{where} output {worst.token}, {worst.column} is {worst.actual:.6g}, "
        f"expected {worst.expected:.6g} ± {worst.bound:.2g}"
    )


def _name(result: IsaResult) -> str:
    return f"{result.isa} {result.precision}"


def _conclusion(report: Report) -> str:
    names = ", ".join(map(_name, report.isas))
    seconds = report.reference_seconds + sum(result.seconds for result in report.isas)
    took = f"[dim]({console.format_time(seconds)})[/]"
    if report.passed:
        return f"[bold green]passed[/] on {names} {took}"
    bad = ", ".join(_name(result) for result in report.isas if not result.passed)
    return f"[bold red]FAILED[/] on {bad} {took}"
