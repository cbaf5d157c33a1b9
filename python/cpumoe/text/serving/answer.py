"""HTTP answers with the model's text: one document, or a stream of server-sent events."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from fastapi import Response
from starlette.types import Receive, Scope, Send

from cpumoe.text.generation import Generation, Piece
from cpumoe.text.serving.errors import ApiError, encode_json, gone, json_response
from cpumoe.text.serving.generation_job import GenerationJob
from cpumoe.text.serving.job import Call, Job, Result
from cpumoe.text.serving.worker import Worker

Document = Mapping[str, Any]
# SGLang answers several prompts with a list.
Answered = Document | Sequence[Document]

_DONE = b"data: [DONE]\n\n"
# Signs of life. The protocol of such streams tells clients to skip comments. Some clients take each
# line for an event, but skip empty lines.
COMMENT = b": ping\n\n"
BLANK_LINE = b"\n"
# A stream without text sends its headers after the first of these times, and then a sign of life
# whenever the second has passed. Proxies give up after a minute of silence.
_HEADERS_SECONDS = 2.0
_PING_SECONDS = 10.0
_HEADERS = (
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    # Tells reverse proxies to pass events on as they come.
    (b"x-accel-buffering", b"no"),
)


class Shape(Protocol):
    """How a protocol writes the answer to a request, which may consist of several texts.

    Each text has a job. `index` selects one.
    """

    def whole(self, jobs: Sequence[GenerationJob], results: Sequence[Generation]) -> Answered:
        """Returns the answer as one document."""

    def begin(self, jobs: Sequence[GenerationJob], index: int) -> Sequence[Document]:
        """Returns the events before a text's first piece."""

    def piece(self, jobs: Sequence[GenerationJob], index: int, piece: Piece) -> Sequence[Document]:
        """Returns the events of a text's next piece."""

    def end(
        self, jobs: Sequence[GenerationJob], index: int, result: Generation
    ) -> Sequence[Document]:
        """Returns the events after a text's last piece."""

    def close(self, jobs: Sequence[GenerationJob]) -> Sequence[Document]:
        """Returns the events after the last text."""


class JobsAnswer(Response):
    """The answer to a request that needs some jobs. Ends them when the client disconnects."""

    def __init__(self, worker: Worker, jobs: Sequence[Job[Any]]) -> None:
        """Prepares the answer. Nothing runs before it is called."""
        super().__init__()
        self._worker = worker
        self._submitted = jobs

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Submits the jobs and answers."""
        self._worker.submit(*self._submitted)
        watch = asyncio.create_task(self._watch(receive))
        try:
            await self.respond(scope, receive, send)
        finally:
            watch.cancel()
            self._withdraw()

    async def respond(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Waits for the jobs' results and sends the answer."""
        raise NotImplementedError

    async def _watch(self, receive: Receive) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        self._withdraw()

    def _withdraw(self) -> None:
        # The last one first, so that none of them starts in between.
        for job in reversed(self._submitted):
            self._worker.withdraw(job, gone())


class CallAnswer(JobsAnswer):
    """The answer to a request that needs one call of the model."""

    def __init__(self, worker: Worker, call: Call[Any]) -> None:
        """Prepares the answer, which is the document that the call returns."""
        super().__init__(worker, [call])
        self._call = call

    async def respond(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Sends the document."""
        await json_response(await result_of(self._call))(scope, receive, send)


class Answer(JobsAnswer):
    """The answer to a request for text.

    The headers of a stream wait a little for its first text, so that a fault of the request can
    still decide the status. They do not wait longer, because proxies and people give up on a server
    that sends nothing.
    """

    def __init__(
        self,
        worker: Worker,
        jobs: Sequence[GenerationJob],
        shape: Shape,
        *,
        streams: bool,
        sign_of_life: bytes = COMMENT,
    ) -> None:
        """Prepares the answer.

        Args:
            worker: runs the jobs.
            jobs: one job for each text.
            shape: writes the answer.
            streams: whether the client wants text as it is generated.
            sign_of_life: sent in a stream while there is no text.
        """
        super().__init__(worker, jobs)
        self._jobs = jobs
        self._shape = shape
        self._streams = streams
        self._sign_of_life = sign_of_life

    async def respond(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Sends the texts."""
        if self._streams:
            await self._stream(send)
        else:
            await self._whole(scope, receive, send)

    async def _whole(self, scope: Scope, receive: Receive, send: Send) -> None:
        results = [await result_of(job) for job in self._jobs]
        await json_response(self._shape.whole(self._jobs, results))(scope, receive, send)

    async def _stream(self, send: Send) -> None:
        # The worker runs them in this order.
        news = await self._jobs[0].read(_HEADERS_SECONDS)
        await send({"type": "http.response.start", "status": 200, "headers": [*_HEADERS]})
        try:
            for index, job in enumerate(self._jobs):
                if index > 0:
                    news = await job.read(_PING_SECONDS)
                await self._stream_text(send, index, news)
            events = self._shape.close(self._jobs)
        except ApiError as error:
            # The status has been sent, so an event reports the error.
            self._worker.observer.failed(error)
            events = [error.document()]
        await _send_events(send, events, last=True)

    async def _stream_text(
        self, send: Send, index: int, news: tuple[list[Piece], Generation | None]
    ) -> None:
        """Sends one text, which begins with `news`."""
        jobs, begun = self._jobs, False
        while True:
            pieces, result = news
            piece = _joined(pieces)
            events: list[Document] = []
            if not begun and (piece or result is not None):
                events += self._shape.begin(jobs, index)
                begun = True
            if piece:
                events += self._shape.piece(jobs, index, piece)
            if result is not None:
                events += self._shape.end(jobs, index, result)
            await (_send_events(send, events) if events else _send(send, self._sign_of_life))
            if result is not None:
                return
            news = await jobs[index].read(_PING_SECONDS)


def _joined(pieces: Sequence[Piece]) -> Piece:
    """Joins several pieces."""
    return Piece(
        "".join(piece.text for piece in pieces),
        "".join(piece.reasoning for piece in pieces),
        tuple(call for piece in pieces for call in piece.tool_calls),
        tuple(token for piece in pieces for token in piece.logprobs),
        sum(piece.tokens for piece in pieces),
    )


async def result_of(job: Job[Result]) -> Result:
    """Waits for a job's result.

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
