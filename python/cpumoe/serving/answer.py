"""The HTTP answer of a job: one document, or a stream of server-sent events."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from fastapi import Response
from starlette.types import Receive, Scope, Send

from cpumoe.generation import Generation
from cpumoe.serving.errors import ApiError, encode_json, gone, json_response
from cpumoe.serving.job import Job
from cpumoe.serving.worker import Worker

Document = Mapping[str, Any]

_DONE = b"data: [DONE]\n\n"
_HEADERS = (
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    # Tells reverse proxies to pass events on as they come.
    (b"x-accel-buffering", b"no"),
)


class Shape(Protocol):
    """How one protocol words an answer."""

    def whole(self, job: Job, generation: Generation) -> Document:
        """Returns the answer as one document."""

    def begin(self) -> Sequence[Document]:
        """Returns the events before the first text."""

    def piece(self, job: Job, text: str) -> Document:
        """Returns the event of the next piece of text."""

    def end(self, job: Job, generation: Generation) -> Sequence[Document]:
        """Returns the events after the last text."""


class Answer(Response):
    """Runs a job and sends what it generates; ends it when the client disconnects.

    A stream's headers wait for its first text, so that whatever is wrong with the request is still
    answered by a status of its own.
    """

    def __init__(self, worker: Worker, job: Job, shape: Shape) -> None:
        """Prepares the answer; nothing runs before it is called."""
        super().__init__()
        self._worker = worker
        self._job = job
        self._shape = shape

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Submits the job and answers."""
        self._worker.submit(self._job)
        watch = asyncio.create_task(self._watch(receive))
        try:
            if self._job.streams:
                await self._stream(send)
            else:
                await self._whole(scope, receive, send)
        finally:
            watch.cancel()
            self._worker.withdraw(self._job, gone())

    async def _watch(self, receive: Receive) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        self._worker.withdraw(self._job, gone())

    async def _whole(self, scope: Scope, receive: Receive, send: Send) -> None:
        generation = None
        while generation is None:
            _, generation = await self._job.read()
        document = self._shape.whole(self._job, generation)
        await json_response(document)(scope, receive, send)

    async def _stream(self, send: Send) -> None:
        text, generation = await self._job.read()
        await send({"type": "http.response.start", "status": 200, "headers": [*_HEADERS]})
        events = [*self._shape.begin()]
        try:
            while True:
                if text:
                    events.append(self._shape.piece(self._job, text))
                if generation is not None:
                    break
                await _send_events(send, events)
                text, generation = await self._job.read()
                events = []
            events += self._shape.end(self._job, generation)
        except ApiError as error:
            # The status is sent: an event is the only way left to say that it went wrong.
            events = [error.document()]
        await _send_events(send, events, last=True)


async def _send_events(send: Send, events: Sequence[Document], *, last: bool = False) -> None:
    body = b"".join(b"data: " + encode_json(event) + b"\n\n" for event in events)
    body += _DONE if last else b""
    await send({"type": "http.response.body", "body": body, "more_body": not last})
