"""Notices that a rank has ended, whatever the ranks are doing.

Each rank has a connection to rank 0. A connection ends with its process, and the system ends it
some seconds after a machine or the network has gone. A rank that fails says why before it ends.
Rank 0 tells the others. So each rank learns which one ended, within seconds.
"""

from __future__ import annotations

import contextlib
import json
import selectors
import socket
import threading
from collections.abc import Callable, Sequence

from cpumoe.distributed.agreement import RanksError

# A machine that does not answer for this long counts as gone.
_SILENCE_SECONDS = 6
_CONNECT_SECONDS = 30
# How long a rank that leaves waits for the others to leave, too. Until then it keeps its other
# connections: Gloo drops what a connection has not delivered when it is closed. A rank may take a
# while, because it frees its experts, and because its machine may be busy.
_LEAVE_SECONDS = 120
_BACKLOG = 1024
_MOST_BYTES = 1 << 16

# What a message says: the rank ends as planned, or a rank has failed.
_DONE, _FAILED = "done", "failed"


class Watch:
    """The connections of this rank, and a thread that waits for their end."""

    def __init__(
        self,
        connections: dict[int, socket.socket],
        names: Sequence[str],
        on_end: Callable[[str, bool], None] | None,
    ) -> None:
        """Starts the thread.

        Args:
            connections: for each other rank that this one watches, the connection to it.
            names: what to call each rank.
            on_end: called in the thread, once, when a rank has ended: with a message, and whether
                rank 0 has sent the message and so has shown it.
        """
        self._connections = connections
        self._names = names
        self._on_end = on_end
        self._wake, self._woken = socket.socketpair()
        self._lost: str | None = None
        self._lost_event = threading.Event()
        for connection in connections.values():
            _notice_silence(connection)
        self._thread = threading.Thread(target=self._run, name="cpumoe-ranks", daemon=True)
        self._thread.start()

    def lost(self, seconds: float) -> str | None:
        """Returns why a rank has ended, and waits at most so long to learn it; None: none has."""
        self._lost_event.wait(seconds)
        return self._lost

    def fail(self, message: str) -> None:
        """Tells the other ranks that this one fails."""
        self._tell({"what": _FAILED, "message": message})

    def close(self) -> None:
        """Tells the other ranks that this one ends as planned, and waits until they do as well."""
        self._tell({"what": _DONE})
        self._thread.join(_LEAVE_SECONDS)
        self._wake.close()
        self._thread.join()
        for connection in self._connections.values():
            connection.close()

    def _tell(self, message: dict[str, str], but: int | None = None) -> None:
        line = json.dumps(message).encode() + b"\n"
        for rank, connection in self._connections.items():
            if rank != but:
                _send(connection, line)

    def _run(self) -> None:
        watched = set(self._connections)
        with selectors.DefaultSelector() as selector, self._woken:
            selector.register(self._woken, selectors.EVENT_READ, None)
            for rank, connection in self._connections.items():
                selector.register(connection, selectors.EVENT_READ, rank)
            while watched:
                for key, _ in selector.select():
                    rank = key.data
                    if rank is None:  # this rank ends
                        return
                    line, ended, _ = _received(self._connections[rank]).partition(b"\n")
                    if not ended:  # so has the connection
                        self._end(rank, f"{self._names[rank]} has ended or cannot be reached")
                        return
                    message = json.loads(line)
                    if message["what"] == _FAILED:
                        self._end(rank, message["message"], told=rank == 0)
                        return
                    watched.remove(rank)
                    selector.unregister(self._connections[rank])

    def _end(self, rank: int, message: str, *, told: bool = False) -> None:
        self._lost = message
        self._lost_event.set()
        self._tell({"what": _FAILED, "message": message}, but=rank)
        if self._on_end is not None:
            self._on_end(message, told)


def _received(connection: socket.socket) -> bytes:
    """Returns a whole line from a connection; nothing, or part of a line: the connection ended."""
    data = b""
    while not data.endswith(b"\n"):
        try:
            more = connection.recv(_MOST_BYTES)
        except OSError:
            more = b""
        if not more:
            break
        data += more
    return data


def listen(address: str) -> socket.socket:
    """Returns rank 0's listening socket."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    return socket.create_server((address, 0), family=family, backlog=_BACKLOG)


def accept(listener: socket.socket, world: int) -> dict[int, socket.socket]:
    """Returns the connections of all other ranks.

    Raises:
        RanksError: a rank does not come.
    """
    listener.settimeout(_CONNECT_SECONDS)
    connections: dict[int, socket.socket] = {}
    while len(connections) < world - 1:
        try:
            connection, _ = listener.accept()
        except TimeoutError:
            missing = next(rank for rank in range(1, world) if rank not in connections)
            raise RanksError(
                f"rank {missing} did not connect to rank 0 within {_CONNECT_SECONDS} seconds"
            ) from None
        connection.settimeout(_CONNECT_SECONDS)
        rank = int.from_bytes(_exactly(connection, 4), "little")
        connection.settimeout(None)
        connections[rank] = connection
    return connections


def connect(address: tuple[str, int], rank: int) -> dict[int, socket.socket]:
    """Returns the connection to rank 0.

    Raises:
        OSError: rank 0 cannot be reached.
    """
    connection = socket.create_connection(address, timeout=_CONNECT_SECONDS)
    connection.sendall(rank.to_bytes(4, "little"))
    connection.settimeout(None)
    return {0: connection}


def local_address(of: str) -> str:
    """Returns the address by which other machines reach this one.

    Args:
        of: a host that all ranks can reach. No packet is sent to it.

    Raises:
        OSError: the host has no address that this machine can reach.
    """
    error: OSError | None = None
    for family, kind, protocol, _, address in socket.getaddrinfo(of, 1, type=socket.SOCK_DGRAM):
        try:
            with socket.socket(family, kind, protocol) as probe:
                probe.connect(address)
                return str(probe.getsockname()[0])
        except OSError as each:  # for example if this machine has no IPv6
            error = each
    raise error or OSError(f"{of} has no address")


def _exactly(connection: socket.socket, count: int) -> bytes:
    data = b""
    while len(data) < count:
        more = connection.recv(count - len(data))
        if not more:
            raise RanksError("a rank ended while it connected to rank 0")
        data += more
    return data


def _send(connection: socket.socket, line: bytes) -> None:
    with contextlib.suppress(OSError):  # who reads notices the end
        connection.sendall(line)


def _notice_silence(connection: socket.socket) -> None:
    """Lets the system end a connection whose other machine does not answer."""
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in (
        (socket.TCP_KEEPIDLE, 2),
        (socket.TCP_KEEPINTVL, 1),
        (socket.TCP_KEEPCNT, _SILENCE_SECONDS - 2),
        (socket.TCP_USER_TIMEOUT, 1000 * _SILENCE_SECONDS),
    ):
        connection.setsockopt(socket.IPPROTO_TCP, option, value)
