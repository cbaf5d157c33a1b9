"""Waiting requests, clients that disconnect, and slow clients and models."""

import json
import socket
import struct
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import openai
import pytest
from fake_model import FakeModel
from serving_tools import Server, error_of, wait_for

from cpumoe.text import generation
from cpumoe.text.serving import answer
from cpumoe.text.serving import body as body_module
from cpumoe.text.serving import server as server_module

# A slow model that notices quickly that its answer is not needed.
SLOW = {"end": 10**6, "delay": 0.01}
# A test fails only after waiting this long.
SOON = 30.0


def post(body, path="/v1/completions"):
    content = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    return f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content


def reset(connection):
    """Ends a connection with unread data, as the end of a client's process does."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()


@pytest.fixture
def slow():
    with Server(FakeModel(**SLOW), queue=2) as server:
        yield server


def assert_serves(server):
    reply = server.http.post("/v1/completions", json={"prompt": "next", "max_tokens": 2})
    assert reply.json()["choices"][0]["text"] == " 1 2"


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("leave", [socket.socket.close, reset])
def test_a_client_that_disconnects_ends_its_generation(slow, stream, leave):
    connection = slow.raw(post({"prompt": "x", "max_tokens": 900, "stream": stream}))
    assert slow.model.started.wait(SOON)
    if stream:
        assert b"200 OK" in connection.recv(1000)
    leave(connection)
    wait_for(lambda: slow.model.cancellations == 1, SOON)
    assert_serves(slow)


def test_openais_client_that_closes_a_stream(slow):
    with slow.client() as client:
        stream = client.completions.create(model="fake", prompt="x", max_tokens=900, stream=True)
        assert next(stream).choices[0].text == " 1"
        stream.close()
        wait_for(lambda: slow.model.cancellations == 1, SOON)
        assert_serves(slow)


def test_a_waiting_client_that_disconnects_gives_up_its_place(slow):
    worker = slow.app.state.service.worker
    running = slow.raw(post({"prompt": "running", "max_tokens": 900}))
    assert slow.model.started.wait(SOON)
    waiting = [slow.raw(post({"prompt": f"waiting {n}"})) for n in range(2)]
    wait_for(lambda: worker.waiting == 2, SOON)
    waiting[0].close()
    wait_for(lambda: worker.waiting == 1, SOON)
    running.close()
    assert b"200 OK" in waiting[1].recv(1000)
    waiting[1].close()
    assert slow.model.prompts == ["running", "waiting 1"]


def test_a_full_queue_refuses(slow):
    connections = [slow.raw(post({"prompt": "x", "max_tokens": 900})) for _ in range(3)]
    wait_for(lambda: slow.app.state.service.worker.waiting == 2, SOON)
    for stream in (True, False):
        reply = slow.http.post("/v1/completions", json={"prompt": "x", "stream": stream})
        assert (reply.status_code, error_of(reply)["code"]) == (503, "overloaded")
        assert int(reply.headers["retry-after"]) >= 1
    assert slow.http.get("/health").status_code == 200
    with slow.client() as client, pytest.raises(openai.InternalServerError, match="busy"):
        client.completions.create(model="fake", prompt="x")
    for connection in connections:
        connection.close()
    wait_for(lambda: slow.app.state.service.worker.idle, SOON)
    assert_serves(slow)


def test_without_a_queue_one_after_the_other_is_served():
    """The place of a finished request is free before its client knows that it has finished."""
    with Server(queue=0) as server:
        for _ in range(50):
            assert_serves(server)


def test_a_slow_prompt_does_not_block_the_others():
    model = FakeModel()
    encode = model.encode
    reading, answered = threading.Event(), threading.Event()

    def slow_encode(text, **_):
        reading.set()
        assert answered.wait(SOON)
        return encode(text)

    model.encode = slow_encode
    with Server(model) as server, ThreadPoolExecutor(1) as pool:
        long = pool.submit(server.refuse, "/v1/completions", {"prompt": "x" * 1_000_000})
        assert reading.wait(SOON)
        assert server.http.get("/health").status_code == 200
        assert server.http.get("/v1/models").status_code == 200
        answered.set()
        assert long.result()[1]["code"] == "context_length_exceeded"


def test_a_client_that_does_not_read_blocks_nobody():
    model = FakeModel(end=10**6)
    model.context_length = 300_000
    with Server(model) as server:
        # Cumulative texts of 10 000 tokens would be hundreds of megabytes.
        body = {"text": "x", "stream": True, "sampling_params": {"max_new_tokens": 10_000}}
        stalled = server.raw(post(body, "/generate"))
        assert model.started.wait(SOON)
        wait_for(lambda: server.app.state.service.worker.idle, 10)
        assert_serves(server)
        # The client gets the whole answer when it reads.
        received = b""
        while not received.endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n"):
            received += (new := stalled.recv(1 << 20))
            assert new
        stalled.close()
        assert b" 9999 10000" in received


def test_partial_requests_cost_nothing():
    with Server() as server:
        whole = post({"prompt": "x"})
        partial = [server.raw(whole[:cut]) for cut in (0, 5, 40, len(whole) - 1) for _ in range(25)]
        assert_serves(server)
        for connection in partial:
            connection.close()
        assert_serves(server)


def test_requests_that_take_too_long_to_come_are_ended(monkeypatch):
    monkeypatch.setattr(body_module, "_BODY_SECONDS", 0.3)
    monkeypatch.setattr(server_module, "_HEAD_SECONDS", 0.3)
    whole = post({"prompt": "x"})
    with Server() as server:
        for connection in (server.raw(b""), server.raw(whole[:40])):
            assert connection.recv(1000) == b""
            connection.close()
        body = server.raw(whole[:-1])
        assert b" 408 " in body.recv(1000)
        body.close()
        # A connection that is used again a long time after its first request.
        again = server.raw(whole)
        assert b" 200 " in again.recv(1000)
        time.sleep(0.5)
        again.sendall(whole[:40])
        while received := again.recv(1000):
            assert b"HTTP/1.1" not in received
        again.close()
        assert_serves(server)


def test_no_client_is_read_from_for_long_at_a_time(monkeypatch):
    """A body in tiny chunks takes long to parse. Other requests are answered meanwhile."""
    sizes = []
    receive = server_module._Protocol.data_received

    def data_received(self, data):
        sizes.append(len(data))
        receive(self, data)

    monkeypatch.setattr(server_module._Protocol, "data_received", data_received)
    head = "POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    chunks = b"1\r\n \r\n" * 20_000 + b"f\r\n" + b'{"prompt": "x"}' + b"\r\n0\r\n\r\n"
    with Server() as server:
        connection = server.raw(f"{head}Transfer-Encoding: chunked\r\n\r\n".encode() + chunks)
        assert b" 200 " in connection.recv(1000)
        connection.close()
    assert sum(sizes) > 100_000
    assert max(sizes) <= 1 << 14


def test_huge_headers_are_refused():
    with Server() as server:
        connection = server.raw(b"GET /health HTTP/1.1\r\nX: " + b"x" * (1 << 17))
        assert b" 400 " in connection.recv(1000)
        connection.close()
        assert_serves(server)


@pytest.fixture
def impatient(monkeypatch):
    monkeypatch.setattr(answer, "_HEADERS_SECONDS", 0.05)
    monkeypatch.setattr(answer, "_PING_SECONDS", 0.05)


def held_model():
    """A model that does not write before the event is set."""
    model = FakeModel()
    may_write = threading.Event()
    generate = model.generate

    def held(*arguments, **options):
        model.started.set()
        assert may_write.wait(10)
        return generate(*arguments, **options)

    model.generate = held
    return model, may_write


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/completions", {"prompt": "x"}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "x"}]}),
        ("/generate", {"text": "x"}),
    ],
)
def test_a_stream_without_text_shows_that_it_lives(path, body):
    """Comments in a stream keep proxies from giving up on a silent server."""
    model, may_write = held_model()
    with Server(model) as server:
        with server.http.stream("POST", path, json={**body, "stream": True}) as reply:
            assert reply.status_code == 200
            lines = reply.iter_lines()
            # SGLang's clients take each line that is not empty for an event.
            sign = [""] if path == "/generate" else [": ping", ""]
            assert [next(lines) for _ in range(4)] == sign * (4 // len(sign))
            may_write.set()
            events = [line for line in lines if line.startswith("data: ")]
        assert events[-1] == "data: [DONE]"
        assert " 1" in events[0] + events[1]
        if path.startswith("/v1"):
            may_write.clear()
            with server.client() as client, ThreadPoolExecutor(1) as pool:
                texts = pool.submit(
                    lambda: [
                        chunk.choices[0].text
                        for chunk in client.completions.create(
                            model="fake", prompt="x", stream=True
                        )
                    ]
                )
                time.sleep(0.1)
                may_write.set()
                assert "".join(texts.result()) == " 1 2 3 4 5"


@pytest.mark.usefixtures("impatient")
def test_an_error_after_a_sign_of_life_is_an_event():
    model, may_write = held_model()
    model.fails_at = 1
    with (
        Server(model) as server,
        server.http.stream("POST", "/v1/completions", json={"prompt": "x", "stream": True}) as got,
    ):
        lines = got.iter_lines()
        assert next(lines) == ": ping"
        may_write.set()
        error, done = (line for line in lines if line.startswith("data: "))
    assert json.loads(error.removeprefix("data: "))["error"]["code"] == "internal_error"
    assert done == "data: [DONE]"


def test_a_client_that_leaves_while_its_prompt_is_read_ends_the_reading(slow):
    """The model checks between parts of a long prompt whether it was cancelled."""
    noticed = threading.Event()

    def read_prompt(prompt, sampling, *, on_piece=None, cancelled=None):
        slow.model.started.set()
        wait_for(cancelled, SOON)
        noticed.set()
        return generation.Generation("", "cancelled", len(prompt.tokens), 0, 0.0, 0.0, 0.0)

    slow.model.generate = read_prompt
    connection = slow.raw(post({"prompt": "x" * 900, "max_tokens": 9}))
    assert slow.model.started.wait(SOON)
    connection.close()
    assert noticed.wait(SOON)
    del slow.model.generate
    assert_serves(slow)
