"""Loads the model that a command generates text with; the options that choose it."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cpumoe.cli import host_threads
from cpumoe.cli.errors import InputError
from cpumoe.cli.options import parse_dtype
from cpumoe.numerics.precision import PRECISIONS

if TYPE_CHECKING:
    import torch

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
    typer.Option(
        "--dtype",
        metavar="|".join(DTYPES),
        help="Dtype of everything but the experts (attention, norms, …). auto: bfloat16 for a "
        "checkpoint in bfloat16, else float32.",
    ),
]
# Generation uses one variant and one precision, where other commands compare several.
OneIsaOption = Annotated[
    str | None,
    typer.Option(
        "--isa",
        metavar="NAME",
        help="ISA variant to run.",
        show_default="CPUMOE_ISA if set, else the best",
    ),
]
OnePrecisionOption = Annotated[
    str,
    typer.Option(
        "--precision",
        metavar="|".join(PRECISIONS),
        help="Lowest precision to which the experts' activations may be rounded. auto: fp32 "
        "accuracy if --dtype is float32, else bf16.",
    ),
]
MaxTokensOption = Annotated[
    int | None,
    typer.Option(
        "--max-tokens",
        min=1,
        metavar="N",
        help="Largest number of new tokens.",
        show_default="as many as the context has room for",
    ),
]
TemperatureOption = Annotated[
    float | None,
    typer.Option(
        metavar="T",
        help="Sampling temperature. 0: always the most probable token.",
        show_default="the model's default",
    ),
]
TopPOption = Annotated[
    float | None,
    typer.Option(
        "--top-p",
        metavar="P",
        help="Sample from the most probable tokens that together have this probability.",
        show_default="the model's default",
    ),
]
SeedOption = Annotated[
    int | None, typer.Option(metavar="N", help="Seed of the sampling.", show_default="random")
]
StopOption = Annotated[
    list[str] | None,
    typer.Option("--stop", metavar="TEXT", help="End the text before this string. Repeatable."),
]

ChatTemplateOption = Annotated[
    Path | None,
    typer.Option(
        "--chat-template",
        metavar="FILE",
        help="File with a Jinja template of the chat format.",
        show_default="the model's own",
    ),
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


def load_text_model(
    model: str | None,
    *,
    threads: int | None = None,
    precision: str = DEFAULT_PRECISION,
    isa: str | None = None,
    dtype: str = DEFAULT_DTYPE,
    chat_template: Path | None = None,
    trust_remote_code: bool = False,
    host_experts: bool = False,
    decodes: bool = True,
) -> LanguageModel:
    """Loads a model, with a progress bar on a terminal.

    Args:
        model: a checkpoint's folder; None: the small model that comes with cpumoe.
        threads: number of threads; None: the number of physical cores.
        precision: one of `PRECISIONS`.
        isa: the variant; None: the one that `cpumoe.isa` returns.
        dtype: one of `DTYPES`.
        chat_template: a file with a Jinja template, for models that have none.
        trust_remote_code: whether to run Python code from the checkpoint.
        host_experts: whether the host computes the experts, from dequantized weights.
        decodes: whether the model generates text; False: it only reads long texts.

    Raises:
        InputError: the dtype is unknown, or transformers is not installed.
        ValueError: the precision or the variant is unknown, or the checkpoint is not supported.
        OSError: the checkpoint cannot be read.
    """
    dense_dtype = parse_dense_dtype(dtype, model)
    template = None if chat_template is None else read_text(chat_template, "--chat-template")
    try:
        from cpumoe.integrations.transformers import ExpertsOptions, LanguageModel
    except ImportError as error:
        if error.name not in _HOST_PACKAGES:
            raise
        raise InputError(str(error)) from None

    from cpumoe.runtime import Runtime

    host_threads.choose_threads(threads)
    options = ExpertsOptions(
        runtime=None if threads is None else Runtime(threads), precision=precision, isa=isa
    )
    loaded = LanguageModel.from_pretrained(
        model,
        options=options,
        dtype=dense_dtype,
        chat_template=template,
        host_experts=host_experts,
        trust_remote_code=trust_remote_code,
    )
    if decodes and host_threads.is_small(loaded.model):
        host_threads.choose_threads(threads, small=True)
    return loaded


def parse_dense_dtype(name: str, model: str | None) -> torch.dtype:
    """Returns the dtype that `--dtype` names; "auto" depends on `model`.

    Raises:
        InputError: `name` is not in `DTYPES`.
        FileNotFoundError, CheckpointError: "auto", and config.json is missing or damaged.
    """
    if name != _AUTO:
        return parse_dtype(name, DTYPES)
    from cpumoe import embedded
    from cpumoe.checkpoint.config import exact_dtype
    from cpumoe.checkpoint.shards import read_config

    return exact_dtype(read_config(embedded.model_path() if model is None else Path(model)))


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


def require_package(package: str, extra: str, purpose: str) -> None:
    """Refuses to go on without an optional package.

    Raises:
        InputError: the package is missing; the message says how to install it.
    """
    if importlib.util.find_spec(package) is None:
        raise InputError(
            f'{purpose} needs {package}, which is not installed: pip install "cpumoe[{extra}]"'
        )


def make_sampling(
    max_tokens: int | None,
    temperature: float | None,
    top_p: float | None,
    stop: list[str] | None,
    seed: int | None,
) -> Sampling:
    """Returns what the sampling options ask for.

    Raises:
        ValueError: a value is out of its range.
    """
    from cpumoe.text.generation import Sampling

    return Sampling(max_tokens, temperature, top_p, tuple(stop or ()), seed)
