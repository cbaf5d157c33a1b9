"""The class through which SGLang computes a layer's experts on the CPU."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterable, Sequence
from typing import ClassVar

import torch

from cpumoe._base.scalars import integer
from cpumoe.experts import Experts
from cpumoe.integrations.sglang.checkpoint import (
    LayerSizes,
    experts_of_slots,
    known_method,
    open_experts,
    swiglu_of,
)
from cpumoe.integrations.sglang.checks import integer_in
from cpumoe.integrations.sglang.layer import Layer
from cpumoe.integrations.sglang.placement import HostsMask, checked_mask, gpu_mask
from cpumoe.integrations.sglang.streams import stream_of
from cpumoe.integrations.sglang.write_back import WriteBack
from cpumoe.runtime import Runtime, default_runtime

logger = logging.getLogger(__name__)

_SYNCHRONOUS = "KT_FORCE_SYNC_SUBMIT"
# The most tokens of a call that go to the CPU at once, if the host does not divide its prompts.
_MOST_TOKENS = 4096
_MOST_EXPERTS = 1 << 16  # as the engine
_LONGEST_CHUNK = 1 << 18


class KTMoEWrapper:
    """The experts of one layer that the CPU computes.

    SGLang makes one for each layer, and calls `load_weights` once and then, for each forward pass,
    `submit_forward` and `sync_forward`. `gpu_experts_mask` says which experts the GPU has. These
    experts are skipped, and take no memory.

    Args:
        layer_idx: number of the decoder layer.
        num_experts: number of routed experts.
        num_experts_per_tok: number of a token's experts.
        hidden_size: width of the hidden states.
        moe_intermediate_size: inner width of an expert, of all GPU ranks together.
        weight_path: folder of the checkpoint that has the experts.
        method: the format of the checkpoint's experts: "MXFP4", "RAWINT4", "FP8" (blocks of
            128 x 128 share a scale), "FP8_PERCHANNEL" (rows do), "BF16" or "NVFP4".
        num_gpu_experts: the GPU has the first ones, as SGLang says it. None means 0.
        gpu_experts_mask: bool ``[num_experts]``, the GPU's experts, as sglang-kt says it.
        cpuinfer_threads: number of threads. None: as `cpumoe.Runtime` chooses.
        threadpool_count: number of NUMA nodes, at least 1. It has no effect, because `numa_nodes`
            says which nodes to use.
        numa_nodes: numbers of the NUMA nodes that have the experts and the threads. None or empty:
            as `cpumoe.Runtime` chooses.
        chunked_prefill_size: the most tokens that a call passes to the CPU at once, for which
            page-locked memory has room. A call of more tokens is computed in several parts, which
            defer nothing. None, or less than 1: 4096.
        max_deferred_experts_per_token: how many of a token's experts may be computed while the GPU
            goes on. The next layer's result then contains them. None or 0: none.
        swiglu_limit: bound of the activation's clamps. None or 0: as the checkpoint says.
        swiglu_alpha: gain of gpt-oss' gate. None or 0: as the checkpoint says.
        cpu_save: has no effect.
        mode: "inference".

    Raises:
        TypeError, ValueError: a value is wrong, or the checkpoint has another one.
        IndexError: the checkpoint has no experts for this layer.
        FileNotFoundError, CheckpointError, UnsupportedFormatError: see
            `cpumoe.Experts.from_checkpoint`.
    """

    _capture_batch_sizes: ClassVar[list[int]] = []

    def __init__(
        self,
        *,
        layer_idx: int,
        num_experts: int,
        num_experts_per_tok: int,
        hidden_size: int,
        moe_intermediate_size: int,
        weight_path: str | os.PathLike[str],
        method: str,
        num_gpu_experts: int | None = None,
        gpu_experts_mask: torch.Tensor | None = None,
        cpuinfer_threads: int | None = None,
        threadpool_count: int | None = None,
        numa_nodes: Sequence[int] | None = None,
        chunked_prefill_size: int | None = None,
        max_deferred_experts_per_token: int | None = None,
        swiglu_limit: float | None = None,
        swiglu_alpha: float | None = None,
        cpu_save: bool = False,
        mode: str = "inference",
    ) -> None:
        """Checks the arguments against the checkpoint. Weights are read later."""
        if mode != "inference":
            raise ValueError(
                f"mode: expected 'inference', got {mode!r}; cpumoe does not train, so leave out "
                "--kt-expert-lora-path"
            )
        known_method(method)
        self.layer_idx = integer_in(layer_idx, "layer_idx", 0)
        self.num_experts = integer_in(num_experts, "num_experts", 1, _MOST_EXPERTS)
        self.num_experts_per_tok = integer_in(
            num_experts_per_tok, "num_experts_per_tok", 1, self.num_experts
        )
        self.hidden_size = integer_in(hidden_size, "hidden_size", 1)
        self.moe_intermediate_size = integer_in(moe_intermediate_size, "moe_intermediate_size", 1)
        self.max_deferred_experts_per_token = integer_in(
            max_deferred_experts_per_token or 0, "max_deferred_experts_per_token", 0
        )
        self.method = method
        self.weight_path = weight_path
        self.chunked_prefill_size = chunked_prefill_size
        tokens = 0 if chunked_prefill_size is None else chunked_prefill_size
        tokens = integer(tokens, "chunked_prefill_size")
        if tokens > _LONGEST_CHUNK:
            raise ValueError(
                f"chunked_prefill_size: expected at most {_LONGEST_CHUNK}, because page-locked "
                f"memory must have room for so many tokens, got {tokens}; pass a smaller "
                "--chunked-prefill-size"
            )
        self._most_tokens = tokens if tokens > 0 else _MOST_TOKENS
        nodes = _checked_nodes(threadpool_count, numa_nodes)
        self._gpu_mask = gpu_mask(gpu_experts_mask, num_gpu_experts, self.num_experts)
        self._sizes = LayerSizes(
            self.layer_idx, self.num_experts, self.hidden_size, self.moe_intermediate_size
        )
        self._reader = open_experts(weight_path, method, self._sizes)
        self._activation = swiglu_of(self._reader, swiglu_limit, swiglu_alpha)
        self._runtime = _runtime_of(cpuinfer_threads, nodes)
        self._synchronous = os.environ.get(_SYNCHRONOUS) == "1"
        self._layer: Layer | None = None
        self._write_back: WriteBack | None = None

    @property
    def gpu_experts_mask(self) -> torch.Tensor:
        """Bool ``[num_experts]`` on the CPU; True: the GPU has the expert.

        The mask may be changed in place, or assigned. Experts that the CPU then needs are loaded
        before the change returns, and the memory of the others is given back. If an expert cannot
        be loaded, the mask is again as it was. Other threads may make calls meanwhile. A call uses
        the mask as it is at its `submit_forward`. A captured CUDA graph uses the mask as it is when
        the graph runs, so the mask must not change while a graph with the layer runs.
        """
        return HostsMask.over(self._gpu_mask, self._follow_mask)

    @gpu_experts_mask.setter
    def gpu_experts_mask(self, mask: torch.Tensor) -> None:
        self._gpu_mask.copy_(checked_mask(mask, self.num_experts))
        self._follow_mask()

    @property
    def num_gpu_experts(self) -> int:
        """Number of experts that the GPU has."""
        return int(self._gpu_mask.sum())

    def load_weights(self, physical_to_logical_map_cpu: torch.Tensor | None = None) -> None:
        """Packs the experts that the GPU does not have.

        CUDA graphs that captured calls of earlier weights must not run any more.

        Args:
            physical_to_logical_map_cpu: int ``[num_experts]``, the checkpoint's expert in each slot
                to which ids and masks refer. Equal ones share memory. None: slot i has expert i.

        Raises:
            TypeError, ValueError: the map is wrong.
            FileNotFoundError, CheckpointError: see `cpumoe.Experts.from_checkpoint`.
        """
        # The files may have changed since.
        self._reader = open_experts(self.weight_path, self.method, self._sizes)
        slots = experts_of_slots(physical_to_logical_map_cpu, self._reader, self.num_experts)
        if self._layer is not None and self._layer.captured():
            logger.warning(
                "layer %d: load_weights: CUDA graphs that captured calls of the earlier weights "
                "must not run any more; capture them again",
                self.layer_idx,
            )
        self.sync_write_weight_scale_to_buffer()
        self._layer = self._write_back = None  # gives back memory before taking more
        start = time.monotonic()
        experts = Experts.from_checkpoint(
            self._reader,
            self.layer_idx,
            experts=slots,
            activation=self._activation,
            expert_mask=self._gpu_mask.clone(),
            pack_masked=False,
            progress=False,
            runtime=self._runtime,
        )
        # Nothing comes after the last layer that could add what this layer defers.
        last = self.layer_idx == self._reader.layers()[-1]
        deferred = 0 if last else self.max_deferred_experts_per_token
        self._layer = Layer(
            experts,
            self.layer_idx,
            self._reader,
            mask=self._gpu_mask,
            deferred=deferred,
            tokens=self._most_tokens,
        )
        self._write_back = WriteBack(experts, self._reader, self.layer_idx)
        logger.info(
            "layer %d: %d of %d experts on the CPU, %.2f GB, packed in %.1f s",
            self.layer_idx,
            self.num_experts - self.num_gpu_experts,
            self.num_experts,
            experts.nbytes / 1e9,
            time.monotonic() - start,
        )

    def submit_forward(
        self,
        hidden_states: torch.Tensor,
        topk_ids: torch.Tensor,
        topk_weights: torch.Tensor,
        cuda_stream: object = None,
    ) -> None:
        """Starts the layer's call, and returns at once.

        The tensors may be changed afterwards: on the CPU at once, on a GPU in the stream's order.
        At most two layers may be between `submit_forward` and `sync_forward` on one stream.

        A CUDA graph may capture the call. The first call on a stream allocates page-locked memory,
        so make a call on the stream before a capture. The graph may run on any stream, as long as
        the weights are not loaded again. Graphs that were captured on one stream must not run at
        the same time, because their calls share memory. If a call fails, its result is NaN, and the
        layer's next `submit_forward` or `sync_forward` raises the error.

        Args:
            hidden_states: ``[tokens, hidden]`` bf16, fp16 or fp32, on the CPU or on a GPU of CUDA.
            topk_ids: ``[tokens, top_k]`` int32 or int64. Ids of the GPU's experts, negative ones
                and those from `num_experts` on are skipped.
            topk_weights: ``[tokens, top_k]`` fp32, bf16 or fp16.
            cuda_stream: the stream of the tensors, an int or an object with `cuda_stream`. None:
                the current stream of their device. CPU tensors have None or 0.

        Raises:
            RuntimeError: `load_weights` was not called, an earlier call has failed, CUDA refuses an
                operation, or the runtime is closed.
            TypeError, ValueError: see `cpumoe.Experts.submit`; CPU tensors have another stream.
            FileNotFoundError, CheckpointError: an expert that the GPU no longer has cannot be read.
        """
        layer = self._loaded("submit_forward")
        stream = stream_of(hidden_states, cuda_stream)
        layer.follow_mask()
        stream.submit(layer, hidden_states, topk_ids, topk_weights)
        if self._synchronous:
            layer.wait()

    def sync_forward(self, hidden_states: torch.Tensor, cuda_stream: object = None) -> torch.Tensor:
        """Lets the stream wait for the call that `submit_forward` started on it.

        With CPU tensors, the calling thread waits.

        Args:
            hidden_states: the tensor of `submit_forward`, or one of its shape and dtype.
            cuda_stream: as in `submit_forward`.

        Returns:
            A new tensor like `hidden_states`. On a GPU, its values are there in the stream's order.

        Raises:
            RuntimeError: there is no such call, a call of this layer has failed, or CUDA refuses an
                operation.
            ValueError: `hidden_states` has another shape or dtype.
        """
        layer = self._loaded("sync_forward")
        return stream_of(hidden_states, cuda_stream).sync(layer, hidden_states)

    def forward(
        self,
        hidden_states: torch.Tensor,
        topk_ids: torch.Tensor,
        topk_weights: torch.Tensor,
        cuda_stream: object = None,
    ) -> torch.Tensor:
        """Starts a call and waits for it; see `submit_forward` and `sync_forward`."""
        self.submit_forward(hidden_states, topk_ids, topk_weights, cuda_stream)
        return self.sync_forward(hidden_states, cuda_stream)

    def submit_write_weight_scale_to_buffer(
        self,
        gpu_tp_count: int,
        expert_id: int,
        w13_weight_ptrs: Sequence[int],
        w13_scale_ptrs: Sequence[int],
        w2_weight_ptrs: Sequence[int],
        w2_scale_ptrs: Sequence[int],
    ) -> None:
        """Starts to write an expert's weights into memory of the host, and returns at once.

        `cpumoe.integrations.sglang.write_back` describes what is written. Forward calls may be made
        meanwhile, and experts of other layers may be written.

        Args:
            gpu_tp_count: number of GPU ranks.
            expert_id: the slot of the expert. The GPU may have it or not.
            w13_weight_ptrs: an address per rank.
            w13_scale_ptrs: an address per rank.
            w2_weight_ptrs: an address per rank.
            w2_scale_ptrs: an address per rank.

        Raises:
            RuntimeError: `load_weights` was not called, or the runtime is closed.
            TypeError, ValueError: a value is wrong, or the ranks do not get whole groups.
            IndexError: there is no such expert.
        """
        self._loaded("submit_write_weight_scale_to_buffer")
        assert self._write_back is not None
        addresses = (w13_weight_ptrs, w13_scale_ptrs, w2_weight_ptrs, w2_scale_ptrs)
        self._write_back.submit(gpu_tp_count, expert_id, addresses)

    def sync_write_weight_scale_to_buffer(self) -> None:
        """Waits until all experts of this layer that were submitted are written.

        Raises:
            FileNotFoundError, CheckpointError: an expert that is not in memory cannot be read.
            RuntimeError: the runtime is closed.
        """
        if self._write_back is not None:
            self._write_back.sync()

    @staticmethod
    def set_capture_batch_sizes(capture_bs: Sequence[int]) -> None:
        """Names the batch sizes of CUDA graphs, as a hint. Other sizes work as well."""
        KTMoEWrapper._capture_batch_sizes = [
            integer_in(size, "capture_bs", 0) for size in capture_bs
        ]

    @staticmethod
    def get_capture_batch_sizes() -> list[int]:
        """Returns the last argument of `set_capture_batch_sizes`."""
        return list(KTMoEWrapper._capture_batch_sizes)

    @staticmethod
    def clear_buffer_cache() -> None:
        """Does nothing: calls use their buffers as long as the model lives."""

    def _loaded(self, name: str) -> Layer:
        if self._layer is None:
            raise RuntimeError(
                f"layer {self.layer_idx}: {name}: expected load_weights to be called first"
            )
        return self._layer

    def _follow_mask(self) -> None:
        if self._layer is not None:
            self._layer.follow_mask()


def _checked_nodes(
    threadpool_count: object, numa_nodes: Sequence[int] | None
) -> tuple[int, ...] | None:
    if threadpool_count is not None:
        integer_in(threadpool_count, "threadpool_count", 1)
    if numa_nodes is not None and not isinstance(numa_nodes, Iterable):
        raise TypeError(f"numa_nodes: expected a list of ints or None, got {numa_nodes!r}")
    # Several of kt-kernel's thread pools may be on one node.
    return tuple(sorted({integer_in(node, "numa_nodes", 0) for node in numa_nodes or ()})) or None


_runtimes: dict[object, Runtime] = {}  # by number of threads and nodes

# A runtime's threads do not exist in a forked child.
os.register_at_fork(after_in_child=_runtimes.clear)


def _runtime_of(threads: object, nodes: tuple[int, ...] | None) -> Runtime:
    """Returns the threads that all layers of this process share."""
    if threads is None and nodes is None:
        return default_runtime()
    number = None if threads is None else integer_in(threads, "cpuinfer_threads", 1)
    runtime = _runtimes.get((number, nodes))
    if runtime is None or runtime.closed:
        try:
            runtime = Runtime(number, nodes=nodes)
        except ValueError as error:
            if nodes is None:
                raise
            raise ValueError(f"numa_nodes: {error}; change --kt-numa-nodes") from error
        _runtimes[number, nodes] = runtime
    return runtime
