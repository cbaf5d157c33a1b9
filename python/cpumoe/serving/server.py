"""Runs an application until a signal ends it, without cutting answers off if it can be helped."""

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

from cpumoe.serving.listening import Acceptor
from cpumoe.serving.service import Service
from cpumoe.serving.settings import DEFAULT_GRACE_SECONDS

# For clients that read the end of their answer slowly, after the model has stopped.
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
        app: what to serve.
        listeners: where, as `open_sockets` returns them; closed at the end.
        grace_seconds: until the running generation is cancelled.
        access_log: write a line per request to standard output.
        on_ready: called when requests are being answered.

    Raises:
        WorkerError: nothing can be answered any more.
    """
    service: Service = app.state.service
    server = Server(make_config(app, access_log), service, grace_seconds, on_ready)
    server.run([*listeners])
    if server.broken:
        raise WorkerError(
            "the thread that runs the model has ended: the server cannot go on; start it again"
        )
    if service.worker.alive:
        # It still computes something that nothing can interrupt; the interpreter's own end would
        # pull the libraries from under it.
        _exit(0)


def make_config(app: FastAPI, access_log: bool) -> uvicorn.Config:
    """Returns Uvicorn's configuration for an application."""
    return uvicorn.Config(
        app,
        # Chosen here, so that the server behaves the same whatever else is installed.
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
    """Uvicorn's HTTP, less connections that do not finish a request's head in time."""

    _deadline: asyncio.TimerHandle | None = None

    def get_buffer(self, sizehint: int) -> bytearray:
        # As much as is read before others have their turn: what comes in tiny chunks takes a
        # thousand times as long to take apart as what comes in large ones.
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
    """Uvicorn, with its signals turned into a return."""

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
        """Returns whether it is time to end: after a signal, or if nothing can be answered."""
        self.broken = self._service.worker.broken
        return await super().on_tick(counter) or self.broken

    async def main_loop(self) -> None:
        """Serves until a signal, and then what is running."""
        await super().main_loop()
        # The sockets are still open: whoever comes now is told that the server is stopping.
        await self._service.worker.drain(self._grace_seconds)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Closes the sockets, and connections when their answers are sent."""
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
        """Asks for the end, or at the second time forces it."""
        if self.should_exit:
            _exit(128 + sig)
        self.should_exit = True


def _exit(status: int) -> None:
    """Ends the process whatever its threads do."""
    with contextlib.suppress(OSError, ValueError):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(status)


def _log_config() -> dict[str, Any]:
    """Uvicorn's, with our errors beside its own, and without what it says at start and end."""
    config = copy.deepcopy(uvicorn.config.LOGGING_CONFIG)
    config["loggers"]["uvicorn.error"]["level"] = "WARNING"
    config["loggers"]["cpumoe.serving"] = {"handlers": ["default"], "propagate": False}
    return config
