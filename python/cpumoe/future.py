"""The result of a call that runs on a runtime's driver thread."""

from __future__ import annotations

import math

import torch

from cpumoe import _core
from cpumoe._arguments import Call


class Future:
    """The result of `Experts.submit`. Dropping it unasked waits for the call to finish."""

    def __init__(self, completion: _core.Completion, call: Call) -> None:
        """Made by `Experts.submit`."""
        self._completion = completion
        self._call = call

    def done(self) -> bool:
        """Whether the result (or an error) is there."""
        return self._completion.done()

    def result(self, timeout: float | None = None) -> torch.Tensor:
        """Waits for the result ``[tokens, hidden]``.

        Args:
            timeout: seconds to wait at most; None: for ever.

        Raises:
            TimeoutError: it is not there yet; ask again later.
            IndexError: an expert id was out of range.
            RuntimeError: this process was forked after `submit`.
        """
        if timeout is not None and math.isnan(timeout):
            raise ValueError("timeout: expected seconds, got nan")
        if timeout is not None and not self._completion.wait_for(timeout):
            raise TimeoutError(f"no result within {timeout} s")
        self._completion.wait()
        return self._call.output

    def __del__(self) -> None:
        """Keeps the tensors that the call reads and writes alive until it is over."""
        # Not contextlib.suppress: at interpreter exit it may be gone before this object.
        try:  # noqa: SIM105
            self._completion.wait()
        except Exception:  # nobody asked for the outcome
            pass
