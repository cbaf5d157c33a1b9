"""An HTTP server that sends exactly the bytes that a test gives it."""

import contextlib
import json
import socket
import threading


class RawServer:
    """Answers each request with the next of some replies, then closes the connection.

    Attributes:
        requests: what was asked, each the first line, the headers and the body.
        url: address of the API.
    """

    def __init__(self, *replies):
        """Takes replies: bytes, or a list of bytes and `STUCK`, which stops sending."""
        self._replies = [[reply] if isinstance(reply, bytes) else reply for reply in replies]
        self.requests = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}/v1"
        self._ends = threading.Event()
        self._thread = threading.Thread(target=self._serve)

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._ends.set()
        # Wakes `accept` if replies are left.
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._thread.join(10)
        assert not self._thread.is_alive()

    def _serve(self):
        for reply in self._replies:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            with connection, contextlib.suppress(ConnectionError):
                self.requests.append(_read_request(connection))
                for part in reply:
                    if part is STUCK:
                        self._ends.wait(20)
                    else:
                        connection.sendall(part)


STUCK = object()


def _read_request(connection):
    with connection.makefile("rb") as stream:
        line = stream.readline().decode().strip()
        headers = {}
        while (header := stream.readline().decode().strip()) != "":
            name, _, value = header.partition(":")
            headers[name.lower()] = value.strip()
        body = stream.read(int(headers.get("content-length", 0)))
    return line, headers, json.loads(body) if body else None


def http(body, status="200 OK", content_type="text/event-stream", length=None):
    """A whole reply; `length` replaces the body's length."""
    body = body.encode() if isinstance(body, str) else body
    length = len(body) if length is None else length
    head = f"HTTP/1.1 {status}\r\nContent-Type: {content_type}\r\nContent-Length: {length}\r\n\r\n"
    return head.encode() + body


def events(*documents, done=True):
    """A stream of events; strings and bytes are sent as they are, other documents as JSON."""
    parts = [d if isinstance(d, str) else json.dumps(d) for d in documents]
    return http("".join(f"data: {part}\n\n" for part in [*parts, *["[DONE]"] * done]))


def delta(finish_reason=None, **fields):
    """An event of a chat's stream."""
    return {"choices": [{"index": 0, "delta": fields, "finish_reason": finish_reason}]}
