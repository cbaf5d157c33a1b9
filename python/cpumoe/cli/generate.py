"""``cpumoe generate``: continues a text."""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cpumoe.cli import console
from cpumoe.cli.errors import InputError, reported
from cpumoe.cli.options import JsonOption, TracebackOption, count_option, value_option
from cpumoe.cli.text_model import (
    LoadingOptions,
    ModelArgument,
    SamplingOptions,
    join_ranks,
    load_text_model,
    read_text,
)

if TYPE_CHECKING:
    from cpumoe.text.generation import Generation, Piece, Prompt, TextModel

EXAMPLE = 'Example: `cpumoe generate -p "In the beginning"`'

_STANDARD_INPUT = "-"
DEFAULT_MAX_TOKENS = 256


def command(
    model: ModelArgument = None,
    prompt: Annotated[
        str | None, typer.Option("--prompt", "-p", metavar="TEXT", help="Text to continue.")
    ] = None,
    prompt_file: Annotated[
        str | None, value_option("FILE", "File with the prompt. -: standard input.")
    ] = None,
    chat: Annotated[
        bool,
        typer.Option("--chat", help="Answer the prompt in the model's chat format."),
    ] = False,
    max_tokens: Annotated[int, count_option("Largest number of new tokens.")] = DEFAULT_MAX_TOKENS,
    *,
    sampling: SamplingOptions,
    loading: LoadingOptions,
    json_output: JsonOption = False,
    traceback: TracebackOption = False,
) -> None:
    """Continue a text token by token, and show the speed.

    The text goes to standard output as it is generated. Reasoning and speed go to standard error.
    "experts" is the share of the time spent in routed experts. Attention, dense layers and all else
    take the rest, whether cpumoe or transformers computes them.
    """
    with reported(traceback):
        if loading.chat_template is not None and not chat:
            raise InputError("--chat-template needs --chat")
        join_ranks(model, loading)
        text = _prompt(prompt, prompt_file)
        how = sampling.sampling(max_tokens)
        loaded = load_text_model(model, loading)
        encoded = encode(loaded, text, chat)
        if json_output:
            result = loaded.generate(encoded, how)
            console.show_json({"model": loaded.name, "prompt": text, **document(result)})
            return
        if not chat:
            write(text)
        writer = ReplyWriter()
        result = loaded.generate(encoded, how, on_piece=writer)
        writer.end()
        if result.reasoning and not result.text:
            console.print_warning("the model wrote reasoning, but no answer")
        console.show_aside(speed_line(result))


def encode(model: TextModel, text: str, chat: bool) -> Prompt:
    """Returns a prompt, as a text to continue or as a question to answer."""
    return model.encode_chat([{"role": "user", "content": text}]) if chat else model.encode(text)


def write(text: str) -> None:
    """Writes a piece of generated text immediately; to a terminal, without control characters."""
    sys.stdout.write(console.without_controls(text) if sys.stdout.isatty() else text)
    sys.stdout.flush()


class ReplyWriter:
    """Writes a reply as it comes: the answer to standard output, reasoning to standard error."""

    def __init__(self) -> None:
        """Begins."""
        self._reasons = False

    def __call__(self, piece: Piece) -> None:
        """Writes a piece."""
        if piece.reasoning:
            console.show_dim(piece.reasoning, aside=True)
            self._reasons = True
        if piece.text:
            self._end_reasoning()
            write(piece.text)

    def end(self) -> None:
        """Ends the last line."""
        self._end_reasoning()
        write("\n")

    def _end_reasoning(self) -> None:
        if self._reasons:
            console.show_dim("\n", aside=True)
            self._reasons = False


def speed_line(result: Generation) -> str:
    """Returns both phases' speed in tokens/s, and the experts' share of the time."""
    speeds = document(result)
    seconds = result.prefill_seconds + result.decode_seconds
    parts = [
        _speed("prefill", result.prompt_tokens, speeds["prefill_tokens_per_second"]),
        _speed("decode", result.completion_tokens, speeds["decode_tokens_per_second"]),
        f"experts {console.format_percent(result.experts_seconds / seconds)} of the time",
    ]
    return "; ".join(parts)


def document(result: Generation) -> dict[str, object]:
    """Returns what ``--json`` prints of a generation."""
    decoded = result.completion_tokens - 1  # prefill computes the first token
    given = asdict(result)
    for unasked in ("logprobs", "prompt_logprobs"):
        del given[unasked]
    return {
        **given,
        "prefill_tokens_per_second": result.prompt_tokens / result.prefill_seconds,
        "decode_tokens_per_second": decoded / result.decode_seconds if decoded > 0 else None,
    }


def _speed(phase: str, tokens: int, rate: object) -> str:
    count = f"{phase} {console.format_count(tokens, 'token')}"
    return f"{count}, {console.format_number(rate)} tokens/s" if isinstance(rate, float) else count


def _prompt(text: str | None, file: str | None) -> str:
    if (text is None) == (file is None):
        raise InputError("expected either --prompt TEXT or --prompt-file FILE")
    if text is None:
        assert file is not None
        text = _read_pipe() if file == _STANDARD_INPUT else read_text(Path(file), "--prompt-file")
    if not text:
        raise InputError("--prompt: expected some text, got none")
    return text


def _read_pipe() -> str:
    try:
        return sys.stdin.read()
    except UnicodeDecodeError as error:
        raise InputError(f"--prompt-file: standard input: expected UTF-8 text: {error}") from None
