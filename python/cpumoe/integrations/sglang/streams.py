"""Forward calls in the order of a host's stream: the calls of a thread, or a stream of CUDA.

Both kinds make their calls through `_core.StreamCall`, which copies the inputs into memory that the
CPU and the GPU can read, starts the experts' job, and lets the stream wait for it.
"""

from __future__ import annotations

import logging
import os
import threading
from dataclasses import dataclass
from typing import ClassVar
from weakref import WeakKeyDictionary

import torch
from typing_extensions import override

from cpumoe import _core
from cpumoe._base.tensors import contiguous, new_like
from cpumoe._engine.calls import check_inputs
from cpumoe._engine.gradients import without_gradients
from cpumoe.checkpoint import ExpertReader
from cpumoe.integrations.sglang.checks import integer_in
from cpumoe.integrations.sglang.layer import Form, Layer

logger = logging.getLogger(__name__)

# The most tokens of a captured call that go to the CPU at once. Graphs are for short calls, and
# their buffers stay allocated besides those of other calls.
_CAPTURED_TOKENS = 1024


_Bridges = WeakKeyDictionary[ExpertReader, dict[tuple[torch.device, torch.dtype], _core.Bridge]]
_thread = threading.local()
_of_parents: list[threading.local] = []  # never freed, because their threads do not exist here


def _forget_parent() -> None:
    global _thread
    _of_parents.append(_thread)
    _thread = threading.local()


os.register_at_fork(after_in_child=_forget_parent)


@dataclass(frozen=True)
class _Started:
    """A call between `Stream.submit` and `Stream.sync`."""

    call: _core.StreamCall
    output: torch.Tensor


class Stream:
    """The calls on one stream; the subclasses say where its tensors are.

    Attributes:
        device: where the stream's tensors are.
        kind: what a host knows the stream as, for errors.
    """

    device: torch.device
    kind: ClassVar[str]

    def __init__(self, handle: int) -> None:
        """Makes calls on the stream that the driver knows as `handle`."""
        self._handle = handle
        self._started: WeakKeyDictionary[Layer, _Started] = WeakKeyDictionary()

    def submit(
        self, layer: Layer, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor
    ) -> None:
        """Starts a call. Tensors may be changed in the stream's order afterwards.

        A call of the layer that was started before and not waited for is forgotten, and so is the
        oldest one if calls of two other layers were not waited for.
        """
        x, x_address = self.dense(x, "hidden_states")
        ids, ids_address = self.dense(ids, "topk_ids")
        weights, weights_address = self.dense(weights, "topk_weights")
        check_inputs(x, ids, weights, layer.experts.hidden_size)
        if weights.dtype != torch.float32:
            weights, weights_address = self.dense(weights.float(), "topk_weights")
        output, output_address = self.new_output(x)
        output = without_gradients(output, x, weights)
        form = layer.form_of(x, ids)
        with layer.naming_errors(), layer.submitting():
            call = layer.call(self, form, lambda: self._bridge(layer, form))
            call.submit(
                self._handle,
                x_address,
                x.shape[1],
                x.shape[0],
                ids_address,
                weights_address,
                output_address,
            )
        self._started[layer] = _Started(call, output)

    def sync(self, layer: Layer, x: torch.Tensor) -> torch.Tensor:
        """Lets the stream wait for the layer's call, and returns its result.

        Raises:
            RuntimeError: the stream has no such call, or a call of the layer has failed.
            ValueError: `x` has another shape or dtype than the call.
        """
        started = self._started.get(layer)
        if started is None:
            raise RuntimeError(
                f"layer {layer.index}: sync_forward: expected a submit_forward before it on the "
                f"same {self.kind}, got none"
            )
        output = started.output
        if x.shape != output.shape or x.dtype != output.dtype:
            raise ValueError(
                f"layer {layer.index}: sync_forward: expected {output.dtype} "
                f"{list(output.shape)}, as submit_forward got, got {x.dtype} {list(x.shape)}"
            )
        del self._started[layer]
        with layer.naming_errors():
            started.call.sync(self._handle)
        left_out = started.call.take_left_out()
        if left_out is not None:
            logger.warning(
                "layer %d: the experts that layer %d deferred are left out, because its pass has "
                "ended early",
                layer.index,
                left_out,
            )
        return output

    def dense(self, tensor: torch.Tensor, name: str) -> tuple[torch.Tensor, int]:
        """Returns a tensor of the stream's device, or a contiguous copy, and its address.

        Raises:
            TypeError: it is no tensor, is elsewhere, or has no memory.
        """
        raise NotImplementedError

    def new_output(self, x: torch.Tensor) -> tuple[torch.Tensor, int]:
        """Returns a new tensor for a result, and its address."""
        raise NotImplementedError

    def new_bridge(self, buffer_bytes: int, captured_bytes: int) -> _core.Bridge:
        """Returns a bridge with buffers of these sizes."""
        raise NotImplementedError

    def _bridge(self, layer: Layer, form: Form) -> _core.Bridge:
        # A thread passes through the layers of a model, perhaps with a stream for each of them.
        # Through the bridge the layers hand on what they defer.
        models: _Bridges | None = getattr(_thread, "bridges", None)
        if models is None:
            models = _thread.bridges = WeakKeyDictionary()
        bridges = models.setdefault(layer.model, {})
        key = (self.device, form.dtype)
        bridge = bridges.get(key)
        if bridge is None:

            def size(tokens: int) -> int:
                hidden = layer.experts.hidden_size
                return _core.stream_buffer_bytes(hidden_size=hidden, tokens=tokens, **form.sizes())

            captured = min(layer.tokens, _CAPTURED_TOKENS)
            bridge = bridges[key] = self.new_bridge(size(layer.tokens), size(captured))
        return bridge


