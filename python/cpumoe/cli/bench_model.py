"""``cpumoe bench-model``: how fast a whole model reads prompts and writes tokens.

The document (``--json``), times in seconds, rates per second::

    {"version": 1,
     "settings": {"model", "dtype", "dense", "attention", "precision", "isa", "dense_layers",
                  "norm_modules", "attention_modules", "new_tokens", "rounds"},
     "machine": {"cpu", "threads", "versions": {"cpumoe", "torch", "python"}},
     "rows": [{"context", "prefill_tokens_per_second", "decode_tokens_per_second",
               "floor_tokens_per_second", "share_of_floor", "experts_bytes", "dense_bytes",
               "experts_share", "dense_share",
               "rounds": [{"prefill_seconds", "decode_seconds", "bytes_per_second"}]}]}

``decode_seconds`` is the time for a token. Rates are those of the median round. A row's floor is
the median of the memory's read bandwidth divided by the bytes of weights that a token reads; the
share is the median of the rounds' shares.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Annotated, Any

from cpumoe._base.progress import progress_bar
from cpumoe.cli import bench, bench_compare, bench_report, console
from cpumoe.cli.errors import InputError, reported
from cpumoe.cli.options import (
    CompareOption,
    JsonFileOption,
    TracebackOption,
    count_option,
    parse_token_counts,
    value_option,
)
from cpumoe.cli.text_model import LoadingOptions, ModelArgument, load_text_model

if TYPE_CHECKING:
    from cpumoe.integrations.transformers import LanguageModel
    from cpumoe.integrations.transformers.model_speed import ContextSpeed

EXAMPLE = (
    "Examples: `cpumoe bench-model gpt-oss-20b --contexts 128,2048`, `cpumoe bench-model --json "
    "old.json`, then `cpumoe bench-model --dense host --compare old.json`"
)
VERSION = 1
_CONTEXTS = "128,512"
_READ_SECONDS = 0.1
_RATES = ("prefill_tokens_per_second", "decode_tokens_per_second")


@dataclass(frozen=True)
class OutputOptions:
    """What else the results are for, besides the table."""

    json: JsonFileOption = None
    compare: CompareOption = None


def command(
    model: ModelArgument = None,
    contexts: Annotated[
        str,
        value_option("N,...", "Tokens of the prompts, a table row for each number."),
    ] = _CONTEXTS,
    new_tokens: Annotated[
        int, count_option("Tokens to write behind a prompt, the first one excepted.")
    ] = 16,
    rounds: Annotated[int, count_option("Rounds. Each reads every prompt once.")] = 5,
    *,
    loading: LoadingOptions,
    output: OutputOptions,
    traceback: TracebackOption = False,
) -> None:
    """Time a whole model, and compare its decoding with the limit of this machine's memory.

    The model reads prompts of random tokens and continues them. For each token that it writes, it
    has to read its dense weights, and those of the experts that the token uses. The memory's read
    bandwidth, measured in each round, therefore limits the number of tokens per second. The last
    columns say what part of a token's time experts and dense layers take. The rest is attention,
    norms, routers and transformers itself.
    """
    with reported(traceback):
        to_stdout = output.json == Path("-")
        if output.compare is not None and to_stdout:
            raise InputError("--compare cannot be combined with --json -; name a file for --json")
        old = None if output.compare is None else _read(output.compare)
        bench.require_writable(output.json)
        lengths = parse_token_counts(contexts, "--contexts")
        loaded = load_text_model(model, loading)
        document = _measure(loaded, lengths, new_tokens, rounds, loading)
        if to_stdout:
            console.show_json(document)
            return
        _render(document)
        if old is not None:
            _compare(old, document)
        if output.json is not None:
            console.write_json(output.json, document)
            console.show(f"wrote {console.escape(str(output.json))}")


def _measure(
    model: LanguageModel, lengths: list[int], new_tokens: int, rounds: int, loading: LoadingOptions
) -> dict[str, Any]:
    from cpumoe.integrations.transformers.model_speed import measure_speed
    from cpumoe.measure.limits import MemoryReader
    from cpumoe.runtime import Runtime, default_runtime

    runtime = default_runtime() if loading.threads is None else Runtime(loading.threads)
    reader = MemoryReader(runtime)
    with progress_bar(still=True) as progress:
        found = measure_speed(
            model,
            lengths,
            new_tokens,
            rounds,
            bandwidth=lambda: reader.measure(seconds=_READ_SECONDS).bytes_per_second,
            progress=lambda done, total: progress("timing", done, total),
        )
    settings = {
        "model": model.name,
        "dtype": str(model.model.dtype).removeprefix("torch."),
        "dense": loading.dense,
        "attention": loading.attention,
        "precision": loading.precision,
        "isa": loading.isa,
        "dense_layers": len(model.dense_layers.ours),
        "norm_modules": len(model.norm_modules.ours),
        "attention_modules": len(model.attention_modules.ours),
        "new_tokens": new_tokens,
        "rounds": rounds,
    }
    beginning = bench_report.head(VERSION, settings, runtime.threads)
    return {**beginning, "rows": [_row(speed) for speed in found]}


def _row(speed: ContextSpeed) -> dict[str, Any]:
    needed = speed.experts_bytes + speed.dense_bytes
    rounds = zip(speed.prefill_seconds, speed.decode_seconds, speed.bandwidth, strict=True)
    shares = [needed / (seconds * rate) for _, seconds, rate in rounds]
    return {
        "context": speed.context,
        "prefill_tokens_per_second": speed.context / median(speed.prefill_seconds),
        "decode_tokens_per_second": 1 / median(speed.decode_seconds),
        "floor_tokens_per_second": median(speed.bandwidth) / needed,
        "share_of_floor": median(shares),
        "experts_bytes": round(speed.experts_bytes),
        "dense_bytes": speed.dense_bytes,
        "experts_share": speed.experts_share,
        "dense_share": speed.dense_share,
        "rounds": [
            {"prefill_seconds": prefill, "decode_seconds": decode, "bytes_per_second": rate}
            for prefill, decode, rate in zip(
                *(speed.prefill_seconds, speed.decode_seconds, speed.bandwidth), strict=True
            )
        ],
    }


def _render(document: dict[str, Any]) -> None:
    settings, machine = document["settings"], document["machine"]
    threads = console.format_count(machine["threads"], "thread")
    columns = [*("context", "prefill tokens/s", "decode tokens/s", "memory allows", "share")]
    columns += ["GB/token", "experts", "dense"]
    name = console.escape(f"{settings['model']}, {settings['dtype']}, {threads}")
    table = console.data_table(name, columns, text_columns=0)
    for row in document["rows"]:
        table.add_row(
            str(row["context"]),
            console.format_number(row["prefill_tokens_per_second"]),
            console.format_number(row["decode_tokens_per_second"]),
            console.format_number(row["floor_tokens_per_second"]),
            console.format_percent(row["share_of_floor"]),
            console.format_number((row["experts_bytes"] + row["dense_bytes"]) / 1e9),
            console.format_percent(row["experts_share"]),
            console.format_percent(row["dense_share"]),
        )
    layers = console.format_count(settings["dense_layers"], "dense layer")
    norms = console.format_count(settings["norm_modules"], "norm")
    modules = console.format_count(settings["attention_modules"], "module")
    ours = f"cpumoe computes {layers}, {norms}, and attention in {modules}"
    console.show(table, "", f"[dim]{ours}[/]")


def _read(path: Path) -> dict[str, Any]:
    document = bench_compare.read_json(path)
    if not _is_ours(document):
        raise InputError(
            f"--compare: {path}: expected a file that cpumoe bench-model --json wrote, of version "
            f"{VERSION}"
        )
    return dict(document)


def _is_ours(document: Any) -> bool:
    if not isinstance(document, dict) or document.get("version") != VERSION:
        return False
    try:
        rates = [row[name] for row in document["rows"] for name in ("context", *_RATES)]
        times = [each["decode_seconds"] for row in document["rows"] for each in row["rounds"]]
    except (KeyError, TypeError):
        return False
    settings = document.get("settings"), document.get("machine")
    numbers = all(isinstance(value, (int, float)) for value in [*rates, *times])
    return numbers and all(isinstance(each, dict) for each in settings)


def _compare(old: dict[str, Any], new: dict[str, Any]) -> None:
    before = {row["context"]: row for row in old["rows"]}
    columns = [*("context", "old decode", "new decode", "new/old", "old prefill", "new prefill")]
    columns += ["new/old", ""]
    table = console.data_table("Compared with the earlier run", columns, text_columns=0)
    for row in new["rows"]:
        match = before.get(row["context"])
        if match is None:
            continue
        cells = [str(row["context"])]
        for rate in reversed(_RATES):
            cells += [console.format_number(match[rate]), console.format_number(row[rate])]
            cells.append(f"{row[rate] / match[rate]:.3f}")
        table.add_row(*cells, _verdict(match, row))
    if not table.row_count:
        console.show("", "The earlier run has none of these contexts.")
        return
    note = "[dim]faster, slower: the rounds' decoding times do not overlap[/]"
    console.show("", table, "", note)
    for part in ("settings", "machine"):
        for key, now in new[part].items():
            was = old[part].get(key)
            if was != now:
                console.print_warning(f"the runs differ in {key}: {was} then, {now} now")


def _verdict(old: dict[str, Any], new: dict[str, Any]) -> str:
    were, are = ([each["decode_seconds"] for each in row["rounds"]] for row in (old, new))
    if max(are) < min(were):
        return "[bold green]faster[/]"
    return "[bold red]slower[/]" if min(are) > max(were) else ""
