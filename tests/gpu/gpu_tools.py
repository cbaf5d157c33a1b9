"""The device under test, made-up layers of SGLang's module, and calls as SGLang makes them."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from cpumoe import Runtime
from cpumoe.integrations.sglang.kt_kernel import KTMoEWrapper
from cpumoe.models import find_model
from cpumoe.models.synth import write_checkpoint

MOST_TOKENS = 4096


class CudaSide:
    """A stream beside the current one, as sglang-kt has one for each layer."""

    def __init__(self, device: torch.device) -> None:
        """Makes the stream."""
        self._stream = torch.cuda.Stream(device)
        self._event = torch.cuda.Event()

    def fork(self) -> None:
        """Lets the stream wait for what the current one has queued."""
        self._stream.wait_stream(torch.cuda.current_stream())

    def use(self) -> AbstractContextManager[Any]:
        """Returns a context in which the stream is current."""
        context: AbstractContextManager[Any] = torch.cuda.stream(self._stream)
        return context

    def join(self, tensor: torch.Tensor) -> None:
        """Lets the current stream wait for this one, which has made `tensor`."""
        current = torch.cuda.current_stream()
        self._event.record(self._stream)
        current.wait_event(self._event)
        tensor.record_stream(current)


class CpuSide:
    """What stands in for `CudaSide`."""

    def fork(self) -> None:
        """See `CudaSide.fork`."""

    def use(self) -> AbstractContextManager[Any]:
        """See `CudaSide.use`."""
        return nullcontext()

    def join(self, tensor: torch.Tensor) -> None:
        """See `CudaSide.join`."""


class Cuda:
    """The first GPU."""

    def __init__(self) -> None:
        """Makes the context current."""
        self.device = torch.device("cuda", 0)
        torch.cuda.set_device(self.device)
        torch.empty(1, device=self.device)
        self._capture_stream = torch.cuda.Stream(self.device)
        self._cycles_per_second = 0.0

    def handle(self) -> int:
        """Returns what SGLang passes as `cuda_stream`."""
        return int(torch.cuda.current_stream(self.device).cuda_stream)

    def stream(self) -> AbstractContextManager[Any]:
        """Returns a context in which a new stream is current."""
        stream = torch.cuda.Stream(self.device)
        stream.wait_stream(torch.cuda.current_stream(self.device))
        context: AbstractContextManager[Any] = torch.cuda.stream(stream)
        return context

    def side_stream(self) -> CudaSide:
        """Returns a stream for operations beside the current one's."""
        return CudaSide(self.device)

    def synchronize(self) -> None:
        """Waits for everything."""
        torch.cuda.synchronize(self.device)

    def capture(self, function: Callable[[], None]) -> Callable[[], None]:
        """Captures the operations of `function` into a graph; returns what replays it."""
        self.synchronize()  # Tensors that the graph uses may still be on their way.
        with torch.cuda.stream(self._capture_stream):
            function()  # a call before the capture, as hosts make it
        self.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=self._capture_stream):
            function()
        return graph.replay

    def work(self, seconds: float) -> None:
        """Queues a kernel that takes `seconds`."""
        if not self._cycles_per_second:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            for _ in range(2):  # The first one warms up.
                start.record()
                torch.cuda._sleep(10_000_000)
                end.record()
            self.synchronize()
            self._cycles_per_second = 10_000_000 / (start.elapsed_time(end) / 1e3)
        torch.cuda._sleep(int(seconds * self._cycles_per_second))


class Cpu:
    """Stands in for a GPU when the steps themselves are tested. Nothing is asynchronous."""

    def __init__(self) -> None:
        """Has nothing to make."""
        self.device = torch.device("cpu")

    def handle(self) -> int:
        """See `Cuda.handle`."""
        return 0

    def stream(self) -> AbstractContextManager[Any]:
        """See `Cuda.stream`."""
        return nullcontext()

    def side_stream(self) -> CpuSide:
        """See `Cuda.side_stream`."""
        return CpuSide()

    def synchronize(self) -> None:
        """See `Cuda.synchronize`."""

    def capture(self, function: Callable[[], None]) -> Callable[[], None]:
        """See `Cuda.capture`."""
        function()
        return function

    def work(self, seconds: float) -> None:
        """See `Cuda.work`."""
        time.sleep(seconds)


Device = Cuda | Cpu


