"""``cpumoe synth``: writes a checkpoint with made-up weights."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated, cast

import typer

from cpumoe._base.progress import progress_bar
from cpumoe.cli import console
from cpumoe.cli.errors import reported
from cpumoe.cli.options import (
    GroupOption,
    JsonOption,
    ScalesOption,
    TracebackOption,
    count_option,
    parse_scales,
    value_option,
)

EXAMPLE = (
    "Examples: `cpumoe synth v4 --model v4-flash --layers 1 --experts 32`, "
    "`cpumoe synth k2 --model kimi-k2 --layers 1 --experts 32 --scales fp16 --group 128`"
)

_AS_IN_MODEL = "as in the model"


def command(
    out: Annotated[
        Path,
        typer.Argument(metavar="OUT", help="The folder to write to. A missing one is created."),
    ],
    model: Annotated[str, value_option("NAME", "A model's name or Hugging Face id.")],
    layers: Annotated[int | None, count_option("MoE layers.", _AS_IN_MODEL)] = None,
    experts: Annotated[int | None, count_option("Experts per layer.", _AS_IN_MODEL)] = None,
    hidden: Annotated[int | None, count_option("Hidden size.", _AS_IN_MODEL)] = None,
    intermediate: Annotated[
        int | None, count_option("Intermediate size of an expert.", _AS_IN_MODEL)
    ] = None,
    top_k: Annotated[int | None, count_option("Experts per token.", _AS_IN_MODEL)] = None,
    scales: ScalesOption = None,
    group: GroupOption = None,
    pattern: Annotated[
        str, value_option("NAME", "Weights: normal, uniform, alternating, ramp or random.")
    ] = "normal",
    seed: Annotated[int, value_option("N", "Seed of the random numbers.")] = 0,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the checkpoint in a non-empty folder.")
    ] = False,
    json_output: JsonOption = False,
    traceback: TracebackOption = False,
) -> None:
    """Write a checkpoint with made-up weights in a model's exact native format.

    The checkpoint has config.json, an index and safetensors files. Only routed experts and routers
    are written. By default the weights are normally distributed and rounded to the nearest code;
    --pattern chooses others.
    """
    with reported(traceback):
        from cpumoe.models import find_model
        from cpumoe.models.synth import Pattern, write_checkpoint

        with progress_bar() as progress:
            write_checkpoint(
                out,
                find_model(model),
                layers=layers,
                experts=experts,
                hidden=hidden,
                intermediate=intermediate,
                top_k=top_k,
                scales=parse_scales(scales, group),
                pattern=cast(Pattern, pattern),
                seed=seed,
                overwrite=overwrite,
                progress=lambda done, total: progress(
                    f"writing {console.format_bytes(total)}", done, total
                ),
            )
        nbytes = sum(file.stat().st_size for file in out.glob("*.safetensors"))
        if json_output:
            console.show_json({"path": str(out), "bytes": nbytes, "model": find_model(model).name})
        else:
            quoted = console.escape(shlex.quote(str(out)))
            console.show(f"wrote {console.format_bytes(nbytes)} to {console.escape(str(out))}")
            console.show(f"next: [bold]cpumoe validate {quoted}[/]")
