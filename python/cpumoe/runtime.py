"""The threads that expert layers run on."""

from __future__ import annotations

import os
import threading
import warnings
from types import TracebackType

from cpumoe import _core

# More is a mistake, not a machine.
MAX_THREADS = 4096


class Runtime:
    """A pool of threads and its scratch memory, shared by any number of `Experts`.

    Threads are persistent: they poll for some microseconds after a call, then sleep, so that an
    idle runtime uses no CPU. Calls from several Python threads run one after the other. A runtime
    does not survive ``fork()``: in the child, using it raises RuntimeError (the default runtime is
    made anew there). Scratch memory grows to what the largest call needs (for DeepSeek-V4-Flash up
    to 400 MB in long prompts) and stays until `close`.

    Args:
        threads: threads that compute, the calling one included. Default: the physical cores in
            this process's affinity mask, capped by its cgroup's CPU quota (rounded down), at
            least 1. More than that is honoured with a warning: threads that share a core slow each
            other down.
        pin: whether each thread other than the caller stays on one core.

    Raises:
        TypeError: `threads` is not an int.
        ValueError: `threads` is not from 1 to 4096.
        OSError: the system has no more threads to give.
    """

    def __init__(self, threads: int | None = None, *, pin: bool = False) -> None:
        """Starts the threads."""
        topology = _core.topology()
        self._threads = topology.default_threads if threads is None else _checked(threads)
        if self._threads > topology.default_threads:
            warnings.warn(
                f"Runtime: {self._threads} threads asked for, but this process has "
                f"{topology.default_threads} (physical cores in its affinity mask, capped by its "
                "cgroup's CPU quota); expect calls to be slower, not faster",
                RuntimeWarning,
                stacklevel=2,
            )
        self._pin = pin
        self._closed = False
        self.core = _core.Runtime(self._threads, pin, topology.cores if pin else [])

    @property
    def threads(self) -> int:
        """Threads that compute, the caller included."""
        return self._threads

    @property
    def closed(self) -> bool:
        """Whether `close` was called."""
        return self._closed

    def close(self) -> None:
        """Finishes what was submitted, ends the threads, frees scratch memory.

        Later calls raise RuntimeError.
        """
        self._closed = True
        self.core.close()

    def __enter__(self) -> Runtime:
        """Returns itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Closes the runtime."""
        self.close()

    def __repr__(self) -> str:
        """Describes threads and state."""
        state = ", closed" if self._closed else ""
        return f"Runtime(threads={self._threads}, pin={self._pin}{state})"


def _checked(threads: object) -> int:
    if not isinstance(threads, int) or isinstance(threads, bool):
        raise TypeError(f"Runtime: threads must be an int, got {threads!r}")
    if not 1 <= threads <= MAX_THREADS:
        raise ValueError(f"Runtime: threads must be from 1 to {MAX_THREADS}, got {threads}")
    return threads


_default: Runtime | None = None
_default_lock = threading.Lock()


def default_runtime() -> Runtime:
    """Returns the process's shared runtime, made on first use (and anew in a forked child)."""
    global _default
    with _default_lock:
        if _default is None or _default.closed:
            _default = Runtime()
        return _default


def _forget_default() -> None:
    # The parent's threads are not here, nor is whoever may have held the lock.
    global _default, _default_lock
    _default = None
    _default_lock = threading.Lock()


os.register_at_fork(after_in_child=_forget_default)
