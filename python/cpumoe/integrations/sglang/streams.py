"""Forward calls in the order of a stream, and the sums that one layer leaves to the next.

This version of cpumoe has one kind of stream: the calls of a thread on CPU tensors. `stream_of` is
the place where another kind, a CUDA stream, would be chosen.
"""

from __future__ import annotations

import logging
import threading
from contextlib import suppress
from dataclasses import dataclass, field
from weakref import WeakKeyDictionary

import torch

from cpumoe.checkpoint import ExpertReader
from cpumoe.experts import Experts
from cpumoe.future import Future
from cpumoe.integrations.sglang.deferral import split

logger = logging.getLogger(__name__)


@dataclass(eq=False)
class Layer:
    """A layer's experts, as streams use them.

    Attributes:
        experts: computes.
        index: number of the decoder layer.
        model: the checkpoint, which identifies the model.
        deferred: how many of a token's experts may run after the layer; 0: none.
        running: the calls that were submitted last.
    """

    experts: Experts
    index: int
    model: ExpertReader
    deferred: int
    running: tuple[Future, ...] = field(default=(), init=False)

    def wait(self) -> None:
        """Waits until no call runs. Whoever asks for a result gets its error."""
        for future in self.running:
            with suppress(Exception):
                future.result()


@dataclass(frozen=True)
class _Pending:
    """The sum ``[tokens, hidden]`` in fp32 of the experts that a layer deferred."""

    layer: Layer
    future: Future
    sum: torch.Tensor

    def fits(self, layer: Layer, x: torch.Tensor) -> bool:
        """Whether `layer` comes after the sum's layer in the same pass over the model.

        A pass goes up through the layers. The sum of a pass that an error ended fits nowhere.
        """
        same_model = layer.model is self.layer.model
        return same_model and layer.index > self.layer.index and x.shape == self.sum.shape


@dataclass(frozen=True)
class _Started:
    """A call between `CpuStream.submit` and `CpuStream.sync`."""

    future: Future
    shape: torch.Size
    dtype: torch.dtype
    added: Future | None = None  # the deferred sum that the result contains


class CpuStream:
    """The calls of one thread on CPU tensors."""

    def __init__(self) -> None:
        """Makes a stream without calls."""
        self._started: WeakKeyDictionary[Layer, _Started] = WeakKeyDictionary()
        self._pending: _Pending | None = None

    def submit(
        self, layer: Layer, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor
    ) -> None:
        """Starts a call. The caller may change all tensors afterwards.

        A call of the layer that was started before and not waited for is forgotten.
        """
        experts = layer.experts
        _check_routing(ids, weights)
        # The host pads with ids of its own, which name no expert.
        ids = ids.clamp(-1, experts.num_experts)
        pending = self._pending
        if pending is not None and not pending.fits(layer, x):
            logger.warning(
                "layer %d: the experts that layer %d deferred are left out, because its pass has "
                "ended early",
                layer.index,
                pending.layer.index,
            )
            pending = None
        if pending is None and not layer.deferred:
            future = experts.submit(x, ids, weights, copy_inputs=True)
            self._remember(layer, _Started(future, x.shape, x.dtype), None)
            return
        x, weights, later = x.clone(), weights.clone(), ids
        if layer.deferred:
            ids, later = split(ids, weights, ids.shape[1] - layer.deferred, experts.num_experts)
        if pending is None:
            future = experts.submit(x, ids, weights)
        else:
            if pending.layer.experts.runtime is not experts.runtime:
                pending.future.result()  # Only calls of one runtime run in their order.
            future = experts.submit(x, ids, weights, out=pending.sum, accumulate=True)
        added = None if pending is None else pending.future
        started = _Started(future, x.shape, x.dtype, added)
        if not layer.deferred:
            self._remember(layer, started, None)
            return
        total = torch.empty(x.shape, dtype=torch.float32, device="cpu")
        deferred = experts.submit(x, later, weights, out=total)
        self._remember(layer, started, _Pending(layer, deferred, total))

    def sync(self, layer: Layer, x: torch.Tensor) -> torch.Tensor:
        """Waits for the layer's call, and returns its result.

        Raises:
            RuntimeError: the stream has no such call.
            ValueError: `x` has another shape or dtype than the call.
        """
        started = self._started.get(layer)
        if started is None:
            raise RuntimeError(
                f"layer {layer.index}: sync_forward: expected a submit_forward before it on the "
                "same thread, got none"
            )
        if x.shape != started.shape or x.dtype != started.dtype:
            raise ValueError(
                f"layer {layer.index}: sync_forward: expected {started.dtype} "
                f"{list(started.shape)}, as submit_forward got, got {x.dtype} {list(x.shape)}"
            )
        del self._started[layer]
        if started.added is not None:
            started.added.result()
        return started.future.result().to(started.dtype)

    def _remember(self, layer: Layer, started: _Started, pending: _Pending | None) -> None:
        self._started[layer] = started
        self._pending = pending
        layer.running = (started.future,) if pending is None else (started.future, pending.future)


def _check_routing(ids: torch.Tensor, weights: torch.Tensor) -> None:
    """Checks what `CpuStream.submit` needs; `Experts.submit` checks the rest."""
    for name, tensor in (("topk_ids", ids), ("topk_weights", weights)):
        if not isinstance(tensor, torch.Tensor):
            raise TypeError(f"{name}: expected a torch.Tensor, got {type(tensor).__name__}")
    if ids.dim() != 2 or ids.shape != weights.shape:
        raise ValueError(
            "topk_ids, topk_weights: expected [tokens, top_k] both, got "
            f"{list(ids.shape)} and {list(weights.shape)}"
        )


_thread = threading.local()


def stream_of(x: torch.Tensor, handle: object) -> CpuStream:
    """Returns the stream that `x` is on.

    Args:
        x: a tensor of the call.
        handle: the host's handle of the stream: None, an int, or an object with `cuda_stream`.

    Raises:
        TypeError: `x` is no tensor.
        NotImplementedError: `x` is not on the CPU, or `handle` names a stream of a GPU.
    """
    if not isinstance(x, torch.Tensor):
        raise TypeError(f"hidden_states: expected a torch.Tensor, got {type(x).__name__}")
    number = getattr(handle, "cuda_stream", handle)
    if not x.is_cpu or number not in (None, 0):
        raise NotImplementedError(
            f"hidden_states: expected a CPU tensor and stream 0 or None, got device {x.device} and "
            f"stream {number!r}; this version of cpumoe cannot follow the stream of a GPU"
        )
    stream: CpuStream | None = getattr(_thread, "stream", None)
    if stream is None:
        stream = _thread.stream = CpuStream()
    return stream
