"""``cpumoe placement``: which experts SGLang should keep on the GPU."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cpumoe.cli import console
from cpumoe.cli.errors import InputError, reported
from cpumoe.cli.options import JsonOption, TracebackOption, value_option

if TYPE_CHECKING:
    from cpumoe.integrations.sglang.recording import Placement

EXAMPLE = "Example: `cpumoe placement expert_distribution_recorder_1.pt --gpu-experts 32`"

# What --output writes, by the end of the file's name.
_MAP, _COUNTS = ".json", ".pt"


def command(
    stats: Annotated[
        Path,
        typer.Argument(
            metavar="STATS",
            help="The file that SGLang's /dump_expert_distribution_record wrote, or `cpumoe eval "
            "--record`.",
        ),
    ],
    gpu_experts: Annotated[
        int, value_option("N", "Experts of each layer that the GPU has.", min=0)
    ],
    output: Annotated[
        Path | None,
        value_option(
            "FILE", "File to write for --init-expert-location: .json for SGLang, .pt for sglang-kt."
        ),
    ] = None,
    json_output: JsonOption = False,
    traceback: TracebackOption = False,
) -> None:
    """Choose the experts that SGLang keeps on the GPU, from the experts that tokens have used.

    The result is the share of routed tokens that the GPU would compute. A file for SGLang puts
    each layer's most used experts into its first slots, which are the GPU's. A file for sglang-kt
    lets it choose the most used experts of all layers together.
    """
    with reported(traceback):
        from cpumoe.integrations.sglang.recording import place, read_counts

        if output is not None:
            _check_output(output, stats)
        counts = read_counts(stats)
        if gpu_experts > counts.shape[1]:
            raise InputError(
                f"--gpu-experts: expected 0 to {counts.shape[1]}, the number of experts per layer, "
                f"got {gpu_experts}"
            )
        placement = place(counts, gpu_experts)
        document = collect(placement, output)
        if output is not None:
            write = placement.write_map if output.suffix == _MAP else placement.write_counts
            write(output)
        if json_output:
            console.show_json(document)
        else:
            _render(document)


def collect(placement: Placement, output: Path | None) -> dict[str, Any]:
    """Returns what ``placement --json`` prints."""
    used = placement.counts.sum(dim=1)
    return {
        "layers": int((used > 0).sum()),
        "experts": placement.counts.shape[1],
        "gpu_experts": placement.gpu_experts,
        "routed_tokens": int(used.sum()),
        "gpu_share": {
            "first_experts": placement.unplaced_share(),
            "map": placement.mapped_share(),
            "masks": placement.masked_share(),
        },
        "output": None if output is None else str(output),
        "options": None if output is None else _options(placement, output),
    }


def _check_output(output: Path, stats: Path) -> None:
    if output.suffix not in (_MAP, _COUNTS):
        raise InputError(
            f"--output: expected a name that ends with {_MAP} (for SGLang) or {_COUNTS} (for "
            f"sglang-kt), got {output}"
        )
    if output.exists() and stats.exists() and os.path.samefile(output, stats):
        raise InputError(f"--output: expected another file than the recording, got {output}")


def _options(placement: Placement, output: Path) -> list[str]:
    """The options of SGLang that use the file."""
    options = ["--kt-num-gpu-experts", str(placement.gpu_experts)]
    if output.suffix == _COUNTS:
        options += ["--kt-expert-placement-strategy", "frequency"]
    return [*options, "--init-expert-location", str(output)]


def _render(document: Mapping[str, Any]) -> None:
    gpu, experts, layers = document["gpu_experts"], document["experts"], document["layers"]
    tokens = console.format_number(document["routed_tokens"])
    console.show(
        f"{gpu} of {experts} experts in each of {layers} layers, {tokens} routed tokens recorded"
    )
    table = console.data_table("", ("experts on the GPU", "for", "share of tokens"), text_columns=2)
    share = document["gpu_share"]
    for chosen, host, name in (
        (f"the first {gpu} of each layer", "no --output", "first_experts"),
        (f"the {gpu} most used of each layer", f"SGLang, {_MAP}", "map"),
        (f"the {gpu * layers} most used of all layers", f"sglang-kt, {_COUNTS}", "masks"),
    ):
        table.add_row(chosen, host, f"{100 * share[name]:.1f} %")
    console.show(table)
    if document["output"] is not None:
        words = console.escape(" ".join(document["options"]))
        console.show(f"wrote {console.escape(document['output'])}", f"use it with: {words}")
