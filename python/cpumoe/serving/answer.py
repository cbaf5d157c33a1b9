"""The HTTP answer of a job: one document, or a stream of server-sent events."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from fastapi import Response
from starlette.types import Receive, Scope, Send

from cpumoe.generation import Generation
from cpumoe.serving.errors import ApiError, encode_json, gone, json_response
from cpumoe.serving.generation_job import GenerationJob
from cpumoe.serving.job import Job, Result
from cpumoe.serving.worker import Worker

Document = Mapping[str, Any]

_DONE = b"data: [DONE]\n\n"
# A comment, which the protocol of such streams tells clients to skip.
_PING = b": ping\n\n"
# A stream without text sends its headers after this time, and from then on a sign of life at least
# so often: proxies give up after a minute of silence.
_HEADERS_SECONDS = 2.0
_PING_SECONDS = 10.0
_HEADERS = (
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    # Tells reverse proxies to pass events on as they come.
    (b"x-accel-buffering", b"no"),
)


class Shape(Protocol):
    """How one protocol words an answer."""

    def whole(self, job: GenerationJob, generation: Generation) -> Document:
        """Returns the answer as one document."""

    def begin(self) -> Sequence[Document]:
        """Returns the events before the first text."""

    def piece(self, job: GenerationJob, text: str) -> Document:
        """Returns the event of the next piece of text."""

    def end(self, job: GenerationJob, generation: Generation) -> Sequence[Document]:
        """Returns the events after the last text."""


class Answer(Response):
    """Runs a job and sends what it generates; ends it when the client disconnects.

    A stream's headers wait a little for its first text, so that what is wrong with the request is
    still answered by a status of its own. They do not wait longer: proxies, and people, take a
    server that sends nothing for one that is gone.
    """

    def __init__(self, worker: Worker, job: GenerationJob, shape: Shape) -> None:
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
        document = self._shape.whole(self._job, await result_of(self._job))
        await json_response(document)(scope, receive, send)

    async def _stream(self, send: Send) -> None:
        pieces, generation = await self._job.read(_HEADERS_SECONDS)
        await send({"type": "http.response.start", "status": 200, "headers": [*_HEADERS]})
        events = [*self._shape.begin()]
        try:
            while True:
                text = "".join(piece.text for piece in pieces)
                if text:
                    events.append(self._shape.piece(self._job, text))
                if generation is not None:
                    break
                if text:
                    await _send_events(send, events)
                    events = []
                else:
                    await _send(send, _PING)
                pieces, generation = await self._job.read(_PING_SECONDS)
            events += self._shape.end(self._job, generation)
        except ApiError as error:
            # The status is sent: an event is the only way left to say that it went wrong.
            events = [error.document()]
        await _send_events(send, events, last=True)


async def result_of(job: Job[Result]) -> Result:
    """Returns a job's result once it is there.

    Raises:
        ApiError: the job failed.
    """
    result = None
    while result is None:
        _, result = await job.read()
    return result


async def _send_events(send: Send, events: Sequence[Document], *, last: bool = False) -> None:
    body = b"".join(b"data: " + encode_json(event) + b"\n\n" for event in events)
    await _send(send, body + (_DONE if last else b""), last=last)


async def _send(send: Send, body: bytes, *, last: bool = False) -> None:
    await send({"type": "http.response.body", "body": body, "more_body": not last})
