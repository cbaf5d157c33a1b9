"""``cpumoe serve``: a model behind OpenAI's and SGLang's HTTP protocols."""

from __future__ import annotations

import contextlib
import ipaddress
import socket
from collections.abc import Sequence
from typing import Annotated

import typer

from cpumoe.cli import console
from cpumoe.cli.errors import InputError, reported, require_package
from cpumoe.cli.options import TracebackOption, count_option, value_option
from cpumoe.cli.text_model import LoadingOptions, ModelArgument, join_ranks, load_text_model
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
        str, value_option("ADDRESS", "Address to listen on. localhost and :: mean IPv4 and IPv6.")
    ] = "127.0.0.1",
    port: Annotated[int, value_option("N", "Port. 0: any free one.", min=0, max=65535)] = 8000,
    served_model_name: Annotated[
        str | None, value_option("NAME", "Name of the model for clients.", "the checkpoint's name")
    ] = None,
    api_key: Annotated[
        str | None,
        value_option(
            "KEY",
            "Key that clients must send. The environment variable hides it from `ps`.",
            "clients need none",
            envvar="CPUMOE_API_KEY",
            show_envvar=True,
        ),
    ] = None,
    queue: Annotated[
        int, count_option("Largest number of waiting requests.", least=0)
    ] = DEFAULT_QUEUE,
    max_tokens: Annotated[
        int | None,
        count_option(
            "Largest number of new tokens per request.", "as many as the context has room for"
        ),
    ] = None,
    max_request_bytes: Annotated[
        int, count_option("Largest size of a request.")
    ] = DEFAULT_MAX_REQUEST_BYTES,
    grace: Annotated[
        float, value_option("SECONDS", "Time for the running answer to finish after a signal.")
    ] = DEFAULT_GRACE_SECONDS,
    quiet: Annotated[
        bool, typer.Option("--quiet", "-q", help="Do not print a line for each request.")
    ] = False,
    *,
    loading: LoadingOptions,
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
        join_ranks(model, loading)
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
            app = create_app(load_text_model(model, loading), settings)
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
