"""``cpumoe demo``: writes a checkpoint, checks and times a layer, and lets a model write."""

from __future__ import annotations

import shlex
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cpumoe._base.progress import progress_bar
from cpumoe.cli import console, generate
from cpumoe.cli.errors import VALIDATION_FAILED, InputError, reported
from cpumoe.cli.options import (
    JsonOption,
    ThreadsOption,
    TracebackOption,
    count_option,
    parse_isas,
    parse_precisions,
    value_option,
)
from cpumoe.cli.text_model import LoadingOptions, load_text_model
from cpumoe.cli.validate import render, report_document
from cpumoe.text.generation import Sampling

if TYPE_CHECKING:
    from cpumoe.experts import Experts
    from cpumoe.measure.validation import Report

EXAMPLE = "Example: `cpumoe demo --keep v4`"

_MODEL = "DeepSeek-V4-Flash"
_LAYER = 0
# Experts to validate. The reference takes about a second for each.
_VALIDATED_EXPERTS = 8
_VALIDATED_TOKENS = (1, 8, 33)
_TIMED_TOKENS = (1, 16, 128)
_TIMED_SECONDS = 0.5
_PROMPT = "And it came to pass"
_TEXT_TOKENS = 100


def command(
    keep: Annotated[
        Path | None,
        value_option(
            "DIR", "Write the checkpoint to this folder and keep it.", "a temporary folder"
        ),
    ] = None,
    experts: Annotated[int, count_option("Experts in the layer.")] = 16,
    hidden: Annotated[int | None, count_option("Hidden size.", "4096, as in the model")] = None,
    intermediate: Annotated[
        int | None, count_option("Intermediate size of an expert.", "2048, as in the model")
    ] = None,
    threads: ThreadsOption = None,
    json_output: JsonOption = False,
    traceback: TracebackOption = False,
) -> None:
    """Make a small DeepSeek-V4-Flash layer, check it on all ISA variants, and time it.

    Every precision is checked. Then the small model that comes with cpumoe writes a few lines,
    which needs transformers. The demo takes one to three minutes, and a few hundred MB of disk and
    memory. The exit code is 1 if a variant computes a wrong result.
    """
    with reported(traceback), ExitStack() as stack:
        start = time.perf_counter()
        isas = parse_isas(None)
        say = _silent if json_output else console.show
        folder = keep or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="cpumoe-")))
        written = _synthesize(folder, experts, hidden, intermediate)
        say(f"wrote {written['experts']} experts in the format of {_MODEL}: {_speed(written)}")
        loaded, layer = _load(folder, threads)
        say(f"packed the experts for {layer.isa}: {_speed(loaded)}")
        checked = min(experts, _VALIDATED_EXPERTS)
        precisions = _precisions()
        say(f"checking {checked} experts on {', '.join(isas)}; {' and '.join(precisions)}", "")
        report = _validate(folder, isas, precisions, threads)
        if not json_output:
            render(report)
        speed = _time(layer)
        if not json_output:
            _render_speed(speed)
        text = _write(threads, show=not json_output)
        _finish(
            {"model": _MODEL, "synth": written, "load": loaded, "speed": speed, "text": text},
            report,
            time.perf_counter() - start,
            keep,
            json_output,
        )
        if not report.passed:
            raise typer.Exit(VALIDATION_FAILED)


def _silent(*_parts: object) -> None:
    pass


def _synthesize(
    folder: Path, experts: int, hidden: int | None, intermediate: int | None
) -> dict[str, Any]:
    from cpumoe.models import find_model
    from cpumoe.models.synth import write_checkpoint

    start = time.perf_counter()
    with progress_bar() as progress:
        write_checkpoint(
            folder,
            find_model(_MODEL),
            layers=1,
            experts=experts,
            hidden=hidden,
            intermediate=intermediate,
            pattern="random",
            progress=lambda done, total: progress("writing a checkpoint", done, total),
        )
    nbytes = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    return {
        "path": str(folder),
        "experts": experts,
        "bytes": nbytes,
        "seconds": time.perf_counter() - start,
    }


def _load(folder: Path, threads: int | None) -> tuple[dict[str, Any], Experts]:
    from cpumoe.experts import Experts
    from cpumoe.runtime import Runtime

    runtime = None if threads is None else Runtime(threads)
    start = time.perf_counter()
    layer = Experts.from_checkpoint(folder, _LAYER, runtime=runtime)
    seconds = time.perf_counter() - start
    return {"isa": layer.isa, "bytes": layer.nbytes, "seconds": seconds}, layer


def _precisions() -> list[str]:
    import torch

    return parse_precisions("all", torch.bfloat16)


