"""Compares calls with tensors of the GPU with calls with CPU tensors, bit for bit."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import torch
from tests.gpu.gpu_tools import (
    MOST_TOKENS,
    Batch,
    Device,
    Sizes,
    arguments,
    call,
    call_beside,
    difference,
    make_batch,
    make_layers,
)
from tests.gpu.results import check, run_parts

SIZES = Sizes(layers=3)
TOKENS = (0, 1, 2, 3, 7, 8, 9, 16, 31, 64, 100, 128, 300, 512, 1000, 2048, MOST_TOKENS)
CALLS = 40  # of each stream


class Calls:
    """The layers on a device, and what calls with CPU tensors give."""

    def __init__(self, work: Path, device: Device, tokens: tuple[int, ...] = TOKENS) -> None:
        """Makes the layers."""
        self._work = work
        self._device = device
        self._tokens = tokens
        self._layers = make_layers(work, SIZES)
        self._layer = self._layers[0]

    def parts(self) -> dict[str, Callable[[], None]]:
        """Returns the checks by name."""
        return {
            "numbers of tokens": self.numbers_of_tokens,
            "inputs overwritten after submit": self.overwritten_inputs,
            "foreign ids and masks": self.masks,
            "many calls without waiting": self.without_waiting,
            "two streams": self.two_streams,
            "two threads": self.two_threads,
            "deferral": lambda: self.deferral(side=False),
            "a side stream for each layer": lambda: self.deferral(side=True),
            "wrong tensors": self.wrong_tensors,
        }

    def expected(self, batch: Batch, layer: int = 0) -> torch.Tensor:
        """Makes the call with CPU tensors."""
        return call(self._layers[layer], batch, 0)

    def actual(self, batch: Batch, layer: int = 0) -> torch.Tensor:
        """Queues the call on the device's current stream."""
        on_device = batch.to(self._device.device)
        return call(self._layers[layer], on_device, self._device.handle())

    def numbers_of_tokens(self) -> None:
        """All types, from no token to a whole chunk of a prefill."""
        for dtype in (torch.bfloat16, torch.float16):
            for ids in (torch.int32, torch.int64):
                wrong = {}
                for tokens in self._tokens:
                    batch = make_batch(SIZES, tokens, tokens, dtype=dtype, ids=ids)
                    if text := difference(self.actual(batch), self.expected(batch)):
                        wrong[tokens] = text
                name = f"T = {self._tokens[0]}..{self._tokens[-1]}, {dtype}, {ids}"
                check(name.replace("torch.", ""), not wrong, f"by tokens: {wrong}")

    def overwritten_inputs(self) -> None:
        """SGLang overwrites ids right after it has submitted them."""
        device = self._device
        wrong = []
        for seed in range(20):
            batch = make_batch(SIZES, 1 + seed * 7, seed)
            copy = batch.to(device.device)

            def overwrite(copy: Batch = copy) -> None:
                copy.topk_ids.fill_(-1)
                copy.topk_weights.zero_()
                copy.hidden_states.fill_(float("nan"))

            output = call(self._layer, copy, device.handle(), overwrite)
            wrong.append(difference(output, self.expected(batch)))
        check("inputs overwritten in the stream's order", not any(wrong), _first(wrong))

    def masks(self) -> None:
        """Ids that name no expert, and a mask that changes between calls."""
        wrong = []
        for seed in range(6):
            batch = make_batch(SIZES, 20, seed)
            batch.topk_ids[::3, 1] = -1
            batch.topk_ids[1::3, 2] = SIZES.experts + 1000 * seed
            self._layer.gpu_experts_mask[seed : seed + 5] = seed % 2 == 0
            actual, expected = self.actual(batch), self.expected(batch)
            wrong.append(difference(actual, expected))
        self._layer.gpu_experts_mask.zero_()
        check("foreign ids are skipped, masks may change", not any(wrong), _first(wrong))

    def without_waiting(self) -> None:
        """All layers, again and again, before the first result is looked at."""
        batches = [make_batch(SIZES, 1 + seed % 9, seed) for seed in range(CALLS)]
        outputs = [
            [self.actual(batch, layer) for layer in range(SIZES.layers)] for batch in batches
        ]
        self._device.synchronize()
        wrong = [
            difference(output, self.expected(batch, layer))
            for batch, row in zip(batches, outputs, strict=True)
            for layer, output in enumerate(row)
        ]
        check("calls that follow each other without waiting", not any(wrong), _first(wrong))

    def _stream_of_calls(self, seed: int, results: list[tuple[Batch, torch.Tensor]]) -> None:
        batches = [make_batch(SIZES, 1 + i % 5, seed + i) for i in range(CALLS)]
        with self._device.stream():
            outputs = [self.actual(batch) for batch in batches]
            self._device.synchronize()
        results += zip(batches, outputs, strict=True)

    def _compare(self, name: str, results: list[tuple[Batch, torch.Tensor]], number: int) -> None:
        wrong = [difference(output, self.expected(batch)) for batch, output in results]
        complete = len(results) == number
        check(name, complete and not any(wrong), _first(wrong) or f"{len(results)} results")

    def two_streams(self) -> None:
        """One thread, calls of one layer on two streams by turns."""
        results: list[tuple[Batch, torch.Tensor]] = []
        contexts = [self._device.stream(), self._device.stream()]
        for seed in range(CALLS):
            with contexts[seed % 2]:
                batch = make_batch(SIZES, 1 + seed % 6, seed)
                results.append((batch, self.actual(batch)))
        self._device.synchronize()
        self._compare("two streams by turns", results, CALLS)

    def two_threads(self) -> None:
        """Two threads with a stream each use one layer."""
        results: list[tuple[Batch, torch.Tensor]] = []
        threads = [
            threading.Thread(target=self._stream_of_calls, args=(1000 * t, results), daemon=True)
            for t in range(2)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(40)
        self._compare("two threads with a stream each", results, 2 * CALLS)

    def deferral(self, *, side: bool) -> None:
        """Three layers, of which two leave experts to the next one.

        Args:
            side: whether each layer's calls are on a stream of its own, as sglang-kt makes them.
        """
        for deferred in (0, 2):
            plain = self._layers
            self._layers = make_layers(self._work, SIZES, max_deferred_experts_per_token=deferred)
            try:
                wrong = self._passes(side=side)
            finally:
                self._layers = plain
            where = "layers with side streams" if side else "layers on one stream"
            check(f"{where}, {deferred} experts deferred", not any(wrong), _first(wrong))

    def _passes(self, *, side: bool) -> list[str]:
        device = self._device
        sides = [device.side_stream() for _ in self._layers]
        wrong = []
        for seed in range(10):
            batches = [make_batch(SIZES, 1 + seed, 10 * seed + i) for i in range(SIZES.layers)]
            actual = [
                call_beside(device, sides[i], self._layers[i], batch.to(device.device))
                if side
                else self.actual(batch, i)
                for i, batch in enumerate(batches)
            ]
            device.synchronize()
            expected = [self.expected(batch, i) for i, batch in enumerate(batches)]
            wrong += map(difference, actual, expected)
        return wrong

    def wrong_tensors(self) -> None:
        """Wrong tensors are refused, and the next call works."""
        device = self._device
        batch = make_batch(SIZES, 4, 1)
        copy = batch.to(device.device)
        accepted = []
        bad = {
            "hidden states of another width": copy._replace(
                hidden_states=copy.hidden_states[:, 8:]
            ),
            "float ids": copy._replace(topk_ids=copy.topk_ids.float()),
            "weights of fewer tokens": copy._replace(topk_weights=copy.topk_weights[1:]),
        }
        if device.device.type == "cuda":
            bad["ids on the CPU"] = copy._replace(topk_ids=batch.topk_ids)
        for name, tensors in bad.items():
            try:
                call(self._layer, tensors, device.handle())
                accepted.append(name)
            except (TypeError, ValueError) as error:
                print(f"refused as expected: {error}")
        wrong = difference(self.actual(batch), self.expected(batch))
        check("wrong tensors are refused", not accepted and not wrong, wrong or str(accepted))


def _first(texts: list[str]) -> str:
    wrong = [text for text in texts if text]
    return f"{len(wrong)} of {len(texts)} calls: {wrong[0]}" if wrong else ""


def main() -> None:
    """Runs the checks."""
    work, device = arguments()
    run_parts(Calls(work, device).parts())


if __name__ == "__main__":
    main()
