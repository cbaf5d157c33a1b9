"""``cpumoe chat``: a conversation in the terminal, or from a pipe."""

from __future__ import annotations

import contextlib
import io
import math
import sys
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Annotated

import typer

from cpumoe.cli import console
from cpumoe.cli.errors import InputError, reported
from cpumoe.cli.options import ThreadsOption, TracebackOption
from cpumoe.cli.text_model import (
    DEFAULT_DTYPE,
    DEFAULT_PRECISION,
    ChatTemplateOption,
    DtypeOption,
    MaxTokensOption,
    OneIsaOption,
    OnePrecisionOption,
    SeedOption,
    StopOption,
    TemperatureOption,
    TopPOption,
    TrustRemoteCodeOption,
    load_text_model,
    make_sampling,
    require_package,
)

if TYPE_CHECKING:
    from cpumoe.cli.chat_backends import Answer, ChatBackend
    from cpumoe.text.generation import Piece

EXAMPLE = "Example: `cpumoe chat http://127.0.0.1:8000`"
KEY_VARIABLE = "OPENAI_API_KEY"
NOT_ANSWERED = 1
# Reading a long prompt may take minutes.
DEFAULT_TIMEOUT = 600.0


def command(
    target: Annotated[
        str | None,
        typer.Argument(
            metavar="MODEL|URL",
            help="A checkpoint folder, or the URL of a server with OpenAI's API.",
            show_default="the small model that comes with cpumoe",
        ),
    ] = None,
    system: Annotated[
        str | None, typer.Option(metavar="TEXT", help="The system message.", show_default="none")
    ] = None,
    max_tokens: MaxTokensOption = None,
    temperature: TemperatureOption = None,
    top_p: TopPOption = None,
    seed: SeedOption = None,
    stop: StopOption = None,
    api_key: Annotated[
        str | None,
        typer.Option(
            metavar="KEY",
            envvar=KEY_VARIABLE,
            show_envvar=True,
            help="Key for the server. The environment variable hides it from `ps`.",
            show_default="none",
        ),
    ] = None,
    model_name: Annotated[
        str | None,
        typer.Option(
            metavar="NAME", help="Which of the server's models answers.", show_default="the first"
        ),
    ] = None,
    timeout: Annotated[
        float | None,
        typer.Option(
            metavar="SECONDS",
            help="Longest time that the server may be silent.",
            show_default=f"{DEFAULT_TIMEOUT:g}",
        ),
    ] = None,
    threads: ThreadsOption = None,
    precision: OnePrecisionOption = DEFAULT_PRECISION,
    isa: OneIsaOption = None,
    dtype: DtypeOption = DEFAULT_DTYPE,
    chat_template: ChatTemplateOption = None,
    trust_remote_code: TrustRemoteCodeOption = False,
    traceback: TracebackOption = False,
) -> None:
    """Chat with a model, in this process or behind a URL.

    Ctrl-C stops an answer, Ctrl-D ends the chat, and /help lists the commands. If input comes from
    a pipe, each line is a question, and answers are printed without the model's reasoning. The exit
    code is 1 if a question from a pipe was not answered.

    Only a URL takes --api-key, --model-name and --timeout. Only a model in this process takes
    --threads, --precision, --isa, --dtype, --chat-template and --trust-remote-code. All other
    options are for both.
    """
    with reported(traceback):
        from cpumoe.cli.chat_backends import ChatError, LocalBackend
        from cpumoe.cli.chat_server import ServerBackend
        from cpumoe.cli.chat_session import Session

        sampling = make_sampling(max_tokens, temperature, top_p, stop, seed)
        backend: ChatBackend
        if target is not None and target.startswith(("http://", "https://")):
            _refuse(
                {
                    "--threads": threads is not None,
                    "--precision": precision != DEFAULT_PRECISION,
                    "--isa": isa is not None,
                    "--dtype": dtype != DEFAULT_DTYPE,
                    "--chat-template": chat_template is not None,
                    "--trust-remote-code": trust_remote_code,
                },
                "a model in this process",
            )
            require_package("httpx2", "chat", "chatting with a server")
            seconds = DEFAULT_TIMEOUT if timeout is None else timeout
            if not 0 < seconds < math.inf:  # nor NaN
                raise InputError(f"--timeout: expected more than 0 seconds, got {seconds:g}")
            try:
                backend = ServerBackend(target, api_key, model_name, seconds)
            except ChatError as error:
                raise InputError(str(error)) from error
        else:
            _refuse(
                {"--model-name": model_name is not None, "--timeout": timeout is not None},
                "a server",
            )
            backend = LocalBackend(
                load_text_model(
                    target,
                    threads=threads,
                    precision=precision,
                    isa=isa,
                    dtype=dtype,
                    chat_template=chat_template,
                    trust_remote_code=trust_remote_code,
                )
            )
        terminal = sys.stdin.isatty() and sys.stdout.isatty()
        screen = _Terminal() if terminal else _Plain()
        session = Session(backend, screen, sampling, system)
        if terminal:
            screen.note(f"{backend.name}; /help lists commands, Ctrl-D ends the chat")
        for line in _typed_lines() if terminal else _piped_lines():
            if not session.enter(line):
                break
        if session.failures and not terminal:
            raise typer.Exit(NOT_ANSWERED)


def _refuse(given: Mapping[str, bool], use: str) -> None:
    """Refuses options that are for the other kind of model: in this process, or on a server."""
    for option, is_given in given.items():
        if is_given:
            raise InputError(f"{option} applies only to {use}; leave it out")


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
