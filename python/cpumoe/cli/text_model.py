"""Loads the model that a command generates text with; the options that choose it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cpumoe.cli import console, host_threads, ranks
from cpumoe.cli.errors import InputError
from cpumoe.cli.options import (
    NodesOption,
    ThreadsOption,
    check_dtype,
    count_option,
    make_runtime,
    parse_dtype,
    value_option,
)
from cpumoe.numerics.precision import PRECISIONS

if TYPE_CHECKING:
    import torch

    from cpumoe.distributed import Ranks
    from cpumoe.integrations.transformers import LanguageModel
    from cpumoe.text.generation import Sampling

_AUTO = "auto"
DTYPES = ("bfloat16", "float32", _AUTO)
_HOST_PACKAGES = ("transformers", "accelerate", "compressed-tensors")

ModelArgument = Annotated[
    str | None,
    typer.Argument(
        metavar="MODEL",
        help="A checkpoint folder.",
        show_default="the small model that comes with cpumoe",
    ),
]
DtypeOption = Annotated[
    str,
    value_option(
        "|".join(DTYPES),
        "Dtype of everything but the experts (attention, norms, …). auto: bfloat16 for a "
        "checkpoint in bfloat16, else float32.",
    ),
]
DenseOption = Annotated[
    str | None,
    value_option(
        "host|native|FORMAT",
        "Who computes dense layers. host: transformers. native: cpumoe, with the weights as they "
        "are. A weight format such as fp8: cpumoe, with rounded weights.",
        "native, but host for models with little dense weights or beside a GPU",
    ),
]
MaxTokensOption = Annotated[
    int | None,
    count_option("Largest number of new tokens.", "as many as the context has room for"),
]
TrustRemoteCodeOption = Annotated[
    bool,
    typer.Option(
        "--trust-remote-code",
        help="Run Python code from the checkpoint. Some tokenizers need it.",
    ),
]

DEFAULT_DTYPE = DTYPES[0]
DEFAULT_PRECISION = PRECISIONS[0]
DEFAULT_ATTENTION = "native"
_THE_MODELS = "the model's default"


@dataclass(frozen=True)
class SamplingOptions:
    """How tokens are chosen, and where the text ends."""

    temperature: Annotated[
        float | None,
        value_option("T", "Sampling temperature. 0: always the most probable token.", _THE_MODELS),
    ] = None
    top_p: Annotated[
        float | None,
        value_option(
            "P",
            "Sample from the most probable tokens that together have this probability.",
            _THE_MODELS,
        ),
    ] = None
    stop: Annotated[
        list[str] | None, value_option("TEXT", "End the text before this string. Repeatable.")
    ] = None
    seed: Annotated[int | None, value_option("N", "Seed of the sampling.", "random")] = None

    def sampling(self, max_tokens: int | None) -> Sampling:
        """Returns what the options ask for.

        Raises:
            ValueError: a value is out of its range.
        """
        from cpumoe.text.generation import Sampling

        return Sampling(max_tokens, self.temperature, self.top_p, tuple(self.stop or ()), self.seed)


@dataclass(frozen=True)
class LoadingOptions:
    """How a model is loaded: with one variant and one precision, where other commands compare."""

    threads: ThreadsOption = None
    precision: Annotated[
        str,
        value_option(
            "|".join(PRECISIONS),
            "Lowest precision to which activations may be rounded, in experts and in dense layers "
            "that cpumoe computes. auto: fp32 accuracy if --dtype is float32, else bf16.",
        ),
    ] = DEFAULT_PRECISION
    isa: Annotated[
        str | None, value_option("NAME", "ISA variant to run.", "CPUMOE_ISA if set, else the best")
    ] = None
    dtype: DtypeOption = DEFAULT_DTYPE
    dense: DenseOption = None
    attention: Annotated[
        str,
        value_option(
            "host|native",
            "Who computes attention. host: transformers. native: cpumoe, in each module where both "
            "compute the same.",
        ),
    ] = DEFAULT_ATTENTION
    chat_template: Annotated[
        Path | None,
        value_option("FILE", "File with a Jinja template of the chat format.", "the model's own"),
    ] = None
    trust_remote_code: TrustRemoteCodeOption = False
    sums: ranks.SumsOption = ranks.DEFAULT_SUMS
    placement: ranks.PlacementOption = None
    nodes: NodesOption = None


_DEFAULT_OPTIONS = LoadingOptions()


def load_text_model(
    model: str | None,
    options: LoadingOptions = _DEFAULT_OPTIONS,
    *,
    host_experts: bool = False,
    decodes: bool = True,
) -> LanguageModel:
    """Loads a model, with a progress bar on a terminal.

    Args:
        model: a checkpoint's folder, or a name on the hub; None: the small model that comes with
            cpumoe.
        options: how to load it.
        host_experts: whether the host computes the experts, from dequantized weights.
        decodes: whether the model generates text; False: it only reads long texts.

    Raises:
        InputError: the dtype is unknown, or transformers is not installed.
        ValueError: the precision or the variant is unknown, or the checkpoint is not supported.
        OSError: the checkpoint cannot be read.
        RanksError: one of several ranks is missing or differs from the others.
        typer.Exit: this process is another rank than 0, and has ended.
    """
    together = join_ranks(model, options)
    # Mistakes and missing packages are reported before PyTorch is imported, which takes seconds.
    if options.dtype != _AUTO:
        check_dtype(options.dtype, DTYPES)
    file = options.chat_template
    template = None if file is None else read_text(file, "--chat-template")
    require_host()
    # "auto" stays: the integration resolves it, for names on the hub as well.
    dtype = _AUTO if options.dtype == _AUTO else parse_dtype(options.dtype, DTYPES)
    from cpumoe.integrations.transformers import ExpertsOptions, LanguageModel

    threads = options.threads
    environment = ranks.environment()
    host_threads.choose_threads(threads, environment=environment)
    runtime = make_runtime(threads, options.nodes)
    loaded = LanguageModel.from_pretrained(
        model,
        options=ExpertsOptions(
            runtime,
            options.precision,
            options.isa,
            dense=options.dense,
            attention=options.attention,
            ranks=None if host_experts else together,
        ),
        dtype=dtype,
        chat_template=template,
        host_experts=host_experts,
        trust_remote_code=options.trust_remote_code,
    )
    if options.dense is None and loaded.dense_layers.untried:
        console.show_aside(f"dense layers stay transformers': {loaded.dense_layers.untried}")
    if decodes:
        host_threads.choose_threads(threads, loaded.model, environment)
    return loaded


def join_ranks(model: str | None, options: LoadingOptions) -> Ranks | None:
    """Joins other processes that torchrun has started; see `cpumoe.cli.ranks.join_ranks`."""
    return ranks.join_ranks(
        model,
        options.sums,
        options.threads,
        options.placement,
        precision=options.precision,
        isa=options.isa,
        dtype=options.dtype,
    )


def require_host() -> None:
    """Imports the integration for transformers.

    Raises:
        InputError: transformers, or a package that it needs, is not installed.
    """
    try:
        import cpumoe.integrations.transformers  # noqa: F401
    except ImportError as error:
        if error.name not in _HOST_PACKAGES:
            raise
        raise InputError(str(error)) from None


def resolve_dtype(name: str, model: str | None, *, trust_remote_code: bool = False) -> torch.dtype:
    """Returns the dtype that `--dtype` names, for a command that needs it before it loads a model.

    Args:
        name: the name; "auto" depends on the model.
        model: see `load_text_model`.
        trust_remote_code: see `LoadingOptions`.

    Raises:
        InputError: `name` is not in `DTYPES`, or transformers is not installed.
        OSError, CheckpointError: config.json cannot be read.
    """
    if name != _AUTO:
        return parse_dtype(name, DTYPES)
    require_host()
    from cpumoe import embedded
    from cpumoe.integrations.transformers.loading import checkpoint_dtype

    path = embedded.model_path() if model is None else model
    return checkpoint_dtype(path, trust_remote_code=trust_remote_code)


def read_text(path: Path, option: str) -> str:
    """Returns the content of an option's UTF-8 file.

    Raises:
        InputError: the file cannot be read or is not UTF-8.
    """
    try:
        return path.read_text("utf-8")
    except OSError as error:
        raise InputError(f"{option}: {path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{option}: {path}: expected UTF-8 text: {error}") from None
