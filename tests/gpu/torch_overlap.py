"""Lets a GPU compute between submit and sync: a step takes as long as the longer of the two."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from tests.gpu.gpu_tools import (
    Batch,
    Device,
    Sizes,
    arguments,
    call,
    make_batch,
    make_layers,
)
from tests.gpu.results import check, run_parts

# Larger than caches, so that a call takes milliseconds.
SIZES = Sizes(layers=1, experts=64, hidden=2048, intermediate=1024)
SECONDS = 2e-3  # of the GPU's kernel
TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
HIDDEN_SHARE = 0.6  # of the shorter part, which must not add to the longer one


class Overlap:
    """A layer whose calls take about as long as the kernel."""

    def __init__(
        self, work: Path, device: Device, sizes: Sizes = SIZES, repetitions: int = 30
    ) -> None:
        """Makes the layer."""
        self._device = device
        self._sizes = sizes
        self._repetitions = repetitions
        [self._layer] = make_layers(work, sizes)

    def parts(self) -> dict[str, Callable[[], None]]:
        """Returns the checks by name."""
        return {"eager": self.eager, "graph": self.graph}

    def eager(self) -> None:
        """Operations that are queued one by one."""
        batch = self._batch()

        def both() -> None:
            call(self._layer, batch, self._device.handle(), lambda: self._device.work(SECONDS))

        self._compare(
            "step beside a kernel",
            lambda: call(self._layer, batch, self._device.handle()),
            both,
            len(batch.hidden_states),
        )

    def graph(self) -> None:
        """The graphs of both."""
        device, batch = self._device, self._batch()
        device.work(SECONDS)  # The first one measures the clock, which a capture could not.

        def alone() -> None:
            call(self._layer, batch, device.handle())

        def both() -> None:
            call(self._layer, batch, device.handle(), lambda: device.work(SECONDS))

        self._compare(
            "step beside a kernel, in a graph",
            device.capture(alone),
            device.capture(both),
            len(batch.hidden_states),
        )

    def _batch(self) -> Batch:
        """Returns the batch whose call takes as long as the kernel, as nearly as possible."""
        times = {}
        for tokens in TOKENS:
            batch = make_batch(self._sizes, tokens).to(self._device.device)
            times[tokens] = self._seconds(
                lambda batch=batch: call(self._layer, batch, self._device.handle()), 5
            )
            if times[tokens] > SECONDS:
                break
        best = min(times, key=lambda tokens: abs(times[tokens] - SECONDS))
        return make_batch(self._sizes, best).to(self._device.device)

    def _compare(
        self, name: str, alone: Callable[[], object], both: Callable[[], object], tokens: int
    ) -> None:
        kernel = self._seconds(lambda: self._device.work(SECONDS))
        experts, step = self._seconds(alone), self._seconds(both)
        limit = max(kernel, experts) + (1 - HIDDEN_SHARE) * min(kernel, experts)
        check(
            name,
            step < limit,
            f"expected less than {limit * 1e3:.2f} ms",
            step_ms=step * 1e3,
            kernel_ms=kernel * 1e3,
            experts_ms=experts * 1e3,
            tokens=tokens,
        )

    def _seconds(self, function: Callable[[], object], repetitions: int | None = None) -> float:
        times = []
        for _ in range((repetitions or self._repetitions) + 2):
            self._device.synchronize()
            start = time.perf_counter()
            function()
            self._device.synchronize()
            times.append(time.perf_counter() - start)
        return min(times[2:])


def main() -> None:
    """Runs the checks."""
    work, device = arguments()
    run_parts(Overlap(work, device).parts())


if __name__ == "__main__":
    main()
