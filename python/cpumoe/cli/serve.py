"""``cpumoe serve``: a model behind OpenAI's and SGLang's HTTP protocols."""

from __future__ import annotations

import contextlib
import ipaddress
import socket
from collections.abc import Sequence
from typing import Annotated

import typer

from cpumoe.cli import console
from cpumoe.cli.errors import InputError, reported
from cpumoe.cli.options import ThreadsOption, TracebackOption
from cpumoe.cli.text_model import (
    DEFAULT_DTYPE,
    DEFAULT_PRECISION,
    ChatTemplateOption,
    DtypeOption,
    ModelArgument,
    OneIsaOption,
    OnePrecisionOption,
    TrustRemoteCodeOption,
    load_text_model,
    require_package,
)
from cpumoe.text.serving.settings import (
    DEFAULT_GRACE_SECONDS,
    DEFAULT_MAX_REQUEST_BYTES,
    DEFAULT_QUEUE,
    Settings,
)

# The exit status of a server that ends without having been told to.
_FAILED = 1
EXAMPLE = "Example: `cpumoe serve --port 8000`"


def command(
    model: ModelArgument = None,
    host: Annotated[
        str,
        typer.Option(
            metavar="ADDRESS", help="Address to listen on. localhost and :: mean IPv4 and IPv6."
        ),
    ] = "127.0.0.1",
    port: Annotated[
        int, typer.Option(min=0, max=65535, metavar="N", help="Port. 0: any free one.")
    ] = 8000,
    served_model_name: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Name of the model for clients.",
            show_default="the checkpoint's name",
        ),
    ] = None,
    api_key: Annotated[
        str | None,
        typer.Option(
            metavar="KEY",
            envvar="CPUMOE_API_KEY",
            show_envvar=True,
            help="Key that clients must send. The environment variable hides it from `ps`.",
            show_default="clients need none",
        ),
    ] = None,
    queue: Annotated[
        int, typer.Option(min=0, metavar="N", help="Largest number of waiting requests.")
    ] = DEFAULT_QUEUE,
    max_tokens: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="N",
            help="Largest number of new tokens per request.",
            show_default="as many as the context has room for",
        ),
    ] = None,
    max_request_bytes: Annotated[
        int, typer.Option(min=1, metavar="N", help="Largest size of a request.")
    ] = DEFAULT_MAX_REQUEST_BYTES,
    grace: Annotated[
        float,
        typer.Option(
            metavar="SECONDS", help="Time for the running answer to finish after a signal."
        ),
    ] = DEFAULT_GRACE_SECONDS,
    quiet: Annotated[
        bool, typer.Option("--quiet", "-q", help="Do not print a line for each request.")
    ] = False,
    threads: ThreadsOption = None,
    precision: OnePrecisionOption = DEFAULT_PRECISION,
    isa: OneIsaOption = None,
    dtype: DtypeOption = DEFAULT_DTYPE,
    chat_template: ChatTemplateOption = None,
    trust_remote_code: TrustRemoteCodeOption = False,
    traceback: TracebackOption = False,
) -> None:
    """Serve a model over HTTP with OpenAI's API and SGLang's /generate.

    Requests are answered one at a time, and the others wait. The first SIGINT or SIGTERM lets the
    running answer finish. The second one stops it.
    """
    with reported(traceback):
        for package in ("fastapi", "uvicorn"):
            require_package(package, "serve", "the server")
        from cpumoe.text.serving.app import create_app
        from cpumoe.text.serving.listening import open_sockets
        from cpumoe.text.serving.server import WorkerError, serve

        if not grace >= 0:  # nor NaN
            raise InputError(f"--grace: expected 0 or more seconds, got {grace}")
        settings = Settings(served_model_name, api_key, queue, max_tokens, max_request_bytes)
        # Sockets are opened before the model is loaded, which may take minutes: an address in
        # use is reported at once.
        with contextlib.ExitStack() as opened:
            listeners = [opened.enter_context(one) for one in open_sockets(host, port)]
            if api_key is None and not all(map(_is_loopback, listeners)):
                console.print_warning(
                    f"{host} can be reached from other computers, so anybody can use the model; "
                    "set --api-key to require a key"
                )
            app = create_app(
                load_text_model(
                    model,
                    threads=threads,
                    precision=precision,
                    isa=isa,
                    dtype=dtype,
                    chat_template=chat_template,
                    trust_remote_code=trust_remote_code,
                ),
                settings,
            )
            name = app.state.service.name
            urls = " and ".join(_urls(host, listeners))
            try:
                serve(
                    app,
                    listeners,
                    grace_seconds=grace,
                    access_log=not quiet,
                    on_ready=lambda: console.announce(
                        f"serving {name} at {urls} (Ctrl-C stops it)"
                    ),
                )
            except WorkerError as error:
                console.print_error(str(error))
                raise typer.Exit(_FAILED) from None


def _is_loopback(listener: socket.socket) -> bool:
    return ipaddress.ip_address(listener.getsockname()[0].split("%")[0]).is_loopback


def _urls(host: str, listeners: Sequence[socket.socket]) -> list[str]:
    """Returns URLs for clients: with the host's name if it was given, else with each address."""
    names = [listener.getsockname()[:2] for listener in listeners]
    try:
        ipaddress.ip_address(host.split("%")[0])
    except ValueError:
        names = [(host, names[0][1])]
    return [f"http://[{n}]:{p}/v1" if ":" in n else f"http://{n}:{p}/v1" for n, p in names]
