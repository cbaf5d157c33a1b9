"""Writes experts as their checkpoint stores them into memory from which GPUs take them.

SGLang names the memory by addresses, one list per tensor with an address for each GPU rank. Rank r
of R gets the intermediate features from r * I/R to (r + 1) * I/R:

    w13         gate rows, then up rows   uint8 [2 I/R, H/2]
    w13 scales  of these rows             bf16  [2 I/R, H/32]
    w2          columns                   uint8 [H, I/R/2]
    w2 scales   of these columns          bf16  [H, I/R/32]

MXFP4's scales, powers of two, become bf16 numbers. That is exact, also for 2^-127, which is
subnormal in bf16.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import torch

from cpumoe.formats import QuantizedMatrix, weight_format
from cpumoe.integrations.sglang.checks import integer_in
from cpumoe.packed_experts import PackedExperts


class WriteBack:
    """Writes the experts of a layer. One thread writes for all layers, in the order of requests.

    The threads of the runtime do the work, one part of one rank at a time, and forward calls come
    in between.
    """

    def __init__(self, experts: PackedExperts) -> None:
        """Writes `experts`."""
        self._experts = experts
        self._group = weight_format(experts.format).group_size
        self._running: list[Future[None]] = []
        self._process = os.getpid()

    def submit(self, ranks: object, expert: object, addresses: Sequence[Sequence[int]]) -> None:
        """Starts to write an expert.

        Args:
            ranks: number of GPU ranks.
            expert: the host's slot of the expert.
            addresses: those of w13, its scales, w2 and its scales, one of each per rank.

        Raises:
            TypeError, ValueError: a value is wrong, or the ranks do not get whole groups.
            IndexError: there is no such expert.
        """
        count = integer_in(ranks, "gpu_tp_count", 1)
        experts = self._experts
        slot = integer_in(expert, "expert_id", 0)
        if slot >= experts.num_experts:
            raise IndexError(f"expert_id: expected 0..{experts.num_experts - 1}, got {slot}")
        if experts.intermediate_size % (count * self._group):
            raise ValueError(
                f"gpu_tp_count: expected a number of ranks that divides the "
                f"{experts.intermediate_size} intermediate features into groups of {self._group}, "
                f"got {count}; pass another --tp-size"
            )
        parts = [self._part(rank, count, addresses) for rank in range(count)]
        self._running.append(_writer().submit(self._write, slot, parts))

    def sync(self) -> None:
        """Waits until everything is written; raises the first error of a writing.

        A forked child does not wait for what its parent submitted.
        """
        running, self._running = self._running, []
        if os.getpid() != self._process:
            return
        for future in running:
            future.exception()  # wait for all, whatever happens
        for future in running:
            future.result()

    def _part(self, rank: int, ranks: int, addresses: Sequence[Sequence[int]]) -> _Part:
        names = ("w13_weight_ptrs", "w13_scale_ptrs", "w2_weight_ptrs", "w2_scale_ptrs")
        w13, w13_scales, w2, w2_scales = (
            _address(pointers, name, rank, ranks)
            for name, pointers in zip(names, addresses, strict=True)
        )
        hidden, features = self._experts.hidden_size, self._experts.intermediate_size // ranks

        def matrix(codes: int, scales: int, rows: int, columns: int) -> QuantizedMatrix:
            groups = columns // self._group
            return QuantizedMatrix(
                _memory(codes, rows, columns // 2, torch.uint8),
                _memory(scales, rows, groups, torch.bfloat16),
            )

        gate_up = matrix(w13, w13_scales, 2 * features, hidden)
        return _Part(
            slice(rank * features, (rank + 1) * features),
            QuantizedMatrix(gate_up.codes[:features], gate_up.scales[:features]),
            QuantizedMatrix(gate_up.codes[features:], gate_up.scales[features:]),
            matrix(w2, w2_scales, hidden, features),
        )

    @torch.inference_mode()  # A host in this mode makes tensors that cannot be changed outside it.
    def _write(self, slot: int, parts: list[_Part]) -> None:
        for part in parts:
            self._experts.export_into(
                slot,
                gate=part.gate,
                up=part.up,
                down=part.down,
                intermediate=part.features,
                read_missing=True,
            )


@dataclass(frozen=True)
class _Part:
    """The intermediate features of a rank, and the memory for them."""

    features: slice
    gate: QuantizedMatrix
    up: QuantizedMatrix
    down: QuantizedMatrix


def _memory(address: int, rows: int, columns: int, dtype: torch.dtype) -> torch.Tensor:
    """Returns a tensor on memory that the host owns."""
    memory = (ctypes.c_uint8 * (rows * columns * dtype.itemsize)).from_address(address)
    return torch.frombuffer(memory, dtype=dtype).view(rows, columns)


def _address(pointers: Sequence[int], name: str, rank: int, ranks: int) -> int:
    if len(pointers) != ranks:
        raise ValueError(f"{name}: expected {ranks} addresses, one per rank, got {len(pointers)}")
    return integer_in(pointers[rank], f"{name}[{rank}]", 1)


_pool: ThreadPoolExecutor | None = None


def _writer() -> ThreadPoolExecutor:
    global _pool
    if _pool is None:
        _pool = ThreadPoolExecutor(1, thread_name_prefix="cpumoe-write-back")
    return _pool


def _forget_writer() -> None:
    global _pool
    _pool = None  # The child does not have the parent's thread.


os.register_at_fork(after_in_child=_forget_writer)
