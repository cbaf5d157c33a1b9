"""Sockets that listen, and the connections that they accept."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import resource
import socket
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

from cpumoe.serving.errors import logger

_BACKLOG = 1024
# A random port that is free at one address may be taken at the other.
_PORT_ATTEMPTS = 16
# Names that mean an address of each family, whatever the system's table of hosts says.
_FAMILIES = {"localhost": ("127.0.0.1", "::1"), "::": ("::", "0.0.0.0")}
# How a system says that it lacks a family.
_LACKING = (errno.EAFNOSUPPORT, errno.EPROTONOSUPPORT, errno.EADDRNOTAVAIL)

# Connections inherit them. Without the first the end of an answer waits 40 ms for the client to
# acknowledge its beginning. The others notice within a minute that a client's computer is gone.
_OPTIONS = (
    (socket.IPPROTO_TCP, socket.TCP_NODELAY, 1),
    (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
    (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 30),
    (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 10),
    (socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 3),
)

# Descriptors that connections leave to the rest of the process: modules and files are opened later.
_SPARE_DESCRIPTORS = 16
_RETRY_SECONDS = 0.1
_LOG_SECONDS = 10.0


def open_sockets(host: str, port: int) -> list[socket.socket]:
    """Returns sockets that listen at all addresses of a host, at the same port.

    Where a host has addresses of a family that the system lacks, these are left out.

    Args:
        host: a name or an address; "localhost" and "::" mean both families.
        port: 0: any that is free.

    Raises:
        OSError: names the address.
    """
    try:
        addresses = _addresses(host, port)
        attempts = 1 if port else _PORT_ATTEMPTS
        for attempt in range(1, attempts + 1):
            try:
                return _listen(addresses)
            except OSError as error:
                if error.errno != errno.EADDRINUSE or attempt == attempts:
                    raise
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise OSError(f"cannot listen at {host} port {port}: {reason}") from error
    raise AssertionError("the last attempt returns or raises")


_Address = tuple[socket.AddressFamily, tuple[Any, ...]]


def _addresses(host: str, port: int) -> list[_Address]:
    return [
        (family, address)
        for name in _FAMILIES.get(host, (host,))
        for family, _, _, _, address in socket.getaddrinfo(
            name, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
    ]


def _listen(addresses: Sequence[_Address]) -> list[socket.socket]:
    lacking: OSError | None = None
    with contextlib.ExitStack() as opened:
        listeners: list[socket.socket] = []
        for family, (name, port, *scope) in addresses:
            port = listeners[0].getsockname()[1] if listeners else port
            try:
                listener = socket.create_server(
                    (name, port, *scope), family=family, backlog=_BACKLOG
                )
            except OSError as error:
                if error.errno not in _LACKING:
                    raise
                lacking = error
                continue
            listeners.append(opened.enter_context(listener))
            for level, option, value in _OPTIONS:
                listener.setsockopt(level, option, value)
            listener.setblocking(False)
        if lacking is not None and not listeners:
            raise lacking
        opened.pop_all()
        return listeners


class Acceptor:
    """Accepts connections as long as there are descriptors for them.

    asyncio's own servers try thousands of times a second to accept where there is none left, and
    log each of them. Here the others wait in the system's queue until a connection ends.
    """

    def __init__(
        self,
        listeners: Sequence[socket.socket],
        make_protocol: Callable[[], asyncio.BaseProtocol],
        count_connections: Callable[[], int],
    ) -> None:
        """Starts to accept, in the running event loop.

        Args:
            listeners: as `open_sockets` returns them.
            make_protocol: makes what handles a connection.
            count_connections: returns how many connections there are.
        """
        self._make_protocol = make_protocol
        self._count_connections = count_connections
        self._most = _spare_descriptors()
        self._logged = -_LOG_SECONDS
        self._tasks = [asyncio.create_task(self._accept_all(listener)) for listener in listeners]

    def close(self) -> None:
        """Accepts no more."""
        for task in self._tasks:
            task.cancel()

    async def _accept_all(self, listener: socket.socket) -> None:
        while True:
            if self._count_connections() >= self._most:
                await self._pause(f"{self._most} are open, as many as the limit of files allows")
                continue
            try:
                await self._accept(listener)
            except ConnectionError:
                continue  # the client has gone already
            except OSError as error:
                await self._pause(error.strerror or str(error))

    async def _accept(self, listener: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        connection, _ = await loop.sock_accept(listener)
        try:
            await loop.connect_accepted_socket(self._make_protocol, connection)
        except BaseException:
            connection.close()
            raise

    async def _pause(self, why: str) -> None:
        now = time.monotonic()
        if now - self._logged >= _LOG_SECONDS:
            self._logged = now
            logger.warning("new connections have to wait: %s", why)
        await asyncio.sleep(_RETRY_SECONDS)


def _spare_descriptors() -> int:
    """How many connections the limit of open files leaves room for."""
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if limit == resource.RLIM_INFINITY:
        return sys.maxsize
    return max(1, limit - len(os.listdir("/proc/self/fd")) - _SPARE_DESCRIPTORS)
