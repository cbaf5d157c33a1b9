"""Opens listening sockets and accepts connections."""

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

from cpumoe.text.serving.errors import logger

_BACKLOG = 1024
# A random port that is free at one address may be taken at the other.
_PORT_ATTEMPTS = 16
# Names that mean an address of each family, whatever the system's hosts table has.
_FAMILIES = {"localhost": ("127.0.0.1", "::1"), "::": ("::", "0.0.0.0")}
# Errors of a system that lacks an address family.
_LACKING = (errno.EAFNOSUPPORT, errno.EPROTONOSUPPORT, errno.EADDRNOTAVAIL)

# Connections inherit these options. Without the first, the end of an answer waits 40 ms for the
# client's acknowledgement of its beginning. The others detect within a minute that a client's
# computer is gone.
_OPTIONS = (
    (socket.IPPROTO_TCP, socket.TCP_NODELAY, 1),
    (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
    (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 30),
    (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 10),
    (socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 3),
)

# Descriptors that connections leave for modules and files that are opened later.
_SPARE_DESCRIPTORS = 16
_RETRY_SECONDS = 0.1
_LOG_SECONDS = 10.0


def open_sockets(host: str, port: int) -> list[socket.socket]:
    """Returns sockets that listen on one port of all addresses of a host.

    Addresses of a family that the system lacks are left out.

    Args:
        host: a name or an address; "localhost" and "::" mean both families.
        port: the port; 0: any free one.

    Raises:
        OSError: a socket cannot listen; the message names the address.
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
        raise OSError(f"cannot listen on {host} port {port}: {reason}") from error
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
    """Accepts connections as long as there are free descriptors.

    Without a free descriptor, asyncio's own servers try to accept thousands of times a second, and
    log each attempt. This class leaves new connections in the system's queue until one ends.
    """

    def __init__(
        self,
        listeners: Sequence[socket.socket],
        make_protocol: Callable[[], asyncio.BaseProtocol],
        count_connections: Callable[[], int],
    ) -> None:
        """Starts to accept, in the running event loop.

        Args:
            listeners: sockets from `open_sockets`.
            make_protocol: makes the protocol of a connection.
            count_connections: returns the number of open connections.
        """
        self._make_protocol = make_protocol
        self._count_connections = count_connections
        self._most = _spare_descriptors()
        self._logged = -_LOG_SECONDS
        self._tasks = [asyncio.create_task(self._accept_all(listener)) for listener in listeners]

    def close(self) -> None:
        """Stops accepting."""
        for task in self._tasks:
            task.cancel()

    async def _accept_all(self, listener: socket.socket) -> None:
        while True:
            if self._count_connections() >= self._most:
                await self._pause(
                    f"{self._most} are open, and the limit of open files allows no more"
                )
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
            logger.warning("new connections must wait: %s", why)
        await asyncio.sleep(_RETRY_SECONDS)


def _spare_descriptors() -> int:
    """Returns how many connections the limit of open files allows."""
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if limit == resource.RLIM_INFINITY:
        return sys.maxsize
    return max(1, limit - len(os.listdir("/proc/self/fd")) - _SPARE_DESCRIPTORS)
