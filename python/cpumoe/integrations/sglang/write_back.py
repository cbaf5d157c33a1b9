"""Writes experts as their checkpoint stores them into memory from which GPUs take them.

SGLang names the memory by addresses, one list per tensor with an address for each GPU rank. Rank r
of R gets the intermediate features from r * I/R to (r + 1) * I/R:

    w13         gate rows, then up rows   uint8 [2 I/R, H/2]
    w13 scales  of these rows             bf16  [2 I/R, H/G]
    w2          columns                   uint8 [H, I/R/2]
    w2 scales   of these columns          bf16  [H, I/R/G]

G weights of a row share a scale: 32, or what an INT4 checkpoint says.
MXFP4's scales, powers of two, become bf16 numbers. The conversion is exact, also for 2^-127,
which is subnormal in bf16.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from cpumoe import _core
from cpumoe.checkpoint import ExpertReader
from cpumoe.formats import QuantizedMatrix
from cpumoe.integrations.sglang.checks import integer_in
from cpumoe.packed_experts import PackedExperts


class WriteBack:
    """Writes the experts of a layer.

    All threads of the runtime write an expert, for all ranks at once, in steps of a fraction of a
    millisecond. Forward calls that wait run between two steps. Experts of all layers are written in
    the order of requests.
    """

    def __init__(self, experts: PackedExperts, reader: ExpertReader, layer: int) -> None:
        """Writes `experts`, which are those of a layer of the checkpoint `reader`."""
        self._experts = experts
        self._hidden_group = reader.group_size(layer, experts.hidden_size)
        self._group = reader.group_size(layer, experts.intermediate_size)
        self._running: list[_Writing] = []
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
            RuntimeError: the runtime is closed.
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
        call = experts._submit_export(slot, [part.shard() for part in parts])
        self._running.append(_Writing(slot, parts, call))

    def sync(self) -> None:
        """Waits until everything is written; raises the first error of a writing.

        An expert that has no weights in memory is read from the checkpoint now. A forked child does
        not wait for what its parent submitted.
        """
        running, self._running = self._running, []
        if os.getpid() != self._process:
            return
        errors = []
        for writing in running:  # wait for all, whatever happens
            try:
                self._finish(writing)
            except Exception as error:
                errors.append(error)
        if errors:
            raise errors[0]

    def _finish(self, writing: _Writing) -> None:
        try:
            writing.call.wait()
        except ValueError:  # The expert has no weights in memory, or lost them meanwhile.
            for part in writing.parts:
                part.read(self._experts, writing.slot)

    def _part(self, rank: int, ranks: int, addresses: Sequence[Sequence[int]]) -> _Part:
        names = ("w13_weight_ptrs", "w13_scale_ptrs", "w2_weight_ptrs", "w2_scale_ptrs")
        w13, w13_scales, w2, w2_scales = (
            _address(pointers, name, rank, ranks)
            for name, pointers in zip(names, addresses, strict=True)
        )
        hidden, features = self._experts.hidden_size, self._experts.intermediate_size // ranks
        group = self._hidden_group
        return _Part(
            rank * features,
            _Memory("gate", features, hidden, group, w13, w13_scales),
            _Memory(
                "up",
                features,
                hidden,
                group,
                w13 + features * hidden // 2,
                w13_scales + features * (hidden // group) * torch.bfloat16.itemsize,
            ),
            _Memory("down", hidden, features, self._group, w2, w2_scales),
        )


@dataclass(frozen=True)
class _Memory:
    """The host's memory for a matrix of two codes per byte and bf16 scales, in dense rows."""

    name: str
    rows: int
    columns: int
    group: int  # successive weights of a row that share a scale
    codes: int  # addresses
    scales: int

    @property
    def groups(self) -> int:
        """Scales of a row."""
        return self.columns // self.group

    def matrix(self) -> _core.Matrix:
        return _core.Matrix(
            name=self.name,
            rows=self.rows,
            columns=self.columns,
            codes=self.codes,
            codes_stride=self.columns // 2,
            scales=self.scales,
            scales_stride=self.groups * torch.bfloat16.itemsize,
            scale_depth=self.group,
            scale_type=_core.ScaleType.BF16,
        )

    def tensors(self) -> QuantizedMatrix:
        def tensor(address: int, columns: int, dtype: torch.dtype) -> torch.Tensor:
            size = self.rows * columns * dtype.itemsize
            memory = (ctypes.c_uint8 * size).from_address(address)
            return torch.frombuffer(memory, dtype=dtype).view(self.rows, columns)

        return QuantizedMatrix(
            tensor(self.codes, self.columns // 2, torch.uint8),
            tensor(self.scales, self.groups, torch.bfloat16),
        )


@dataclass(frozen=True)
class _Part:
    """The intermediate features of a rank, and the memory for them."""

    begin: int
    gate: _Memory
    up: _Memory
    down: _Memory

    def shard(self) -> tuple[list[_core.Matrix], int]:
        return [self.gate.matrix(), self.up.matrix(), self.down.matrix()], self.begin

    @torch.inference_mode()  # A host in this mode makes tensors that cannot be changed outside it.
    def read(self, experts: PackedExperts, slot: int) -> None:
        """Writes the part of an expert that may be missing in memory."""
        experts.export_into(
            slot,
            gate=self.gate.tensors(),
            up=self.up.tensors(),
            down=self.down.tensors(),
            intermediate=slice(self.begin, self.begin + self.gate.rows),
            read_missing=True,
        )


@dataclass(frozen=True)
class _Writing:
    """An expert on its way."""

    slot: int
    parts: list[_Part]
    call: _core.SubmittedCall


def _address(pointers: Sequence[int], name: str, rank: int, ranks: int) -> int:
    if len(pointers) != ranks:
        raise ValueError(f"{name}: expected {ranks} addresses, one per rank, got {len(pointers)}")
    return integer_in(pointers[rank], f"{name}[{rank}]", 1)
