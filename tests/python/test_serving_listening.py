"""Where a server listens, and how many connections it accepts."""

import contextlib
import errno
import re
import signal
import socket
import time

import httpx
import pytest
from serving_tools import Server, wait_for
from test_serving_process import serving

from cpumoe.text.serving import listening
from cpumoe.text.serving.listening import open_sockets

COMPLETIONS = "/v1/completions"


def has_ipv6():
    with contextlib.suppress(OSError), socket.create_server(("::1", 0), family=socket.AF_INET6):
        return True
    return False


needs_ipv6 = pytest.mark.skipif(not has_ipv6(), reason="this system has no IPv6")


@pytest.fixture
def opened():
    with contextlib.ExitStack() as stack:

        def open_at(*address):
            return [stack.enter_context(listener) for listener in open_sockets(*address)]

        yield open_at


@needs_ipv6
@pytest.mark.parametrize(
    ("host", "addresses"),
    [
        ("::", {"::", "0.0.0.0"}),
        ("localhost", {"::1", "127.0.0.1"}),
        ("::1", {"::1"}),
        ("127.0.0.1", {"127.0.0.1"}),
        ("0.0.0.0", {"0.0.0.0"}),
    ],
)
def test_a_host_is_listened_at_in_all_its_families_at_one_port(opened, host, addresses):
    names = [listener.getsockname()[:2] for listener in opened(host, 0)]
    assert {address for address, _ in names} == addresses
    assert len({port for _, port in names}) == 1


@pytest.mark.parametrize("code", [errno.EAFNOSUPPORT, errno.EADDRNOTAVAIL])
@pytest.mark.parametrize("host", ["::", "localhost"])
def test_a_family_that_the_system_lacks_is_left_out(monkeypatch, opened, host, code):
    create = socket.create_server

    def create_server(address, *, family, **options):
        if family == socket.AF_INET6:
            raise OSError(code, "no IPv6 here")
        return create(address, family=family, **options)

    monkeypatch.setattr(listening.socket, "create_server", create_server)
    (listener,) = opened(host, 0)
    assert listener.family == socket.AF_INET
    with pytest.raises(OSError, match="cannot listen on ::1 port 0: no IPv6 here"):
        opened("::1", 0)


@needs_ipv6
def test_a_random_port_is_free_in_both_families(monkeypatch, opened):
    create = socket.create_server
    made = []

    def create_server(address, **options):
        if len(made) == 1:
            made.append(None)
            raise OSError(errno.EADDRINUSE, "Address already in use")
        made.append(create(address, **options))
        return made[-1]

    monkeypatch.setattr(listening.socket, "create_server", create_server)
    first, second = opened("localhost", 0)
    assert first.getsockname()[1] == second.getsockname()[1]
    assert made[0].fileno() == -1
    with pytest.raises(OSError, match="Address already in use"):
        opened("localhost", first.getsockname()[1])


@needs_ipv6
def test_a_server_of_both_families_answers_in_both():
    with serving("--host", "::") as process:
        port = int(process.url.rsplit(":", 1)[1])
        assert f"http://[::]:{port}/v1 and http://0.0.0.0:{port}/v1 (Ctrl-C" in process.greeting
        for address in ("[::1]", "127.0.0.1"):
            reply = httpx.post(f"http://{address}:{port}{COMPLETIONS}", json={"prompt": "x"})
            assert reply.status_code == 200
        status, _, errors = process.end(signal.SIGTERM)
    assert status == 0
    assert errors.startswith("warning: :: can be reached from other computers")
    with serving("--host", "localhost") as process:
        assert re.search(r"at http://localhost:\d+/v1 \(Ctrl-C", process.greeting)
        assert process.end(signal.SIGTERM)[2] == ""


def test_a_client_whose_computer_is_gone_is_missed(opened):
    (listener,) = opened("127.0.0.1", 0)
    with socket.create_connection(listener.getsockname()):
        connection, _ = accept_soon(listener)
        with connection:
            assert connection.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
            idle, interval, count = (
                connection.getsockopt(socket.IPPROTO_TCP, option)
                for option in (socket.TCP_KEEPIDLE, socket.TCP_KEEPINTVL, socket.TCP_KEEPCNT)
            )
    assert idle + interval * count <= 60


def accept_soon(listener):
    listener.settimeout(5)
    return listener.accept()


def test_without_descriptors_connections_wait_and_the_log_stays_short():
    with serving("--quiet", descriptors=64) as process, contextlib.ExitStack() as stack:
        port = int(process.url.rsplit(":", 1)[1])
        idle = [
            stack.enter_context(socket.create_connection(("127.0.0.1", port))) for _ in range(80)
        ]
        with pytest.raises(httpx.TimeoutException):
            httpx.get(f"{process.url}/health", timeout=1)
        for connection in idle:
            connection.close()
        start = time.monotonic()
        reply = httpx.post(process.url + COMPLETIONS, json={"prompt": "x"}, timeout=20)
        assert reply.status_code == 200
        assert time.monotonic() - start < 5
        status, _, errors = process.end(signal.SIGTERM)
    assert status == 0
    (line,) = errors.splitlines()
    assert re.search(r"new connections must wait: \d+ are open, and the limit of open files", line)


def test_a_system_that_cannot_accept_is_asked_again(monkeypatch, capsys):
    """The process's limit leaves room. The system's limit can only be simulated."""
    monkeypatch.setattr(listening, "_RETRY_SECONDS", 0.01)
    accept = socket.socket.accept
    refusals = []

    def refuse(self):
        if len(refusals) < 20:
            refusals.append(errno.ENFILE)
            raise OSError(errno.ENFILE, "Too many open files in system")
        return accept(self)

    with Server() as server:
        monkeypatch.setattr(socket.socket, "accept", refuse)
        assert server.http.get("/health").status_code == 200
        wait_for(lambda: len(refusals) == 20)
    log = capsys.readouterr().err
    assert log.count("\n") == 1
    assert "new connections must wait: Too many open files in system" in log