def _validate(folder: Path, isas: list[str], precisions: list[str], threads: int | None) -> Report:
    from cpumoe.checkpoint import open_checkpoint
    from cpumoe.measure.layer_weights import LayerWeights
    from cpumoe.measure.validation import validate

    with open_checkpoint(folder) as reader, progress_bar() as progress:
        weights = LayerWeights.from_checkpoint(reader, _LAYER, limit=_VALIDATED_EXPERTS)
        return validate(
            weights, _VALIDATED_TOKENS, isas, precisions, threads=threads, progress=progress
        )


def _time(layer: Experts) -> dict[str, Any]:
    from cpumoe.measure.limits import measure_read_bandwidth
    from cpumoe.measure.throughput import CallTimer, make_workload, median_spread
    from cpumoe.models import find_model

    top_k = min(find_model(_MODEL).top_k, layer.num_experts)
    steps = len(_TIMED_TOKENS) + 1
    rows = []
    with progress_bar() as progress:
        progress("memory bandwidth", 0, steps)
        memory = measure_read_bandwidth(layer.runtime)
        for index, tokens in enumerate(_TIMED_TOKENS, 1):
            progress(f"timing {tokens} tokens", index, steps)
            work = make_workload(
                tokens,
                hidden_size=layer.hidden_size,
                num_experts=layer.num_experts,
                top_k=top_k,
            )
            timer = CallTimer(layer, work)
            timer.run(0, least=2)
            seconds, _, _ = median_spread([timer.run(_TIMED_SECONDS, least=5)])
            weight_bytes = work.weight_bytes(layer)
            rows.append(
                {
                    "tokens": tokens,
                    "seconds": seconds,
                    "tokens_per_second": tokens / seconds,
                    "flops_per_second": 2 * work.macs(layer) / seconds,
                    "weight_bytes": weight_bytes,
                    "bytes_per_second": weight_bytes / seconds,
                    "share_of_bandwidth": weight_bytes / seconds / memory.bytes_per_second,
                }
            )
    return {"isa": layer.isa, "read_bandwidth": dict(vars(memory)), "throughput": rows}


def _write(threads: int | None, *, show: bool) -> dict[str, Any] | None:
    """Lets the embedded model write. Returns text and speed; None: transformers is missing."""
    try:
        model = load_text_model(None, LoadingOptions(threads))
    except InputError as error:
        if show:
            console.show(
                "", f"[dim]The small model cannot write here: {console.escape(str(error))}[/]"
            )
        return None
    sampling = Sampling(max_new_tokens=_TEXT_TOKENS, temperature=0.8, top_p=0.9, seed=0)
    if show:
        console.show(
            "", f"[bold]{model.name}[/], a model of DeepSeek-V4's architecture, writes:", ""
        )
        generate.write(_PROMPT)
    result = model.generate(
        model.encode(_PROMPT), sampling, on_piece=generate.ReplyWriter() if show else None
    )
    if show:
        generate.write("\n")
        console.show("", f"[dim]{generate.speed_line(result)}[/]")
    return {"model": model.name, "prompt": _PROMPT, **generate.document(result)}


def _speed(step: dict[str, Any]) -> str:
    rate = console.format_rate(step["bytes"] / step["seconds"])
    return (
        f"{console.format_bytes(step['bytes'])} in {console.format_time(step['seconds'])} ({rate})"
    )


def _finish(
    document: dict[str, Any], report: Report, seconds: float, keep: Path | None, json_output: bool
) -> None:
    if json_output:
        validation = report_document(report)
        console.show_json(
            {**document, "validation": validation, "passed": report.passed, "seconds": seconds}
        )
    else:
        _close(keep, seconds)


def _render_speed(speed: dict[str, Any]) -> None:
    memory = speed["read_bandwidth"]
    table = console.data_table(
        f"One layer on {speed['isa']}, {console.format_count(memory['threads'], 'thread')}",
        ("tokens", "time", "tokens/s", "GFLOP/s", "weights read", "of memory bandwidth"),
        text_columns=0,
    )
    for row in speed["throughput"]:
        table.add_row(
            str(row["tokens"]),
            console.format_time(row["seconds"]),
            console.format_number(row["tokens_per_second"]),
            console.format_number(row["flops_per_second"] / 1e9),
            console.format_rate(row["bytes_per_second"]),
            console.format_percent(row["share_of_bandwidth"]),
        )
    console.show(
        "",
        table,
        "",
        f"[dim]The memory's read bandwidth is {console.format_rate(memory['bytes_per_second'])}.\n"
        "It limits calls of few tokens; arithmetic limits calls of many. `cpumoe bench` shows "
        "both.[/]",
    )


def _close(kept: Path | None, seconds: float) -> None:
    if kept is None:
        following = "cpumoe synth v4 --model deepseek-v4-flash --layers 1 --experts 32"
    else:
        following = f"cpumoe validate {console.escape(shlex.quote(str(kept)))} --pattern ramp"
    console.show(
        "",
        f"All of it took {console.format_time(seconds)}. Next, try one of these:",
        "  [bold]cpumoe chat[/]",
        f"  [bold]{following}[/]",
        "  [bold]cpumoe info[/]",
    )
