"""Servers of a fake model for tests, and ways to ask them."""

import socket
import threading
import time

import httpx
import openai
from fake_model import FakeModel

from cpumoe.text.serving.app import create_app
from cpumoe.text.serving.listening import open_sockets
from cpumoe.text.serving.server import Server as HttpServer
from cpumoe.text.serving.server import make_config
from cpumoe.text.serving.settings import Settings


class Server:
    """A server of a `FakeModel` in a thread of this process."""

    def __init__(self, model=None, *, grace_seconds=0, **settings):
        self.model = model or FakeModel()
        self._grace_seconds = grace_seconds
        self.app = create_app(self.model, Settings(**settings))
        self._listeners = open_sockets("127.0.0.1", 0)
        self.port = self._listeners[0].getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self._http = None

    def __enter__(self):
        ready = threading.Event()
        config = make_config(self.app, False)
        self._server = HttpServer(config, self.app.state.service, self._grace_seconds, ready.set)
        self._thread = threading.Thread(target=self._server.run, args=(self._listeners,))
        self._thread.start()
        assert ready.wait(10)
        self.http = httpx.Client(base_url=self.url, timeout=20)
        return self

    def __exit__(self, *_):
        self.http.close()
        self._server.should_exit = True
        self._thread.join(20)
        assert not self._thread.is_alive()

    @property
    def running(self):
        return self._thread.is_alive()

    @property
    def broken(self):
        return self._server.broken

    def client(self, **options):
        options = {"api_key": "-", "max_retries": 0, "timeout": 20, **options}
        return openai.OpenAI(base_url=f"{self.url}/v1", **options)

    def refuse(self, path, body, **options):
        """Returns status and error of a request that fails."""
        content = {"content": body} if isinstance(body, (bytes, str)) else {"json": body}
        headers = {"Content-Type": "application/json", **options.pop("headers", {})}
        reply = self.http.post(path, **content, headers=headers, **options)
        return reply.status_code, error_of(reply)

    def raw(self, request):
        """Opens a connection and sends bytes."""
        connection = socket.create_connection(("127.0.0.1", self.port), timeout=10)
        connection.sendall(request)
        return connection


def error_of(reply):
    document = reply.json()
    assert list(document) == ["error"]
    assert list(document["error"]) == ["message", "type", "param", "code"]
    return document["error"]


def wait_for(condition, seconds=30.0):
    """Waits until a condition holds; returns the time it took."""
    start = time.monotonic()
    while not condition():
        assert time.monotonic() - start < seconds, "waited in vain"
        time.sleep(0.005)
    return time.monotonic() - start
