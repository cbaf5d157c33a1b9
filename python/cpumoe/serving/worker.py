"""The thread that runs the model, one request at a time, and the queue before it."""

from __future__ import annotations

import asyncio
import dataclasses
import math
import threading
import time
from collections import deque

from cpumoe.generation import Generation, ModelError, Sampling, TextModel
from cpumoe.serving.errors import ApiError, internal, invalid, logger, overloaded, stopping
from cpumoe.serving.job import Job

# A cancelled generation ends at its next token; one that is still reading a long prompt may not.
_CANCEL_SECONDS = 1.0
_LONGEST_RETRY_SECONDS = 60


class Worker:
    """Runs jobs on one thread, in the order in which they came."""

    def __init__(self, model: TextModel, *, queue: int, max_tokens: int | None) -> None:
        """Prepares a worker; `start` starts its thread.

        Args:
            model: called by the worker's thread only.
            queue: jobs that may wait while one runs.
            max_tokens: at most this many new tokens per job.
        """
        self._model = model
        self._queue = queue
        self._max_tokens = max_tokens
        self._waiting: deque[Job] = deque()
        self._running: Job | None = None
        self._accepting = True
        self._closed = False
        self._stuck = False
        self._typical_seconds = 0.0
        # Guards all of the above.
        self._changed = threading.Condition()
        # A daemon: a prompt that takes minutes to read must not keep the process from ending.
        self._thread = threading.Thread(target=self._run, name="cpumoe-worker", daemon=True)

    @property
    def accepting(self) -> bool:
        """Whether new jobs are taken."""
        return self._accepting

    @property
    def alive(self) -> bool:
        """Whether the thread runs."""
        return self._thread.is_alive()

    @property
    def waiting(self) -> int:
        """Jobs before which others run."""
        return len(self._waiting)

    @property
    def idle(self) -> bool:
        """Whether there is nothing to do."""
        with self._changed:
            return not self._waiting and self._running is None

    def start(self) -> None:
        """Starts the thread."""
        self._thread.start()

    def submit(self, job: Job) -> None:
        """Puts a job at the end of the queue.

        Raises:
            ApiError: the queue is full, or the server is stopping.
        """
        with self._changed:
            if not self._accepting:
                raise stopping()
            if len(self._waiting) + (self._running is not None) > self._queue:
                seconds = min(math.ceil(self._typical_seconds) or 1, _LONGEST_RETRY_SECONDS)
                raise overloaded(seconds, len(self._waiting))
            self._waiting.append(job)
            self._changed.notify_all()

    def withdraw(self, job: Job, reason: ApiError) -> None:
        """Cancels a job wherever it is; one that waits gives up its place at once."""
        job.cancel(reason)
        with self._changed:
            if job in self._waiting:
                self._waiting.remove(job)

    async def drain(self, grace_seconds: float) -> None:
        """Refuses new and waiting jobs and gives the running one some time to finish."""
        with self._changed:
            self._accepting = False
            refused = [*self._waiting]
            self._waiting.clear()
        for job in refused:
            job.cancel(stopping())
        await asyncio.to_thread(self._wait_until_idle, grace_seconds)
        running = self._running
        if running is not None:
            running.cancel(stopping())
            self._stuck = not await asyncio.to_thread(self._wait_until_idle, _CANCEL_SECONDS)

    def close(self) -> None:
        """Ends the thread after the running job, which is cancelled, and waits a little for it."""
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
            # The lock takes no longer timeout, and infinity least of all.
            seconds = min(threading.TIMEOUT_MAX, seconds)
            return self._changed.wait_for(lambda: self._running is None, seconds)

    def _run(self) -> None:
        while (job := self._next()) is not None:
            start = time.monotonic()
            outcome = self._outcome(job)
            seconds = time.monotonic() - start
            with self._changed:
                self._running = None
                self._typical_seconds = 0.7 * self._typical_seconds + 0.3 * seconds
                self._changed.notify_all()
            # After its place is free: the client may send its next request at once.
            job.finish(outcome)

    def _next(self) -> Job | None:
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._closed)
            if self._closed:
                return None
            self._running = self._waiting.popleft()
            return self._running

    def _outcome(self, job: Job) -> Generation | ApiError:
        try:
            return self._generate(job)
        except ApiError as error:
            return error
        except ModelError as error:
            logger.error("a request failed: %s", error)
            return internal(str(error))
        except Exception:
            logger.exception("a request failed")
            return internal()

    def _generate(self, job: Job) -> Generation | ApiError:
        # What the model refuses is the prompt's fault: sampling was checked before.
        try:
            prompt = job.encode(self._model)
            job.prompt_tokens = len(prompt.tokens)
            sampling = self._limited(job)
            generation = self._model.generate(
                prompt,
                sampling,
                on_piece=job.add_piece if job.streams else None,
                cancelled=lambda: job.cancelled,
            )
        except ValueError as error:
            raise invalid(str(error), job.prompt_param) from error
        return stopping() if generation.finish_reason == "cancelled" else generation

    def _limited(self, job: Job) -> Sampling:
        """The job's sampling within what the context and the operator allow."""
        context, used, asked = self._model.context_length, job.prompt_tokens, job.sampling
        if used == 0:
            raise invalid("the prompt is empty", job.prompt_param)
        if used >= context:
            raise invalid(
                f"the model's context length is {context} tokens, but the prompt has {used}: "
                "shorten it",
                job.prompt_param,
                "context_length_exceeded",
            )
        room = context - used
        wanted = asked.max_new_tokens or job.default_tokens or room
        if self._max_tokens is not None:
            wanted = min(wanted, self._max_tokens)
        if asked.max_new_tokens is None:
            wanted = min(wanted, room)
        elif wanted > room:
            raise invalid(
                f"the model's context length is {context} tokens, but {used + wanted} were "
                f"requested: {used} of the prompt and {job.limit_param}={wanted}",
                job.limit_param,
                "context_length_exceeded",
            )
        return dataclasses.replace(asked, max_new_tokens=wanted)
