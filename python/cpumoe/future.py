"""The result of a call that runs on a runtime's driver thread."""

from __future__ import annotations

import math
from numbers import Real

import torch

from cpumoe import _core


class Future:
    """The result of `Experts.submit`. Deleting a future waits for its call to finish."""

    def __init__(self, call: _core.SubmittedCall, output: torch.Tensor) -> None:
        """`Experts.submit` makes futures."""
        self._call = call
        self._output = output

    def done(self) -> bool:
        """Whether the call has finished, with a result or an error."""
        return self._call.done()

    def result(self, timeout: float | None = None) -> torch.Tensor:
        """Waits for the result ``[tokens, hidden]``.

        Args:
            timeout: longest time to wait, in seconds; None: no limit.

        Raises:
            TimeoutError: the result is not there yet; ask again later.
            TypeError, ValueError: `timeout` is no number.
            IndexError: an expert id was out of range.
            RuntimeError: this process was forked after `submit`.
        """
        _check_timeout(timeout)
        if timeout is not None and not self._call.wait_for(timeout):
            raise TimeoutError(f"no result within {timeout} s")
        self._call.wait()
        return self._output


def _check_timeout(timeout: object) -> None:
    if timeout is None:
        return
    if not isinstance(timeout, Real):
        raise TypeError(
            f"timeout: expected seconds as a number, or None for no limit, got {timeout!r}"
        )
    if math.isnan(timeout):
        raise ValueError("timeout: expected seconds, got nan")
