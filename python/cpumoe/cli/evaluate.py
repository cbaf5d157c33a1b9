"""``cpumoe eval``: how well a model predicts a text, by ISA variant, precision and host."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cpumoe._base.progress import progress_bar
from cpumoe.cli import console, ranks
from cpumoe.cli.errors import InputError, reported
from cpumoe.cli.options import (
    BestIsaOption,
    JsonOption,
    PrecisionOption,
    ThreadsOption,
    TracebackOption,
    count_option,
    parse_isas_or_best,
    parse_precisions,
    value_option,
)
from cpumoe.cli.text_model import (
    DEFAULT_DTYPE,
    DenseOption,
    DtypeOption,
    LoadingOptions,
    ModelArgument,
    TrustRemoteCodeOption,
    load_text_model,
    read_text,
    resolve_dtype,
)
from cpumoe.numerics.precision import PRECISIONS

if TYPE_CHECKING:
    import torch

    from cpumoe.integrations.transformers import LanguageModel, Perplexity

EXAMPLE = "Example: `cpumoe eval --isa all --precision all --experts all`"

_CPUMOE, _HOST, _ALL = "cpumoe", "host", "all"
_DEFAULT_WINDOW = 2048


@dataclass(frozen=True)
class _Way:
    """What computes the experts: cpumoe with a variant and a precision, or the host."""

    experts: str
    isa: str | None = None
    precision: str | None = None


def command(
    model: ModelArgument = None,
    text: Annotated[
        Path | None,
        value_option(
            "FILE",
            "UTF-8 text to read.",
            "for the model that comes with cpumoe, text it was not trained on",
        ),
    ] = None,
    experts: Annotated[
        str,
        value_option(
            f"{_CPUMOE}|{_HOST}|{_ALL}",
            "What computes the experts. host: transformers, from dequantized weights.",
        ),
    ] = _CPUMOE,
    isa: BestIsaOption = None,
    precision: PrecisionOption = PRECISIONS[0],
    window: Annotated[
        int | None,
        count_option(
            "Tokens that the model reads together.",
            f"the model's context, at most {_DEFAULT_WINDOW}",
            least=2,
        ),
    ] = None,
    stride: Annotated[
        int | None,
        count_option(
            "New tokens per window. Fewer give each token more context and take longer.",
            "the window",
        ),
    ] = None,
    max_tokens: Annotated[
        int | None, count_option("Tokens of the text to read.", "all", least=2)
    ] = None,
    threads: ThreadsOption = None,
    dtype: DtypeOption = DEFAULT_DTYPE,
    dense: DenseOption = None,
    trust_remote_code: TrustRemoteCodeOption = False,
    sums: ranks.SumsOption = ranks.DEFAULT_SUMS,
    placement: ranks.PlacementOption = None,
    record: Annotated[
        Path | None,
        value_option(
            "FILE",
            "File to write, with the number of tokens that used each expert, for --placement and "
            "`cpumoe placement`.",
            "none",
        ),
    ] = None,
    json_output: JsonOption = False,
    traceback: TracebackOption = False,
) -> None:
    """Measure a model's perplexity on a text. Lower is better.

    Compare rows to see what a precision costs in quality on your own text. The last column is the
    change of the perplexity against the first row. With --experts all, the last row is
    transformers' own computation from dequantized weights, and the others are compared with it.
    --dense applies to the rows whose experts cpumoe computes. transformers computes attention in
    all rows. --record counts what the first row computes.
    """
    with reported(traceback):
        ranks.join_ranks(model, sums, threads, placement, isa=isa, precision=precision, dtype=dtype)
        resolved = resolve_dtype(dtype, model, trust_remote_code=trust_remote_code)
        ways = _ways(experts, isa, precision, resolved)
        if record is not None:
            _check_record(record, ways)
        content = _read(model, text)
        common = LoadingOptions(
            threads,
            dtype=str(resolved).removeprefix("torch."),
            dense=dense,
            attention="host",  # rows differ in experts and dense layers alone
            trust_remote_code=trust_remote_code,
            sums=sums,
            placement=placement,
        )
        rows: list[tuple[_Way, Perplexity]] = []
        for way in ways:
            loaded = load_text_model(
                model,
                replace(common, isa=way.isa, precision=way.precision or PRECISIONS[0]),
                host_experts=way.experts == _HOST,
                decodes=False,
            )
            tokens = loaded.encode(content).tokens[:max_tokens]
            before = None if record is None or rows else _counts(loaded)
            rows.append((way, _measure(loaded, tokens, window, stride)))
            if record is not None and before is not None:
                _write_counts(_counts(loaded) - before, record)
            name = loaded.name
            del loaded  # memory may not hold two models
        if json_output:
            results = [{**asdict(way), **asdict(result)} for way, result in rows]
            console.show_json({"model": name, "dtype": common.dtype, "results": results})
        else:
            _render(name, rows)


def _ways(experts: str, isa: str | None, precision: str, dtype: torch.dtype) -> list[_Way]:
    if experts not in (_CPUMOE, _HOST, _ALL):
        raise InputError(f"--experts: expected {_CPUMOE}, {_HOST} or {_ALL}, got {experts!r}")
    if experts == _HOST and (isa is not None or precision != PRECISIONS[0]):
        raise InputError(f"--isa and --precision cannot be combined with --experts {_HOST}")
    ways = []
    if experts != _HOST:
        isas = parse_isas_or_best(isa)
        precisions = parse_precisions(precision, dtype)
        ways += [_Way(_CPUMOE, name, each) for each in precisions for name in isas]
    if experts != _CPUMOE:
        ways.append(_Way(_HOST))
    return ways


def _check_record(path: Path, ways: Sequence[_Way]) -> None:
    if ways[0].experts == _HOST:
        raise InputError(f"--record: expected --experts {_CPUMOE} or {_ALL}, got {_HOST}")
    if not path.absolute().parent.is_dir():
        raise InputError(f"--record: expected a file in a folder that exists, got {path}")


def _counts(model: LanguageModel) -> torch.Tensor:
    from cpumoe.integrations.transformers.expert_counts import expert_counts

    return expert_counts(model.model)


def _write_counts(counts: torch.Tensor, path: Path) -> None:
    from cpumoe.integrations.sglang.recording import write_counts

    write_counts(counts, path)


def _read(model: str | None, text: Path | None) -> str:
    if text is None:
        if model is not None:
            raise InputError("--text FILE is required with MODEL")
        from cpumoe import embedded

        text = embedded.held_out_path()
    return read_text(text, "--text")


def _measure(
    model: LanguageModel, tokens: Sequence[int], window: int | None, stride: int | None
) -> Perplexity:
    from cpumoe.integrations.transformers import perplexity

    window = window or min(model.context_length, _DEFAULT_WINDOW)
    if window > model.context_length:
        raise InputError(
            f"--window: expected at most the model's context of {model.context_length}, "
            f"got {window}"
        )
    with progress_bar() as progress:
        return perplexity(
            model.model,
            tokens,
            window=window,
            stride=stride,
            progress=lambda done, total: progress("reading", done, total),
        )


def _render(name: str, rows: list[tuple[_Way, Perplexity]]) -> None:
    reference, baseline = _baseline(rows)
    columns: tuple[Any, ...] = ("experts", "isa", "precision", "perplexity", "tokens/s")
    compared = len(rows) > 1
    if compared:
        columns += (f"vs. {reference}",)
    scored = console.format_count(rows[0][1].scored_tokens, "token")
    title = f"{console.escape(name)}, {scored}"
    table = console.data_table(title, columns, text_columns=3)
    for way, result in rows:
        cells = [
            way.experts,
            way.isa or "",
            way.precision or "",
            f"{result.perplexity:.4f}",
            console.format_number(result.tokens_per_second),
        ]
        if compared:
            cells.append(f"{100 * (result.perplexity / baseline - 1):+.3f} %")
        table.add_row(*cells)
    console.show(table)


def _baseline(rows: list[tuple[_Way, Perplexity]]) -> tuple[str, float]:
    """The name and the perplexity of the row that the others are compared with."""
    for way, result in rows:
        if way.experts == _HOST:
            return _HOST, result.perplexity
    return "first row", rows[0][1].perplexity
