"""Runs an application until a signal ends it, and lets running answers finish if possible."""

from __future__ import annotations

import asyncio
import contextlib
import copy
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from types import FrameType
from typing import Any

import uvicorn
import uvicorn.config
from fastapi import FastAPI
from uvicorn.protocols.http.h11_impl import H11Protocol, RequestResponseCycle

from cpumoe.text.serving.listening import Acceptor
from cpumoe.text.serving.service import Service
from cpumoe.text.serving.settings import DEFAULT_GRACE_SECONDS

# Time for clients to read the end of their answers after the model has stopped.
_SEND_SECONDS = 5
_HEAD_SECONDS = 30
_READ_BYTES = 1 << 14


class WorkerError(RuntimeError):
    """The server has lost the thread that runs the model."""


def serve(
    app: FastAPI,
    listeners: Sequence[socket.socket],
    *,
    grace_seconds: float = DEFAULT_GRACE_SECONDS,
    access_log: bool = True,
    on_ready: Callable[[], None] = lambda: None,
) -> None:
    """Serves an application of `create_app` until SIGINT or SIGTERM.

    The first signal refuses new requests, gives the running generation `grace_seconds` to finish,
    and returns. A second one ends the process at once.

    Args:
        app: the application.
        listeners: sockets from `open_sockets`, which are closed at the end.
        grace_seconds: time until the running generation is cancelled.
        access_log: whether to write a line per request to standard output.
        on_ready: called when the server answers requests.

    Raises:
        WorkerError: the server cannot answer requests any more.
    """
    service: Service = app.state.service
    server = Server(make_config(app, access_log), service, grace_seconds, on_ready)
    server.run([*listeners])
    if server.broken:
        raise WorkerError(
            "the thread that runs the model has ended, so the server cannot go on; start it again"
        )
    if service.worker.alive:
        # The thread is in a computation that cannot be interrupted. A normal exit would unload
        # libraries that the thread uses.
        _exit(0)


def make_config(app: FastAPI, access_log: bool) -> uvicorn.Config:
    """Returns Uvicorn's configuration for an application."""
    return uvicorn.Config(
        app,
        # Chosen here, so that the server does not depend on other installed packages.
        http=_Protocol,
        ws="none",
        loop="asyncio",
        lifespan="on",
        access_log=access_log,
        log_config=_log_config(),
        timeout_graceful_shutdown=_SEND_SECONDS,
        server_header=False,
    )


class _Protocol(asyncio.BufferedProtocol, H11Protocol):  # type: ignore[misc]
    """Uvicorn's HTTP protocol. Closes connections that do not finish a request's head in time."""

    _deadline: asyncio.TimerHandle | None = None

    def get_buffer(self, sizehint: int) -> bytearray:
        # This many bytes are read before other connections have their turn. Parsing tiny chunks
        # would take a thousand times as long.
        self._buffer = bytearray(_READ_BYTES)
        return self._buffer

    def buffer_updated(self, nbytes: int) -> None:
        self.data_received(bytes(memoryview(self._buffer)[:nbytes]))

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._watch_head()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_watching()
        super().connection_lost(exc)

    def _watch_head(self) -> None:
        request: RequestResponseCycle | None = self.cycle
        if (request and not request.response_complete) or self.transport.is_closing():
            self._stop_watching()
        elif self._deadline is None:
            self._deadline = self.loop.call_later(_HEAD_SECONDS, self.transport.close)

    def _stop_watching(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None


class Server(uvicorn.Server):
    """A Uvicorn server that returns after a signal."""

    def __init__(
        self,
        config: uvicorn.Config,
        service: Service,
        grace_seconds: float,
        on_ready: Callable[[], None],
    ) -> None:
        """Prepares a server; see `serve` for the arguments."""
        super().__init__(config)
        self._service = service
        self._grace_seconds = grace_seconds
        self._on_ready = on_ready
        self.broken = False

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Starts the application and opens it to clients."""
        await super().startup([])
        self._acceptor = Acceptor(
            sockets or [],
            lambda: _Protocol(self.config, self.server_state, self.lifespan.state),
            lambda: len(self.server_state.connections),
        )
        self._on_ready()

    async def on_tick(self, counter: int) -> bool:
        """Returns whether to end: after a signal, or if the worker is broken."""
        self.broken = self._service.worker.broken
        return await super().on_tick(counter) or self.broken

    async def main_loop(self) -> None:
        """Serves until a signal, and then finishes the running answer."""
        await super().main_loop()
        # The sockets are still open, so that new clients are told that the server is stopping.
        await self._service.worker.drain(self._grace_seconds)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Closes the sockets, and the connections after their answers are sent."""
        self._acceptor.close()
        await super().shutdown(sockets)

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Handles signals inside the block, and does not raise them again after it."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        signals = (signal.SIGINT, signal.SIGTERM)
        previous = {number: signal.signal(number, self.handle_exit) for number in signals}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Requests the end; the second signal forces it."""
        if self.should_exit:
            _exit(128 + sig)
        self.should_exit = True


def _exit(status: int) -> None:
    """Ends the process regardless of its threads."""
    with contextlib.suppress(OSError, ValueError):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(status)


def _log_config() -> dict[str, Any]:
    """Returns Uvicorn's logging with cpumoe's errors, without messages at start and end."""
    config = copy.deepcopy(uvicorn.config.LOGGING_CONFIG)
    config["loggers"]["uvicorn.error"]["level"] = "WARNING"
    config["loggers"]["cpumoe.text.serving"] = {"handlers": ["default"], "propagate": False}
    return config
