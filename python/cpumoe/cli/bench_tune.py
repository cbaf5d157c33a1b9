"""``cpumoe bench --tune``: up to how many tokens of an expert the few-token kernels are faster.

The document (``--json``), times in seconds::

    {"version": 2,
     "settings": {"model", "format", "hidden_size", "intermediate_size", "experts", "top_k",
                  "scales", "group", "seconds", "rounds"},
     "machine": {"cpu", "threads", "versions"},
     "crossovers": [{"isa", "precision", "compiled_in", "best", "most",
                     "rows": [{"tokens", "ratio", "faster": "few-token", "many-token" or null,
                               "few_token": {"seconds", "low", "high"},
                               "many_token": {"seconds", "low", "high"}}]}]}

``compiled_in`` is the variant's constant, and ``most`` is the greatest value that it could have.
null means any number of tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from cpumoe._base.progress import progress_bar
from cpumoe.cli import bench_report, console
from cpumoe.cli.errors import InputError

if TYPE_CHECKING:
    from cpumoe.measure.layer_weights import LayerWeights
    from cpumoe.measure.timing import Variant
    from cpumoe.measure.tuning import Crossover
    from cpumoe.runtime import Runtime

VERSION = 2
_PRECISION = "bf16"


def measure(
    weights: LayerWeights,
    variants: Sequence[Variant],
    runtime: Runtime,
    settings: dict[str, Any],
) -> dict[str, Any]:
    """Measures the variants one after the other, and returns the document.

    `settings` are the document's, and say how long to measure.

    Raises:
        InputError: a precision that uses one kernel for any number of tokens.
        ValueError: see `cpumoe.measure.tuning.measure_crossover`.
    """
    from cpumoe.measure.tuning import measure_crossover

    for variant in variants:
        if variant.precision != _PRECISION:
            raise InputError(
                f"--precision: --tune expects {_PRECISION}, got {variant.precision!r}, which uses "
                "one kernel for any number of tokens"
            )
    with progress_bar(still=True) as progress:
        found = [
            measure_crossover(
                weights,
                variant.isa,
                runtime,
                seconds=settings["seconds"],
                rounds=settings["rounds"],
                progress=progress,
            )
            for variant in variants
        ]
    head = bench_report.head(VERSION, settings, runtime.threads)
    return {**head, "crossovers": [_describe(crossover) for crossover in found]}


def _describe(crossover: Crossover) -> dict[str, Any]:
    return {
        "isa": crossover.isa,
        "precision": _PRECISION,
        "compiled_in": _count(crossover.compiled),
        "best": crossover.best,
        "most": _count(crossover.most),
        "rows": [
            {
                "tokens": row.tokens,
                "ratio": row.ratio,
                "faster": row.faster,
                "few_token": vars(row.few_token),
                "many_token": vars(row.many_token),
            }
            for row in crossover.rows
        ],
    }


def _count(tokens: int) -> int | None:
    from cpumoe.measure.tuning import ANY_TOKENS

    return None if tokens == ANY_TOKENS else tokens


def render(document: dict[str, Any]) -> None:
    """Prints the document as tables."""
    settings, machine = document["settings"], document["machine"]
    threads = console.format_count(machine["threads"], "thread")
    console.show(
        f"{console.escape(machine['cpu'])}, {threads}\n{settings['experts']} {settings['format']} "
        f"{', '.join(('experts', *bench_report.scales_of(settings)))}, "
        f"hidden {settings['hidden_size']}, intermediate {settings['intermediate_size']}, "
        f"top {settings['top_k']}"
    )
    for crossover in document["crossovers"]:
        table = console.data_table(
            f"{crossover['isa']}: few-token and many-token kernels",
            ("tokens per expert", "few-token ms", "many-token ms", "few/many", "faster"),
            text_columns=0,
        )
        for row in crossover["rows"]:
            table.add_row(
                str(row["tokens"]),
                console.format_number(1e3 * row["few_token"]["seconds"]),
                console.format_number(1e3 * row["many_token"]["seconds"]),
                f"{row['ratio']:.3f}",
                row["faster"] or "",
            )
        console.show("", table, "", _verdict(crossover))
    console.show(
        "",
        f"[dim]ms: median of all calls of {console.format_count(settings['rounds'], 'round')}; "
        "all tokens of a call go to the same experts,\nand those of the next call to others; "
        "faster: shown where the rounds of the two do not overlap[/]",
    )


def _verdict(crossover: dict[str, Any]) -> str:
    best, compiled = crossover["best"], crossover["compiled_in"]
    end = ""
    if best == crossover["most"]:
        end = " (few-token kernels take no more)"
    elif best == crossover["rows"][-1]["tokens"]:
        end = " or more"
    constant = "any number" if compiled is None else compiled
    return f"best crossover: {best}{end}; compiled in: {constant}"
