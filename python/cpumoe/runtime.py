"""The threads that expert layers run on."""

from __future__ import annotations

import os
import threading
import warnings
from types import TracebackType

from cpumoe import _core

# A larger number is a mistake: no machine has so many cores.
MAX_THREADS = 4096


class Runtime:
    """A pool of threads and its scratch memory, shared by any number of `Experts`.

    Threads are persistent. They poll for some microseconds after a call and then sleep, so an idle
    runtime uses no CPU. Calls from several Python threads run one after the other.

    A runtime does not survive ``fork()``. Using it in the child raises RuntimeError; the default
    runtime is made anew there. Scratch memory grows to the needs of the largest call (up to 400 MB
    for long prompts with DeepSeek-V4-Flash) and is kept until `close`.

    Args:
        threads: number of threads that compute, the calling one included. Default: the number of
            physical cores in this process's affinity mask, capped by its cgroup's CPU quota
            (rounded down), at least 1. A larger number causes a warning, because threads that share
            a core slow each other down.
        pin: whether each thread other than the caller stays on one core.

    Raises:
        TypeError: `threads` is not an int.
        ValueError: `threads` is not from 1 to 4096.
        OSError: the system refuses to start more threads.
    """

    def __init__(self, threads: int | None = None, *, pin: bool = False) -> None:
        """Starts the threads."""
        topology = _core.topology()
        self._threads = topology.default_threads if threads is None else _checked(threads)
        if self._threads > topology.default_threads:
            warnings.warn(
                f"Runtime: {self._threads} threads requested, but this process may use "
                f"{topology.default_threads} (physical cores in its affinity mask, capped by its "
                "cgroup's CPU quota); calls will be slower, not faster",
                RuntimeWarning,
                stacklevel=2,
            )
        self._pin = pin
        self._closed = False
        self.core = _core.Runtime(threads=self._threads, cpus=topology.cores if pin else [])

    @property
    def threads(self) -> int:
        """Number of threads that compute, the calling one included."""
        return self._threads

    @property
    def closed(self) -> bool:
        """Whether `close` was called."""
        return self._closed

    def close(self) -> None:
        """Finishes submitted calls, ends the threads and frees scratch memory.

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
        """Shows the number of threads, pinning, and whether the runtime is closed."""
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
    # The child has none of the parent's threads, one of which may have held the lock.
    global _default, _default_lock
    _default = None
    _default_lock = threading.Lock()


os.register_at_fork(after_in_child=_forget_default)
