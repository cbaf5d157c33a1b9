"""The thread that runs the model, one request at a time, and its queue."""

from __future__ import annotations

import asyncio
import math
import threading
import time
from collections import deque
from typing import Any

from cpumoe.text.generation import ModelError, TextModel
from cpumoe.text.serving.errors import ApiError, internal, logger, overloaded, stopping
from cpumoe.text.serving.job import Job

# A cancelled generation ends at its next token, unless it is still reading a long prompt.
_CANCEL_SECONDS = 1.0
_LONGEST_RETRY_SECONDS = 60


class Observer:
    """Receives the outcome of requests. This class ignores it."""

    def ended(self, result: object, waited_seconds: float, total_seconds: float) -> None:
        """Receives the outcome of a job, in the worker's thread.

        Args:
            result: the result of the job, or an `ApiError`.
            waited_seconds: time in the queue.
            total_seconds: time from queueing to the end.
        """

    def failed(self, error: ApiError) -> None:
        """Receives an error that a client gets, in the event loop."""


class Worker:
    """Runs jobs on one thread, in the order of their submission.

    Attributes:
        observer: receives the outcome of jobs.
    """

    def __init__(self, model: TextModel, *, queue: int) -> None:
        """Prepares a worker; `start` starts its thread.

        Args:
            model: the model, which only the worker's thread calls.
            queue: the most jobs that may wait while one runs.
        """
        self.observer = Observer()
        self._model = model
        self._queue = queue
        self._waiting: deque[Job[Any]] = deque()
        self._running: Job[Any] | None = None
        self._accepting = True
        self._closed = False
        self._stuck = False
        self._typical_seconds = 0.0
        # Guards all attributes above.
        self._changed = threading.Condition()
        # A daemon, so that a prompt that takes minutes to read does not keep the process alive.
        self._thread = threading.Thread(target=self._run, name="cpumoe-worker", daemon=True)

    @property
    def accepting(self) -> bool:
        """Whether new jobs are accepted."""
        return self._accepting

    @property
    def alive(self) -> bool:
        """Whether the thread runs."""
        return self._thread.is_alive()

    @property
    def broken(self) -> bool:
        """Whether the thread has ended without `close`."""
        started = self._thread.ident is not None
        return started and not self._closed and not self.alive

    @property
    def waiting(self) -> int:
        """Number of waiting jobs."""
        return len(self._waiting)

    @property
    def running(self) -> int:
        """Number of running jobs, 0 or 1."""
        return int(self._running is not None)

    @property
    def capacity(self) -> int:
        """The most jobs at a time, including the running one."""
        return self._queue + 1

    @property
    def idle(self) -> bool:
        """Whether no job waits or runs."""
        with self._changed:
            return not self._waiting and self._running is None

    def start(self) -> None:
        """Starts the thread."""
        self._thread.start()

    def submit(self, *jobs: Job[Any]) -> None:
        """Appends jobs to the queue, all of them or none.

        Raises:
            ApiError: the queue has no room for them, or the server is stopping.
        """
        with self._changed:
            if not self._accepting:
                raise stopping()
            there = len(self._waiting) + (self._running is not None)
            if there + len(jobs) > self.capacity:
                seconds = min(math.ceil(self._typical_seconds) or 1, _LONGEST_RETRY_SECONDS)
                raise overloaded(seconds, f"already has {len(self._waiting)} waiting requests")
            for job in jobs:
                job.submitted = time.monotonic()
                self._waiting.append(job)
            self._changed.notify_all()

    def withdraw(self, job: Job[Any], reason: ApiError) -> None:
        """Cancels a job. A waiting job leaves the queue at once."""
        job.cancel(reason)
        with self._changed:
            if job in self._waiting:
                self._waiting.remove(job)

    async def drain(self, grace_seconds: float) -> None:
        """Refuses new and waiting jobs, and gives the running one some time to finish."""
        with self._changed:
            self._accepting = False
            refused = [*self._waiting]
            self._waiting.clear()
        for job in refused:
            job.cancel(stopping())
        if not self.broken:
            await asyncio.to_thread(self._wait_until_idle, grace_seconds)
        running = self._running
        if running is not None:
            running.cancel(stopping())
            self._stuck = not await asyncio.to_thread(self._wait_until_idle, _CANCEL_SECONDS)

    def close(self) -> None:
        """Cancels all jobs, ends the thread, and waits a little for it."""
        with self._changed:
            self._accepting = False
            self._closed = True
            for job in (*self._waiting, *([self._running] if self._running else [])):
                job.cancel(stopping())
            self._waiting.clear()
            self._changed.notify_all()
        if self._thread.is_alive() and not self._stuck:
            self._thread.join(_CANCEL_SECONDS)

    def _wait_until_idle(self, seconds: float) -> bool:
        with self._changed:
            # Locks refuse longer timeouts, such as infinity.
            seconds = min(threading.TIMEOUT_MAX, seconds)
            return self._changed.wait_for(lambda: self._running is None, seconds)

    def _run(self) -> None:
        try:
            self._run_jobs()
        finally:
            # Without `close`, this happens only if memory is too small even to report a failure.
            self._abandon()

    def _abandon(self) -> None:
        with self._changed:
            self._accepting = False
            left = [*([self._running] if self._running else []), *self._waiting]
            self._running = None
            self._waiting.clear()
            self._changed.notify_all()
        for job in left:
            job.cancel(internal())

    def _run_jobs(self) -> None:
        while (job := self._next()) is not None:
            start = time.monotonic()
            outcome = self._outcome(job)
            end = time.monotonic()
            seconds = end - start
            self.observer.ended(outcome, start - job.submitted, end - job.submitted)
            with self._changed:
                self._running = None
                self._typical_seconds = 0.7 * self._typical_seconds + 0.3 * seconds
                self._changed.notify_all()
            # Last, so that the queue has room if the client sends its next request at once.
            job.finish(outcome)

    def _next(self) -> Job[Any] | None:
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._closed)
            if self._closed:
                return None
            self._running = self._waiting.popleft()
            return self._running

    def _outcome(self, job: Job[Any]) -> Any:
        try:
            return job.run(self._model)
        except ApiError as error:
            return error
        except ModelError as error:
            logger.error("a request failed: %s", error)
            return internal(str(error))
        except BaseException:
            # A panic of the tokenizer and SystemExit are no Exception. The thread survives both.
            logger.exception("a request failed")
            return internal()
