"""One request on its way between the event loop, which asks, and the worker, which generates."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable

from cpumoe.generation import Generation, Piece, Prompt, Sampling, TextModel
from cpumoe.serving.errors import ApiError


class Job:
    """What to generate, and what of it there is already.

    Text that the client has not taken yet is kept joined, so a slow client holds at most its own
    answer in memory, and never the worker.

    Attributes:
        encode: returns the prompt; run by the worker, since it may take long.
        sampling: as the client asks.
        streams: the client wants text as it is generated.
        prompt_param: what the request calls its prompt.
        limit_param: what the request calls `sampling.max_new_tokens`.
        default_tokens: new tokens where the request does not say, as far as there is room; None:
            what there is room for.
        prompt_tokens: how many, once the prompt is encoded.
        cancelled: nobody waits for the answer any more.
    """

    def __init__(
        self,
        encode: Callable[[TextModel], Prompt],
        sampling: Sampling,
        *,
        streams: bool,
        prompt_param: str,
        limit_param: str,
        default_tokens: int | None = None,
    ) -> None:
        """Makes a job of the running event loop."""
        self.encode = encode
        self.sampling = sampling
        self.streams = streams
        self.prompt_param = prompt_param
        self.limit_param = limit_param
        self.default_tokens = default_tokens
        self.prompt_tokens = 0
        self.cancelled = False
        self._loop = asyncio.get_running_loop()
        self._changed = asyncio.Event()
        self._lock = threading.Lock()
        self._pieces: list[str] = []
        self._outcome: Generation | ApiError | None = None

    def add_piece(self, piece: Piece) -> None:
        """Takes what has become certain from the worker."""
        with self._lock:
            first = not self._pieces
            self._pieces.append(piece.text)
        # The reader takes all pieces at once: it need not be woken for each.
        if first:
            self._notify()

    def finish(self, outcome: Generation | ApiError) -> None:
        """Ends the job, from any thread; the first outcome counts."""
        with self._lock:
            if self._outcome is not None:
                return
            self._outcome = outcome
        self._notify()

    def cancel(self, reason: ApiError) -> None:
        """Ends the job and, at its next token, its generation."""
        self.cancelled = True
        self.finish(reason)

    async def read(self) -> tuple[str, Generation | None]:
        """Returns the text since the last call and, at the end, the generation.

        Raises:
            ApiError: the job failed.
        """
        await self._changed.wait()
        self._changed.clear()
        with self._lock:
            text = "".join(self._pieces)
            self._pieces.clear()
            outcome = self._outcome
        if isinstance(outcome, ApiError):
            raise outcome
        return text, outcome

    def _notify(self) -> None:
        try:
            self._loop.call_soon_threadsafe(self._changed.set)
        except RuntimeError:
            # The loop is closed: the server has ended and nobody reads.
            self.cancelled = True
