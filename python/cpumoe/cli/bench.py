"""``cpumoe bench``: how fast a layer runs, and how fast this machine allows."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cpumoe._base.progress import progress_bar
from cpumoe.cli import (
    bench_compare,
    bench_plot,
    bench_report,
    bench_tune,
    bench_write_back,
    console,
)
from cpumoe.cli.errors import InputError, reported
from cpumoe.cli.options import (
    BestIsaOption,
    CompareOption,
    GroupOption,
    JsonFileOption,
    PrecisionOption,
    ScalesOption,
    ThreadsOption,
    TracebackOption,
    choose_layer,
    count_option,
    make_runtime,
    nodes_option,
    parse_isas_or_best,
    parse_precisions,
    parse_scales,
    parse_token_counts,
    tokens_option,
    value_option,
)
from cpumoe.numerics.precision import PRECISIONS

if TYPE_CHECKING:
    from cpumoe.formats.scale_choice import ScaleChoice
    from cpumoe.measure.layer_weights import LayerWeights
    from cpumoe.measure.throughput import Workload
    from cpumoe.measure.timing import Variant
    from cpumoe.models import ModelSpec
    from cpumoe.runtime import Runtime

EXAMPLE = (
    "Examples: `cpumoe bench --isa all --tokens 1,64`, `cpumoe bench --json old.json`, then "
    "`cpumoe bench --compare old.json`"
)

_MODEL = "DeepSeek-V4-Flash"
_EXPERTS = 64
_TOKENS = "1,4,16,64,256,1024"
_MOST_SECONDS = 86400.0


_ModelOption = Annotated[
    str,
    value_option(
        "NAME|DIR",
        "A model's name for made-up weights of its sizes, or a checkpoint folder for the weights "
        "of its first MoE layer.",
    ),
]
_RoutingOption = Annotated[
    str | None,
    value_option(
        "NAME",
        "Which experts tokens use. balanced: all experts are equally likely. concentrated: all "
        "tokens of a call use the same experts. zipf: an expert's popularity is 1/rank.",
        "balanced",
    ),
]
_FormatOption = Annotated[
    str | None,
    value_option(
        "all|NAME,...",
        "Formats of made-up weights, separated by commas. Several formats are in memory together, "
        "and the table compares each with the first.",
        "as in the model",
    ),
]
_NodesOption = Annotated[
    list[str] | None,
    nodes_option(
        "Give the option several times, and the table compares each value with the first; the "
        "weights are then in memory once for each.",
    ),
]
_ExpertsOption = Annotated[
    int | None,
    count_option(
        "Experts in the layer. Choose so many that their weights do not fit the caches.",
        f"{_EXPERTS}, or all of a checkpoint's",
    ),
]
_SecondsOption = Annotated[
    float, value_option("S", "Seconds to spend on the calls of each table row.")
]
_RoundsOption = Annotated[int, count_option("Rounds. The rows take turns in each.")]
_BatchInvariantOption = Annotated[
    bool, typer.Option("--batch-invariant", help="Use the same kernels for any number of tokens.")
]
_TuneOption = Annotated[
    bool,
    typer.Option(
        "--tune",
        help="Do not print the usual table. Time the few-token and the many-token kernels for each "
        "number of tokens per expert, and show up to how many tokens the few-token kernels are "
        "faster.",
    ),
]
_WriteBackOption = Annotated[
    bool,
    typer.Option(
        "--write-back",
        help="Do not print the usual table. Time the writing of experts to memory from which a GPU "
        "takes them, beside the memory's copy bandwidth.",
    ),
]
_DataOption = Annotated[
    Path | None,
    value_option(
        "DIR",
        "Read weights and calls from a folder of plain arrays. MXFP4 codes and scales are in "
        "gate.q, gate.s, up.q, up.s, down.q, down.s (uint8, \\[experts, rows, columns/2 or /32]). "
        "Calls of M tokens are in x_M (float32 hidden states), ids_M (int32 expert ids, \\[calls, "
        "M, top_k]) and rw_M (float32 routing weights). If ref_M (float32) has their results, the "
        "table shows errors.",
    ),
]


@dataclass(frozen=True)
class OutputOptions:
    """What else the results are for, besides the table."""

    json: JsonFileOption = None
    plot: Annotated[
        Path | None, value_option("FILE", "Draw a roofline plot (.png, .svg or .pdf).")
    ] = None
    compare: CompareOption = None


def command(
    model: _ModelOption = _MODEL,
    tokens: Annotated[list[str] | None, tokens_option(_TOKENS)] = None,
    routing: _RoutingOption = None,
    isa: BestIsaOption = None,
    format: _FormatOption = None,
    scales: ScalesOption = None,
    group: GroupOption = None,
    precision: PrecisionOption = PRECISIONS[0],
    threads: ThreadsOption = None,
    nodes: _NodesOption = None,
    experts: _ExpertsOption = None,
    seconds: _SecondsOption = 2.0,
    rounds: _RoundsOption = 5,
    batch_invariant: _BatchInvariantOption = False,
    tune: _TuneOption = False,
    write_back: _WriteBackOption = False,
    data: _DataOption = None,
    *,
    output: OutputOptions,
    traceback: TracebackOption = False,
) -> None:
    """Time an expert layer, and compare its speed with the limits of this machine.

    Rows take turns in several rounds, and a row's time is the median of all its calls. The memory's
    read bandwidth and the rate of multiply-adds in registers are measured right before and after
    each turn, on the same threads. They limit a call, which has to read its experts once and to do
    its multiply-adds. On several NUMA nodes, each node is compared with its own memory as well.
    """
    with reported(traceback):
        from cpumoe.measure import benchmark

        if output.compare is not None and output.json == Path("-"):
            raise InputError("--compare cannot be combined with --json -; name a file for --json")
        old = None if output.compare is None else bench_compare.read(output.compare)
        if not 0 <= seconds <= _MOST_SECONDS:  # nor NaN
            raise InputError(f"--seconds: expected 0 to {_MOST_SECONDS:g}, got {seconds}")
        require_writable(output.json, output.plot)
        if output.plot is not None:
            bench_plot.require(output.plot)
            if len(nodes or ()) > 1:
                raise InputError("--plot cannot be combined with several --nodes")
        variants = _variants(isa, precision)
        chosen = parse_scales(scales, group)
        other = _other_table(tune, write_back)
        if other is not None:
            unused = {"tokens": tokens, "routing": routing, "data": data, "plot": output.plot}
            _refuse_beside(other, **unused, compare=output.compare)
            if batch_invariant:
                raise InputError(f"--batch-invariant cannot be combined with {other}")
            weights, *more = _weights(model, format, experts, chosen)
            if more:
                raise InputError(f"--format: {other} expects one format, got {format!r}")
            runtime, *others = _runtimes(threads, nodes)
            if others:
                raise InputError(f"--nodes: {other} expects one value, got {len(others) + 1}")
            settings = {"model": model, **bench_report.sizes([weights], weights.top_k)}
            settings |= {"scales": scales, "group": group, "seconds": seconds, "rounds": rounds}
            table = bench_tune if tune else bench_write_back
            document = table.measure(weights, variants, runtime, settings)
            _output(document, table.render, output, None)
            return
        counts = None if tokens is None else parse_token_counts(",".join(tokens), "--tokens")
        if data is None:
            layers = _weights(model, format, experts, chosen)
            workloads = _workloads(layers[0], counts, routing)
        else:
            made_up = {"format": format, "scales": scales, "group": group}
            _refuse_beside("--data", routing=routing, experts=experts, **made_up)
            weights, workloads = _read_data(data, model, counts)
            layers = [weights]
        runtimes = _runtimes(threads, nodes)
        with progress_bar(still=True) as progress:
            result = benchmark.run(
                layers,
                workloads,
                variants,
                runtimes,
                seconds=seconds,
                rounds=rounds,
                batch_invariant=batch_invariant,
                progress=progress,
            )
        settings = {
            "model": model,
            "data": None if data is None else str(data),
            **bench_report.sizes(layers, workloads[0].top_k),
            "scales": scales,
            "group": group,
            "routing": (routing or "balanced") if data is None else "data",
            "batch_invariant": batch_invariant,
            "seconds": seconds,
        }
        document = bench_report.document(result, settings)
        _output(document, bench_report.render, output, old)


def _other_table(tune: bool, write_back: bool) -> str | None:
    """The option that asks for another table than the usual one."""
    if tune and write_back:
        raise InputError("--write-back cannot be combined with --tune")
    if tune:
        return "--tune"
    return "--write-back" if write_back else None


def _output(
    document: dict[str, Any],
    render: Callable[[dict[str, Any]], None],
    output: OutputOptions,
    old: dict[str, Any] | None,
) -> None:
    to_stdout = output.json == Path("-")
    if to_stdout:
        console.show_json(document)
    else:
        render(document)
        if old is not None:
            bench_compare.render(old, document)
        if output.json is not None:
            console.write_json(output.json, document)
            console.show(f"wrote {console.escape(str(output.json))}")
    if output.plot is not None:
        bench_plot.draw(output.plot, document)
        if not to_stdout:
            console.show(f"wrote {console.escape(str(output.plot))}")


def _variants(isa: str | None, precision: str) -> list[Variant]:
    import torch

    from cpumoe.measure.timing import Variant

    precisions = parse_precisions(precision, torch.bfloat16)  # the workloads' hidden states
    return [Variant(name, each) for name in parse_isas_or_best(isa) for each in precisions]


def _weights(
    model: str, format: str | None, experts: int | None, scales: ScaleChoice
) -> list[LayerWeights]:
    """Returns a layer for each format that `--format` names."""
    from cpumoe.checkpoint import open_checkpoint
    from cpumoe.formats.scale_choice import USUAL_SCALES
    from cpumoe.measure.layer_weights import LayerWeights

    if Path(model).exists():
        with open_checkpoint(model) as reader:
            layer = choose_layer(reader, None)
            if scales != USUAL_SCALES:
                raise InputError(
                    f"--scales and --group: {model} is a folder, whose weights have scales; name a "
                    "model to make up weights"
                )
            stored = reader.layer_format(layer)
            if format not in (None, stored):
                raise InputError(
                    f"--format: layer {layer} of {model} is {stored}, got {format!r}; name a model "
                    "instead of a folder to make up weights in other formats"
                )
            return [LayerWeights.from_checkpoint(reader, layer, limit=experts)]
    spec = _spec(model)
    return [
        LayerWeights.from_model(spec, limit=experts or _EXPERTS, format=name, scales=scales)
        for name in _formats(format, spec)
    ]


def _formats(text: str | None, spec: ModelSpec) -> list[str]:
    from cpumoe.formats import WEIGHT_FORMATS

    known = ", ".join(WEIGHT_FORMATS)
    if text is None:
        if spec.weight_format not in WEIGHT_FORMATS:
            raise InputError(
                f"--model: {spec.name} is {spec.weight_format}, which is not supported; name one "
                f"of {known} with --format"
            )
        return [spec.weight_format]
    if text == "all":
        return list(WEIGHT_FORMATS)
    names = list(dict.fromkeys(name.strip() for name in text.split(",")))
    if not WEIGHT_FORMATS.keys() >= set(names):
        raise InputError(f"--format: expected all, or one or more of {known}, got {text!r}")
    return names


def _spec(model: str) -> ModelSpec:
    from cpumoe.models import find_model

    try:
        return find_model(model)
    except ValueError as error:
        if Path(model).exists():
            raise InputError(
                f"--model: --data needs a model's name, got the path {model}"
            ) from error
        raise InputError(f"--model: {model}: no such folder, and {error}") from error


def _workloads(
    weights: LayerWeights, tokens: list[int] | None, routing: str | None
) -> list[Workload]:
    from cpumoe.measure.throughput import ROUTINGS, make_workload

    chosen = next((name for name in ROUTINGS if name == (routing or "balanced")), None)
    if chosen is None:
        raise InputError(f"--routing: expected one of {', '.join(ROUTINGS)}, got {routing!r}")
    return [
        make_workload(
            count,
            hidden_size=weights.hidden_size,
            num_experts=weights.num_experts,
            top_k=weights.top_k,
            routing=chosen,
            seed=count,
        )
        for count in tokens or parse_token_counts(_TOKENS, "--tokens")
    ]


def _refuse_beside(option: str, **others: object) -> None:
    for name, value in others.items():
        if value is not None:
            raise InputError(f"--{name} cannot be combined with {option}")


def _read_data(
    folder: Path, model: str, tokens: list[int] | None
) -> tuple[LayerWeights, list[Workload]]:
    from cpumoe.measure.plain_arrays import PlainArrays

    spec = _spec(model)
    arrays = PlainArrays(folder, spec.hidden_size, spec.moe_intermediate_size)
    return arrays.weights(), [arrays.workload(count) for count in tokens or arrays.tokens]


def _runtimes(threads: int | None, nodes: list[str] | None) -> list[Runtime]:
    """Returns a runtime for each `--nodes`."""
    from cpumoe.runtime import default_runtime

    if not nodes:
        return [make_runtime(threads, None) or default_runtime()]
    chosen: dict[tuple[int, ...] | None, str] = {}
    runtimes = []
    for text in nodes:
        runtime = make_runtime(threads, text)
        assert runtime is not None
        if runtime.nodes in chosen:
            raise InputError(
                f"--nodes: expected different nodes, got {chosen[runtime.nodes]} and {text}, which "
                "are the same on this machine"
            )
        chosen[runtime.nodes] = text
        runtimes.append(runtime)
    return runtimes


def require_writable(*paths: Path | None) -> None:
    """Refuses files that cannot be written, before minutes are spent on their content."""
    for path in paths:
        if path is None or path == Path("-"):
            continue
        if not path.parent.is_dir():
            raise InputError(f"{path}: the folder {path.parent} does not exist")
        if path.is_dir():
            raise InputError(f"{path}: expected a file to write, got a folder")
        if not os.access(path if path.exists() else path.parent, os.W_OK):
            raise InputError(f"{path}: permission denied")
