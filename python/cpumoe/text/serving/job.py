"""A task that the event loop gives to the worker."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from typing import Generic, TypeVar

from cpumoe.text.generation import Piece, TextModel
from cpumoe.text.serving.errors import ApiError, invalid

Result = TypeVar("Result")


class Job(Generic[Result]):
    """A task for the model, and its results so far.

    Pieces are kept until the client takes them. So a slow client holds at most its own answer in
    memory, and does not delay the worker.

    Attributes:
        submitted: time when the job was queued, by `time.monotonic`.
        cancelled: whether the answer is no longer needed.
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
        """Returns the result. The worker's thread calls it.

        Raises:
            ApiError: the request is at fault.
        """
        raise NotImplementedError

    def add_piece(self, piece: Piece) -> None:
        """Takes a piece from the worker."""
        with self._lock:
            first = not self._pieces
            self._pieces.append(piece)
        # The reader takes all pieces at once, so it is not woken for each.
        if first:
            self._notify()

    def finish(self, outcome: Result | ApiError) -> None:
        """Ends the job, from any thread. Only the first outcome counts."""
        with self._lock:
            if self._outcome is not None:
                return
            self._outcome = outcome
        self._notify()

    def cancel(self, reason: ApiError) -> None:
        """Ends the job, and soon its computation, which checks `cancelled`."""
        self.cancelled = True
        self.finish(reason)

    async def read(self, seconds: float | None = None) -> tuple[list[Piece], Result | None]:
        """Returns the pieces since the last call and, at the end, the result.

        Args:
            seconds: longest time to wait. Afterwards there may be neither.

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
            # The loop is closed, so the server has ended and nobody reads.
            self.cancelled = True


class Call(Job[Result]):
    """Calls the model once."""

    def __init__(self, call: Callable[[TextModel], Result], param: str) -> None:
        """Makes a job of the running event loop.

        Args:
            call: the call.
            param: the field of the request to blame for a ValueError.
        """
        super().__init__()
        self._call = call
        self._param = param

    def run(self, model: TextModel) -> Result:
        """Returns the result of the call."""
        try:
            return self._call(model)
        except ValueError as error:
            raise invalid(str(error), self._param) from error
