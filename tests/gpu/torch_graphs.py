"""Captures the calls of several layers into CUDA graphs, and replays them with new inputs."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from tests.gpu.gpu_tools import (
    Batch,
    Device,
    Sizes,
    arguments,
    call,
    call_beside,
    captured_plans,
    difference,
    make_batch,
    make_layers,
    runtime_of,
)
from tests.gpu.results import PASS, check, report, run_parts

from cpumoe.integrations.sglang.kt_kernel import KTMoEWrapper

SIZES = Sizes(layers=8)
TOKENS = (1, 2, 4, 8)
INPUTS = 20  # that replays use by turns
TIMED = 50  # replays
THREADS_TO_CLOSE = 1  # no other layer uses the runtime with so many
RSS_MB = 8.0  # growth that is not a leak


class Graph:
    """A graph of the calls of all layers for a number of tokens; each layer adds to its input."""

    def __init__(
        self, device: Device, layers: list[KTMoEWrapper], tokens: int, *, sides: bool = False
    ) -> None:
        """Captures the graph; `sides`: the calls of each layer are on a stream of its own."""
        self._sides = [device.side_stream() for _ in layers] if sides else None
        self._device = device
        self._layers = layers
        self._tokens = tokens
        self._batch = make_batch(SIZES, tokens).to(device.device)
        self._output = torch.empty(0)
        self._replay = device.capture(self._forward)

    def _forward(self) -> None:
        if self._sides is None:
            self._output = _pass(self._layers, self._batch, self._device.handle())
            return
        x = self._batch.hidden_states
        for side, layer in zip(self._sides, self._layers, strict=True):
            batch = self._batch._replace(hidden_states=x)
            x = x + call_beside(self._device, side, layer, batch)
        self._output = x

    def replay(self, batch: Batch) -> torch.Tensor:
        """Replays with new inputs; returns a copy of the output."""
        for own, new in zip(self._batch, batch, strict=True):
            own.copy_(new, non_blocking=True)
        self._replay()
        return self._output.clone()

    def microseconds_per_layer(self) -> float:
        """Returns the median time of a replay that is waited for, per layer."""
        times = []
        for _ in range(TIMED):
            start = time.perf_counter()
            self._replay()
            self._device.synchronize()
            times.append(time.perf_counter() - start)
        return statistics.median(times) / SIZES.layers * 1e6


def _pass(layers: list[KTMoEWrapper], batch: Batch, handle: int) -> torch.Tensor:
    x = batch.hidden_states
    for layer in layers:
        # The sum is rounded once on every device.
        x = x + call(layer, batch._replace(hidden_states=x), handle)
    return x


class Graphs:
    """Graphs for several numbers of tokens that share the layers."""

    def __init__(self, work: Path, device: Device, replays: int = 1000) -> None:
        """Makes the layers; `replays` of each graph."""
        self._work = work
        self._device = device
        self._replays = replays
        self._layers = make_layers(work, SIZES)
        self._graphs: dict[int, Graph] = {}
        self._inputs = {
            tokens: [make_batch(SIZES, tokens, seed) for seed in range(INPUTS)] for tokens in TOKENS
        }
        self._expected = {
            tokens: [_pass(self._layers, batch, 0) for batch in batches]
            for tokens, batches in self._inputs.items()
        }

    def parts(self) -> dict[str, Callable[[], None]]:
        """Returns the checks by name."""
        return {
            "capture": self.capture,
            "replays": self.replay,
            "replays and eager calls": self.mix,
            "side streams": self.side_streams,
            "deferral": self.defer,
            "errors": self.fail,
        }

    def graphs(self) -> dict[int, Graph]:
        """Returns the graphs by number of tokens. The first call captures them."""
        # Largest first, as SGLang captures them.
        for tokens in sorted(TOKENS, reverse=True):
            if tokens not in self._graphs:
                self._graphs[tokens] = Graph(self._device, self._layers, tokens)
        return self._graphs

    def capture(self) -> None:
        """A graph for each number of tokens."""
        report(PASS, "capture of 8 layers", graphs=len(self.graphs()))

    def replay(self) -> None:
        """Each replay's output is compared; memory and plans do not grow."""
        on_device = {
            tokens: [batch.to(self._device.device) for batch in batches]
            for tokens, batches in self._inputs.items()
        }
        rss, plans = [], []
        for tokens, graph in self.graphs().items():
            wrong = []
            for _ in range(max(self._replays // INPUTS, 1)):
                # The inputs of the next replay are queued before the last one has run.
                outputs = [graph.replay(batch) for batch in on_device[tokens]]
                wrong += map(difference, outputs, self._expected[tokens])
                rss.append(_rss_mb())
                plans.append(captured_plans(self._layers))
            name = f"T = {tokens}: replays with new inputs"
            bad = [text for text in wrong if text]
            check(
                name,
                not bad,
                f"{len(bad)} of {len(wrong)}: {bad[0]}" if bad else "",
                replays=len(wrong),
                us_per_layer=graph.microseconds_per_layer(),
            )
        growth = rss[-1] - rss[len(rss) // 4]
        check("memory during replays", growth < RSS_MB, "it grows", growth_mb=round(growth, 2))
        check("plans during replays", len(set(plans)) == 1, f"{plans}", plans=plans[-1])

    def mix(self) -> None:
        """Eager calls between replays, on the same stream."""
        wrong = []
        for seed in range(INPUTS):
            outputs = {}
            for tokens, graph in self.graphs().items():
                batch = self._inputs[tokens][seed].to(self._device.device)
                outputs[tokens] = graph.replay(batch)
                eager = _pass(self._layers, batch, self._device.handle())
                wrong.append(difference(eager, self._expected[tokens][seed]))
            wrong += [difference(o, self._expected[t][seed]) for t, o in outputs.items()]
        bad = [text for text in wrong if text]
        check("replays and eager calls by turns", not bad, f"{len(bad)}: {bad[:1]}")

    def side_streams(self) -> None:
        """A graph with a stream for each layer, as sglang-kt captures it."""
        graph = Graph(self._device, self._layers, 4, sides=True)
        on_device = [batch.to(self._device.device) for batch in self._inputs[4]]
        bad = []
        for _ in range(max(self._replays // INPUTS // 5, 1)):
            outputs = [graph.replay(batch) for batch in on_device]
            bad += [text for text in map(difference, outputs, self._expected[4]) if text]
        check(
            "layers with side streams",
            not bad,
            f"{len(bad)}: {bad[:1]}",
            us_per_layer=graph.microseconds_per_layer(),
        )

    def defer(self) -> None:
        """A graph whose layers leave experts to the next one."""
        layers = make_layers(self._work, SIZES, max_deferred_experts_per_token=2)
        graph = Graph(self._device, layers, 4)
        bad = []
        for batch in self._inputs[4]:
            output = graph.replay(batch.to(self._device.device))
            self._device.synchronize()
            bad += filter(None, [difference(output, _pass(layers, batch, 0))])
        check("deferral in a graph", not bad, f"{len(bad)} of {INPUTS}: {bad[:1]}")

    def fail(self) -> None:
        """A job that fails in a replay gives NaN, and its error at the next call."""
        [layer] = make_layers(
            self._work, replace(SIZES, layers=1), cpuinfer_threads=THREADS_TO_CLOSE
        )
        graph = Graph(self._device, [layer], 2)
        batch = self._inputs[2][0].to(self._device.device)
        graph.replay(batch)
        self._device.synchronize()
        runtime_of(layer).close()
        message = "no exception"
        try:
            output = graph.replay(batch)
            self._device.synchronize()
            check("a replay whose job fails gives NaN", bool(output.isnan().all()), f"{output}")
            call(layer, batch, self._device.handle())
        except RuntimeError as error:
            message = str(error)
        check("the next call raises the job's error", "closed" in message, message)


def _rss_mb() -> float:
    text = Path("/proc/self/status").read_text()
    [line] = [line for line in text.splitlines() if line.startswith("VmRSS")]
    return int(line.split()[1]) / 1e3


def main() -> None:
    """Runs the checks."""
    work, device = arguments()
    run_parts(Graphs(work, device).parts())


if __name__ == "__main__":
    main()