class CpuStream(Stream):
    """The calls of one thread on CPU tensors."""

    device = torch.device("cpu")
    kind = "thread"

    @override
    def dense(self, tensor: torch.Tensor, name: str) -> tuple[torch.Tensor, int]:
        tensor, address, _ = contiguous(tensor, name)
        return tensor, address

    @override
    def new_output(self, x: torch.Tensor) -> tuple[torch.Tensor, int]:
        return new_like(x, "hidden_states")

    @override
    def new_bridge(self, buffer_bytes: int, captured_bytes: int) -> _core.Bridge:
        # Without a driver there are no graphs.
        return _core.Bridge(cuda=False, buffer_bytes=buffer_bytes, captured_bytes=1)


class CudaStream(Stream):
    """A stream of a GPU, on which the host queues operations itself."""

    kind = "stream"

    def __init__(self, device: torch.device, handle: int) -> None:
        """Makes calls on the stream that CUDA knows as `handle`."""
        super().__init__(handle)
        self.device = device

    @override
    def dense(self, tensor: torch.Tensor, name: str) -> tuple[torch.Tensor, int]:
        if not isinstance(tensor, torch.Tensor):
            raise TypeError(f"{name}: expected a torch.Tensor, got {type(tensor).__name__}")
        if tensor.device != self.device or tensor.layout != torch.strided:
            raise TypeError(
                f"{name}: expected a dense tensor on {self.device}, where the hidden states are, "
                f"got layout {tensor.layout} on {tensor.device}"
            )
        tensor = tensor.detach().contiguous()
        return tensor, tensor.data_ptr()

    @override
    def new_output(self, x: torch.Tensor) -> tuple[torch.Tensor, int]:
        # PyTorch takes the memory from the pool of the graph that is being captured, if one is.
        output = torch.empty_like(x, memory_format=torch.contiguous_format)
        return output, output.data_ptr()

    @override
    def new_bridge(self, buffer_bytes: int, captured_bytes: int) -> _core.Bridge:
        with torch.cuda.device(self.device):
            torch.cuda.mem_get_info()  # makes the device's context current on a new thread
            return _core.Bridge(cuda=True, buffer_bytes=buffer_bytes, captured_bytes=captured_bytes)


_cuda_streams: dict[tuple[torch.device, int], CudaStream] = {}


def stream_of(x: torch.Tensor, handle: object) -> Stream:
    """Returns the stream that `x` is on.

    Args:
        x: a tensor of the call.
        handle: the host's handle of the stream: an int, or an object with `cuda_stream`. None: the
            current stream of the tensor's device.

    Raises:
        TypeError: `x` is no tensor, or neither on the CPU nor on a GPU of CUDA; `handle` is no
            stream.
        ValueError: `x` is on the CPU, but `handle` names a stream of a GPU.
    """
    if not isinstance(x, torch.Tensor):
        raise TypeError(f"hidden_states: expected a torch.Tensor, got {type(x).__name__}")
    number = getattr(handle, "cuda_stream", handle)
    if x.is_cpu:
        if number not in (None, 0):
            raise ValueError(
                f"cuda_stream: expected 0 or None with CPU tensors, got {number!r}; pass tensors "
                "of the stream's device"
            )
        stream: CpuStream | None = getattr(_thread, "stream", None)
        if stream is None:
            stream = _thread.stream = CpuStream(0)
        return stream
    if not x.is_cuda:
        raise TypeError(
            "hidden_states: expected a tensor on the CPU or on a GPU of CUDA, got device "
            f"{x.device}"
        )
    if number is None:
        number = torch.cuda.current_stream(x.device).cuda_stream
    key = (x.device, integer_in(number, "cuda_stream", 0))
    if key not in _cuda_streams:
        _cuda_streams.setdefault(key, CudaStream(*key))
    return _cuda_streams[key]