@dataclass(frozen=True)
class Sizes:
    """The layers of a made-up checkpoint."""

    layers: int = 2
    experts: int = 16
    hidden: int = 512
    intermediate: int = 256
    top_k: int = 6


class Batch(NamedTuple):
    """The tensors of a call, all of one device."""

    hidden_states: torch.Tensor
    topk_ids: torch.Tensor
    topk_weights: torch.Tensor

    def to(self, device: torch.device) -> Batch:
        """Returns a copy on another device."""
        return Batch(*(tensor.to(device, copy=True) for tensor in self))


def make_batch(
    sizes: Sizes,
    tokens: int,
    seed: int = 0,
    *,
    dtype: torch.dtype = torch.bfloat16,
    ids: torch.dtype = torch.int32,
) -> Batch:
    """Returns random tensors on the CPU."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(tokens, sizes.experts, generator=generator)
    return Batch(
        torch.randn(tokens, sizes.hidden, generator=generator).to(dtype),
        scores.topk(sizes.top_k).indices.to(ids),
        torch.rand(tokens, sizes.top_k, generator=generator).softmax(-1),
    )


def make_layers(work: Path, sizes: Sizes, **options: Any) -> list[KTMoEWrapper]:
    """Returns SGLang's objects for all layers of a made-up checkpoint in MXFP4."""
    folder = work / "checkpoints" / "-".join(str(size) for size in vars(sizes).values())
    if not (folder / "config.json").exists():
        folder.mkdir(parents=True, exist_ok=True)
        write_checkpoint(folder, find_model("v4-flash"), pattern="random", **vars(sizes))
    layers = []
    for index in range(sizes.layers):
        layer = KTMoEWrapper(
            **{
                "layer_idx": index,
                "num_experts": sizes.experts,
                "num_experts_per_tok": sizes.top_k,
                "hidden_size": sizes.hidden,
                "moe_intermediate_size": sizes.intermediate,
                "weight_path": folder,
                "method": "MXFP4",
                "chunked_prefill_size": MOST_TOKENS,
                **options,
            }
        )
        layer.load_weights(torch.arange(sizes.experts))
        layers.append(layer)
    return layers


def runtime_of(layer: KTMoEWrapper) -> Runtime:
    """Returns the threads that compute a layer."""
    assert layer._layer is not None
    return layer._layer.experts.runtime


def captured_plans(layers: list[KTMoEWrapper]) -> int:
    """Returns how many jobs the graphs of some layers have recorded."""
    return sum(
        call.captured_plans
        for layer in layers
        if layer._layer is not None
        for calls in layer._layer._calls.values()
        for call in calls.values()
    )


def call(
    layer: KTMoEWrapper,
    batch: Batch,
    handle: int,
    between: Callable[[], object] = lambda: None,
) -> torch.Tensor:
    """Makes a call; `between` is what the host does between submit and sync."""
    layer.submit_forward(*batch, handle)
    between()
    return layer.sync_forward(batch.hidden_states, handle)


def call_beside(
    device: Device, side: CudaSide | CpuSide, layer: KTMoEWrapper, batch: Batch
) -> torch.Tensor:
    """Makes a call on a side stream, whose result the current stream then uses."""
    side.fork()
    with side.use():
        layer.submit_forward(*batch, device.handle())
    with side.use():
        output = layer.sync_forward(batch.hidden_states, device.handle())
    side.join(output)
    return output


def difference(actual: torch.Tensor, expected: torch.Tensor) -> str:
    """Says how tensors differ; an empty string if they are equal bit for bit."""
    actual = actual.cpu()
    if actual.shape != expected.shape or actual.dtype != expected.dtype:
        return (
            f"expected {expected.dtype} {list(expected.shape)}, got {actual.dtype} "
            f"{list(actual.shape)}"
        )
    if torch.equal(actual, expected):
        return ""
    wrong = (actual != expected) | actual.isnan()
    most = (actual.float() - expected.float()).abs().nan_to_num(float("inf")).max()
    return f"{int(wrong.sum())} of {wrong.numel()} numbers differ, at most by {float(most):.3g}"


class Arguments(NamedTuple):
    """What the runner passes to a step."""

    work: Path
    device: Device


def arguments() -> Arguments:
    """Reads the command line of a step."""
    parser = argparse.ArgumentParser()
    parser.add_argument("work", type=Path)
    parser.add_argument("--without-gpu", action="store_true")
    options = parser.parse_args()
    return Arguments(options.work, Cpu() if options.without_gpu else Cuda())
