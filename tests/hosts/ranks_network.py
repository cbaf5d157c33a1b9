"""Ranks in two network namespaces, with a slow and lossy link between them.

    python tests/hosts/ranks_network.py [--delay-ms 5] [--loss 0.01] [--sums fixed]

Needs root, network namespaces and /dev/net/tun. Exit status 77: the machine does not have them. The
link is this process, which passes packets on from one namespace's device to the other's, later, and
drops some of them. So no kernel module for delays is needed. The text of two ranks must be that of
one process, and the end of a rank whose link is cut must be noticed.
"""

import argparse
import ctypes
import fcntl
import heapq
import os
import random
import select
import socket
import struct
import subprocess
import sys
import time
from contextlib import suppress

_TUNSETIFF = 0x400454CA
_IFF_TUN, _IFF_NO_PI = 0x0001, 0x1000
_CLONE_NEWNET = 0x40000000
_DEVICE = "t0"
_PORT = "29500"
_PACKET = 1 << 16
_UNSUPPORTED = 77
# A connection whose other end is silent for so long is given up.
_NOTICED_SECONDS = 15
PROMPT = ("-p", "In the beginning", "--temperature", "0", "--threads", "1")


def command(*arguments):
    return [sys.executable, "-m", "cpumoe", "generate", *PROMPT, *arguments]


class Node:
    """A process in a network namespace of its own, which runs a rank."""

    def __init__(self, rank, arguments):
        ours, theirs = socket.socketpair()
        self._process = os.fork()
        if self._process == 0:
            try:
                run_node(theirs, rank, arguments)
            finally:
                os._exit(1)
        theirs.close()
        try:
            _, (self.device,), _, _ = socket.recv_fds(ours, 1, 1)
        except ValueError:
            sys.stderr.write("ranks_network: no network namespaces or no /dev/net/tun: skipped\n")
            sys.exit(_UNSUPPORTED)
        self._results = ours

    def go(self):
        """Lets the rank start."""
        self._results.sendall(b"g")

    def result(self):
        """Exit status, standard output and standard error; None: it still runs."""
        if not select.select([self._results], [], [], 0)[0]:
            return None
        data = b""
        while more := self._results.recv(_PACKET):
            data += more
        status, out, err = data.split(b"\0")
        return int(status), out.decode(), err.decode()


def run_node(connection, rank, arguments):
    if ctypes.CDLL(None, use_errno=True).unshare(_CLONE_NEWNET) != 0:
        os._exit(1)
    device = os.open("/dev/net/tun", os.O_RDWR)
    fcntl.ioctl(device, _TUNSETIFF, struct.pack("16sH", _DEVICE.encode(), _IFF_TUN | _IFF_NO_PI))
    for words in (
        "link set lo up",
        f"addr add 10.9.0.{rank + 1}/24 dev {_DEVICE}",
        f"link set {_DEVICE} up",
    ):
        subprocess.run(["ip", *words.split()], check=True)
    socket.send_fds(connection, [b"d"], [device])
    connection.recv(1)
    done = subprocess.run(
        command(*arguments),
        env={
            **os.environ,
            "RANK": str(rank),
            "WORLD_SIZE": "2",
            "MASTER_ADDR": "10.9.0.1",
            "MASTER_PORT": _PORT,
            "GLOO_SOCKET_IFNAME": _DEVICE,
        },
        capture_output=True,
        check=False,
    )
    connection.sendall(b"\0".join((str(done.returncode).encode(), done.stdout, done.stderr)))
    connection.close()
    os._exit(0)


def connect(nodes, delay, loss, cut_after=None):
    """Passes packets on until both ranks have ended; returns their results and the end's delay."""
    # A link that waits for a busy machine's CPU would be a link that is cut: ranks give up one that
    # is silent for six seconds.
    with suppress(PermissionError):
        os.sched_setscheduler(0, os.SCHED_RR | os.SCHED_RESET_ON_FORK, os.sched_param(1))
    generator = random.Random(0)
    waiting, passed, results, cut = [], 0, [None, None], None
    other = {nodes[0].device: nodes[1].device, nodes[1].device: nodes[0].device}
    while None in results:
        pause = max(0.0, waiting[0][0] - time.monotonic()) if waiting else 0.2
        for device in select.select(list(other), [], [], min(pause, 0.2))[0]:
            packet = os.read(device, _PACKET)
            passed += 1
            if cut_after is not None and passed > cut_after:
                cut = cut or time.monotonic()
            if cut is None and generator.random() >= loss:
                heapq.heappush(waiting, (time.monotonic() + delay, passed, other[device], packet))
        while waiting and waiting[0][0] <= time.monotonic():
            _, _, device, packet = heapq.heappop(waiting)
            os.write(device, packet)
        results = [result or node.result() for result, node in zip(results, nodes, strict=True)]
    return results, None if cut is None else time.monotonic() - cut


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--delay-ms", type=float, default=5)
    parser.add_argument("--loss", type=float, default=0.01)
    parser.add_argument("--sums", default="fixed")
    options = parser.parse_args()
    arguments = ("--max-tokens", "12", "--sums", options.sums)
    alone = subprocess.run(command(*arguments), capture_output=True, text=True, check=True)
    nodes = [Node(rank, arguments) for rank in range(2)]
    for node in nodes:
        node.go()
    results, _ = connect(nodes, options.delay_ms / 1000, options.loss)
    assert [status for status, *_ in results] == [0, 0], results
    if options.sums == "fixed":
        assert results[0][1] == alone.stdout, results
    print(f"the text of one process: {results[0][2].strip().splitlines()[-1]}")

    nodes = [Node(rank, ("--max-tokens", "2000")) for rank in range(2)]
    for node in nodes:
        node.go()
    results, noticed = connect(nodes, 0.001, 0, cut_after=1500)
    assert all(status != 0 for status, *_ in results), results
    assert "rank 1 (" in results[0][2], results
    assert "has ended or cannot be reached" in results[0][2], results
    assert noticed < _NOTICED_SECONDS, noticed
    print(f"a cut link is noticed after {noticed:.1f} s: {results[0][2].strip().splitlines()[-1]}")


if __name__ == "__main__":
    main()
