"""``cpumoe chat``: a conversation in the terminal, or from a pipe."""

from __future__ import annotations

import contextlib
import io
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated

import typer

from cpumoe.cli import console
from cpumoe.cli.errors import InputError, reported, require_package
from cpumoe.cli.option_groups import changed_options
from cpumoe.cli.options import KEY_VARIABLE, TracebackOption, value_option
from cpumoe.cli.text_model import (
    LoadingOptions,
    MaxTokensOption,
    SamplingOptions,
    load_text_model,
)

if TYPE_CHECKING:
    from cpumoe.cli.chat_backends import Answer, ChatBackend
    from cpumoe.text.generation import Piece

EXAMPLE = "Example: `cpumoe chat http://127.0.0.1:8000`"
NOT_ANSWERED = 1
# Reading a long prompt may take minutes.
DEFAULT_TIMEOUT = 600.0


@dataclass(frozen=True)
class ServerOptions:
    """Which of a server's models answers, and how to ask."""

    api_key: Annotated[
        str | None,
        value_option(
            "KEY",
            "Key for the server. The environment variable hides it from `ps`.",
            "none",
            envvar=KEY_VARIABLE,
            show_envvar=True,
        ),
    ] = None
    model_name: Annotated[
        str | None, value_option("NAME", "Which of the server's models answers.", "the first")
    ] = None
    timeout: Annotated[
        float | None,
        value_option(
            "SECONDS", "Longest time that the server may be silent.", f"{DEFAULT_TIMEOUT:g}"
        ),
    ] = None


def command(
    context: typer.Context,
    target: Annotated[
        str | None,
        typer.Argument(
            metavar="MODEL|URL",
            help="A checkpoint folder, or the URL of a server with OpenAI's API.",
            show_default="the small model that comes with cpumoe",
        ),
    ] = None,
    system: Annotated[str | None, value_option("TEXT", "The system message.", "none")] = None,
    max_tokens: MaxTokensOption = None,
    *,
    sampling: SamplingOptions,
    server: ServerOptions,
    loading: LoadingOptions,
    traceback: TracebackOption = False,
) -> None:
    """Chat with a model, in this process or behind a URL.

    Ctrl-C stops an answer, Ctrl-D ends the chat, and /help lists the commands. If input comes from
    a pipe, each line is a question, and answers are printed without the model's reasoning. The exit
    code is 1 if a question from a pipe was not answered.

    Only a URL takes --api-key, --model-name and --timeout. Only a model in this process takes
    --threads, --precision, --isa, --dtype, --dense, --attention, --chat-template and
    --trust-remote-code. All other options are for both.
    """
    with reported(traceback):
        from cpumoe.cli.chat_backends import LocalBackend
        from cpumoe.cli.chat_session import Session

        how = sampling.sampling(max_tokens)
        backend: ChatBackend
        if target is not None and target.startswith(("http://", "https://")):
            _refuse(changed_options(loading), "a model in this process")
            backend = _server(target, server)
        else:
            key_source = context.get_parameter_source("api_key")
            from_environment = key_source is not None and key_source.name == "ENVIRONMENT"
            asked = replace(server, api_key=None) if from_environment else server
            _refuse(changed_options(asked), "a server")
            backend = LocalBackend(load_text_model(target, loading))
        terminal = sys.stdin.isatty() and sys.stdout.isatty()
        screen = _Terminal() if terminal else _Plain()
        session = Session(backend, screen, how, system)
        if terminal:
            screen.note(f"{backend.name}; /help lists commands, Ctrl-D ends the chat")
        for line in _typed_lines() if terminal else _piped_lines():
            if not session.enter(line):
                break
        if session.failures and not terminal:
            raise typer.Exit(NOT_ANSWERED)


def _server(url: str, options: ServerOptions) -> ChatBackend:
    from cpumoe.cli.chat_backends import ChatError
    from cpumoe.cli.chat_server import ServerBackend

    require_package("httpx2", "chat", "chatting with a server")
    seconds = DEFAULT_TIMEOUT if options.timeout is None else options.timeout
    if not 0 < seconds < math.inf:  # nor NaN
        raise InputError(f"--timeout: expected more than 0 seconds, got {seconds:g}")
    try:
        return ServerBackend(url, options.api_key, options.model_name, seconds)
    except ChatError as error:
        raise InputError(str(error)) from error


def _refuse(options: Sequence[str], use: str) -> None:
    """Refuses options that are for the other kind of model: in this process, or on a server."""
    if options:
        raise InputError(f"{options[0]} applies only to {use}; leave it out")


class _Plain:
    """Writes answers to standard output, and nothing else there."""

    def piece(self, piece: Piece) -> None:
        self._write(piece.text)

    def end_answer(self, answer: Answer | None) -> None:
        self._write("\n" if answer is not None else "")

    def note(self, message: str) -> None:
        typer.echo(message, err=True)

    def error(self, message: str) -> None:
        console.print_error(message)

    def _write(self, text: str) -> None:
        sys.stdout.write(text)
        sys.stdout.flush()


class _Terminal(_Plain):
    """For a terminal: shows reasoning before the answer, and the speed after it."""

    def __init__(self) -> None:
        self._reasons = False

    def piece(self, piece: Piece) -> None:
        if piece.reasoning:
            console.show_dim(piece.reasoning)
            self._reasons = True
        if piece.text and self._reasons:
            self._write("\n\n")
            self._reasons = False
        self._write(console.without_controls(piece.text))

    def end_answer(self, answer: Answer | None) -> None:
        self._reasons = False
        self._write("\n")
        if answer is not None:
            self.note(_describe(answer))

    def note(self, message: str) -> None:
        console.show_aside(message)


def _describe(answer: Answer) -> str:
    parts = []
    if answer.finish_reason != "stop":
        reasons = {"cancelled": "stopped", "length": "cut off: no room for more tokens"}
        parts.append(reasons.get(answer.finish_reason, answer.finish_reason))
    if answer.tokens is not None:
        parts.append(console.format_count(answer.tokens, "token"))
    if answer.tokens_per_second is not None:
        parts.append(f"{console.format_number(answer.tokens_per_second)} tokens/s")
    if answer.first_seconds:
        parts.append(f"first after {console.format_time(answer.first_seconds)}")
    return ", ".join(parts)


def _typed_lines() -> Iterator[str]:
    """Yields typed lines, with line editing. Ctrl-C discards a line."""
    # Where Python has readline, importing it gives `input` line editing and a history, unsaved.
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401

    while True:
        try:
            yield input("> ")
        except KeyboardInterrupt:
            typer.echo()
        except EOFError:
            typer.echo()
            return


def _piped_lines() -> Iterator[str]:
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="replace")
    yield from sys.stdin
