"""Ports for servers whose port must be known before they start."""

import random
import socket
from pathlib import Path

_RANGE_OF_THE_SYSTEM = Path("/proc/sys/net/ipv4/ip_local_port_range")


def unused_port():
    """A free port of 127.0.0.1 below those that the system hands out.

    Other tests, which may run at the same time, let the system choose their ports.
    """
    end = max(2048, int(_RANGE_OF_THE_SYSTEM.read_text().split()[0]))
    while True:
        port = random.SystemRandom().randrange(1024, end)
        try:
            socket.create_server(("127.0.0.1", port)).close()
        except OSError:
            continue
        return port
