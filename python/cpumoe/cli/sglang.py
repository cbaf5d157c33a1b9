"""``cpumoe sglang``: starts an SGLang server whose experts cpumoe computes on the CPU."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated

import typer

from cpumoe._base import openmp
from cpumoe.cli import console
from cpumoe.cli.errors import BAD_INPUT, InputError, reported
from cpumoe.cli.options import TracebackOption, value_option

if TYPE_CHECKING:
    from cpumoe.cli.sglang_plan import Plan

EXAMPLE = "Example: `cpumoe sglang DeepSeek-V4-Flash --dry-run`"
# SGLang's options are not cpumoe's to check.
CONTEXT = {"ignore_unknown_options": True}

_GIBIBYTE = 1 << 30
_MOST_GIBIBYTES = 65536
_SERVER = ("-m", "sglang.launch_server")


def command(
    arguments: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="MODEL OPTION",
            help="A checkpoint folder or a model's name, and options of SGLang's server.",
            show_default=False,
        ),
    ] = None,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Print the command that would be run, and run nothing."),
    ] = False,
    gpu_memory: Annotated[
        float | None,
        value_option("GIB", "Memory of each GPU, in GiB.", "what nvidia-smi says"),
    ] = None,
    kv_cache: Annotated[
        float,
        value_option("GIB", "Memory of each GPU that experts leave to the KV cache, in GiB."),
    ] = 2.0,
    traceback: TracebackOption = False,
) -> None:
    """Start an SGLang server: attention and some experts on the GPU, the other experts on the CPU.

    SGLang must be installed in this Python's environment: sglang or sglang-kt. The command sets
    the options that the model and this machine need. You may add any option of
    `python -m sglang.launch_server`. Your options take precedence. `--model-path FOLDER` may take
    the place of MODEL.
    """
    with reported(traceback):
        plan = _plan(arguments or [], gpu_memory, kv_cache, dry_run)
        line = [sys.executable, *_SERVER, *plan.arguments]
        for remark in plan.remarks:
            console.show_aside(remark)
        for warning in plan.warnings:
            console.print_warning(warning)
        if dry_run:
            for problem in plan.problems:
                console.print_warning(problem)
            typer.echo(_shown(line, plan))
            return
        for problem in plan.problems:
            console.print_error(problem)
        if plan.problems:
            raise typer.Exit(BAD_INPUT)
        console.show_aside(_shown(line, plan))
        _run(line, plan)


def _plan(
    arguments: Sequence[str], gpu_memory: float | None, kv_cache: float, dry_run: bool
) -> Plan:
    from cpumoe.cli import sglang_host, sglang_machine
    from cpumoe.cli.sglang_model import find_launch_model
    from cpumoe.cli.sglang_plan import MODEL, MOST_GPUS, TENSOR_PARALLEL, WEIGHTS, make_plan

    if not 0 <= kv_cache <= _MOST_GIBIBYTES:
        raise InputError(f"--kv-cache: expected 0 to {_MOST_GIBIBYTES} GiB, got {kv_cache:g}")
    if gpu_memory is not None and not 0 < gpu_memory <= _MOST_GIBIBYTES:
        raise InputError(
            f"--gpu-memory: expected more than 0 and at most {_MOST_GIBIBYTES} GiB, got "
            f"{gpu_memory:g}"
        )
    words = list(arguments)
    name = words.pop(0) if words and not words[0].startswith("-") else None
    given = sglang_host.Options(words)
    if name is None:
        name = given.text(*MODEL)
    elif given.has(*MODEL):
        raise InputError(f"expected either MODEL or {MODEL[0]}, got both")
    if name is None:
        raise InputError(
            f"expected a model: cpumoe sglang MODEL, or {MODEL[0]} FOLDER; MODEL comes before "
            "SGLang's options"
        )
    machine = sglang_machine.this_machine()
    if gpu_memory is not None:
        memory = round(gpu_memory * _GIBIBYTE)
        gpus = machine.gpus
        if dry_run and not gpus:  # a plan for another machine
            number = given.integer(*TENSOR_PARALLEL, least=1, most=MOST_GPUS) or 1
            gpus = (sglang_machine.Gpu("GPU", memory),) * number
        machine = replace(machine, gpus=tuple(replace(gpu, memory=memory) for gpu in gpus))
    model = find_launch_model(name, given.text(*WEIGHTS))
    host = sglang_host.installed_host()
    return make_plan(model, machine, host, given, round(kv_cache * _GIBIBYTE))


def _shown(line: Sequence[str], plan: Plan) -> str:
    """The command for a shell, an option per line."""
    rows = [f"{name}={shlex.quote(value)}" for name, value in plan.environment.items()]
    rows.append(shlex.join(line[:3]))
    for word in line[3:]:
        if word.startswith("--"):
            rows.append(f"    {shlex.quote(word)}")
        else:
            rows[-1] += f" {shlex.quote(word)}"
    return " \\\n".join(rows)


def _run(line: Sequence[str], plan: Plan) -> None:
    """Becomes the server, which then gets this process' signals and returns its exit code."""
    sys.stdout.flush()
    sys.stderr.flush()
    os.execve(line[0], list(line), {**openmp.inherited_environment(), **plan.environment})
