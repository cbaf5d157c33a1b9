"""One request on its way between the event loop, which asks, and the worker, which computes."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from typing import Generic, TypeVar

from cpumoe.generation import Piece, TextModel
from cpumoe.serving.errors import ApiError, invalid

Result = TypeVar("Result")


class Job(Generic[Result]):
    """Something to do with the model, and what has come of it already.

    Pieces that the client has not taken yet are kept, so a slow client holds at most its own answer
    in memory, and never the worker.

    Attributes:
        submitted: when it came into the queue, by `time.monotonic`.
        cancelled: nobody waits for the answer any more.
    """

    def __init__(self) -> None:
        """Makes a job of the running event loop."""
        self.submitted = 0.0
        self.cancelled = False
        self._loop = asyncio.get_running_loop()
        self._changed = asyncio.Event()
        self._lock = threading.Lock()
        self._pieces: list[Piece] = []
        self._outcome: Result | ApiError | None = None

    def run(self, model: TextModel) -> Result:
        """Returns the result; called by the worker's thread.

        Raises:
            ApiError: the request is at fault.
        """
        raise NotImplementedError

    def add_piece(self, piece: Piece) -> None:
        """Takes what has become certain from the worker."""
        with self._lock:
            first = not self._pieces
            self._pieces.append(piece)
        # The reader takes all pieces at once: it need not be woken for each.
        if first:
            self._notify()

    def finish(self, outcome: Result | ApiError) -> None:
        """Ends the job, from any thread; the first outcome counts."""
        with self._lock:
            if self._outcome is not None:
                return
            self._outcome = outcome
        self._notify()

    def cancel(self, reason: ApiError) -> None:
        """Ends the job and, when it next asks, its computation."""
        self.cancelled = True
        self.finish(reason)

    async def read(self, seconds: float | None = None) -> tuple[list[Piece], Result | None]:
        """Returns the pieces since the last call and, at the end, the result.

        Args:
            seconds: to wait at most; then there may be neither.

        Raises:
            ApiError: the job failed.
        """
        deadline = None if seconds is None else self._loop.time() + seconds
        while True:
            with self._lock:
                self._changed.clear()
                pieces, self._pieces = self._pieces, []
                outcome = self._outcome
            if isinstance(outcome, ApiError):
                raise outcome
            left = None if deadline is None else deadline - self._loop.time()
            if pieces or outcome is not None or (left is not None and left <= 0):
                return pieces, outcome
            try:
                await asyncio.wait_for(self._changed.wait(), left)
            except asyncio.TimeoutError:
                return [], None

    def _notify(self) -> None:
        try:
            self._loop.call_soon_threadsafe(self._changed.set)
        except RuntimeError:
            # The loop is closed: the server has ended and nobody reads.
            self.cancelled = True


class Call(Job[Result]):
    """Calls the model once."""

    def __init__(self, call: Callable[[TextModel], Result], param: str) -> None:
        """Makes a job of the running event loop.

        Args:
            call: what to do.
            param: what the request calls that which a ValueError blames.
        """
        super().__init__()
        self._call = call
        self._param = param

    def run(self, model: TextModel) -> Result:
        """Returns what the call returns."""
        try:
            return self._call(model)
        except ValueError as error:
            raise invalid(str(error), self._param) from error
