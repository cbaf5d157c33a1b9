"""Writes experts as their checkpoint stores them into memory from which GPUs take them.

SGLang names the memory by addresses, one list per tensor with an address for each GPU rank. Rank r
of R gets the intermediate features from r * I/R to (r + 1) * I/R:

    method          w13                 w13 scales               w2          w2 scales
    MXFP4, RAWINT4  uint8 [2 I/R, H/2]  bf16 [2 I/R, H/G]        [H, I/R/2]  [H, I/R/G]
    FP8             e4m3  [2 I/R, H]    fp32 [2 I/R/128, H/128]  [H, I/R]    [H/128, I/R/128]
    FP8_PERCHANNEL  e4m3  [2 I/R, H]    fp32 [2 I/R, 1]          [H, I/R]    [H, 1]
    BF16            bf16  [2 I/R, H]    none                     [H, I/R]    none

w13 is gate's rows, then up's. w2 is columns of down. G weights of a row share a scale: 32, or what
an INT4 checkpoint says. MXFP4's scales, powers of two, become bf16 numbers. The conversion is
exact, also for 2^-127, which is subnormal in bf16. SGLang's wrappers have no memory for NVFP4.
"""

from __future__ import annotations

import ctypes
import functools
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from cpumoe import _core
from cpumoe._engine.arguments import SCALE_TYPES
from cpumoe.checkpoint import ExpertReader
from cpumoe.formats import WEIGHT_FORMATS, QuantizedMatrix
from cpumoe.formats.quantized_matrix import BLOCK
from cpumoe.formats.weight_format import KERNEL_GROUP
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
        self._form = _Form.of(reader, layer)
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
        if self._form.format not in _SCALES:
            raise ValueError(
                f"submit_write_weight_scale_to_buffer: expected experts in "
                f"{', '.join(_SCALES)}, got {self._form.format}, for which SGLang has no memory; "
                f"leave out --kt-gpu-prefill-token-threshold"
            )
        if count > 1 and experts.intermediate_size % (count * self._form.unit):
            raise ValueError(
                f"gpu_tp_count: expected a number of ranks that divides the "
                f"{experts.intermediate_size} intermediate features into groups of "
                f"{self._form.unit}, got {count}; pass another --tp-size"
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
        # Hosts pass zeros for scales that do not exist.
        least = (1, 0, 1, 0) if self._form.scale_dtype is None else (1, 1, 1, 1)
        w13, w13_scales, w2, w2_scales = (
            _address(pointers, name, rank, ranks, lowest)
            for name, pointers, lowest in zip(names, addresses, least, strict=True)
        )
        hidden, features = self._experts.hidden_size, self._experts.intermediate_size // ranks
        gate = _Memory(self._form, "gate", features, hidden, w13, w13_scales)
        behind = (w13 + gate.code_bytes, w13_scales + gate.scale_bytes)
        return _Part(
            rank * features,
            gate,
            _Memory(self._form, "up", features, hidden, *behind),
            _Memory(self._form, "down", hidden, features, w2, w2_scales),
        )


# The dtypes of scales in the host's memory, by format.
_SCALES = {"mxfp4": torch.bfloat16, "int4": torch.bfloat16, "fp8": torch.float32, "bf16": None}


@dataclass(frozen=True)
class _Form:
    """How matrices lie in the host's memory.

    Attributes:
        format: name of the weight format.
        scale_dtype: the dtype of scales; None: there are none.
        scale_rows: rows that share a scale.
        group: successive weights of a row that share a scale; 0: all of them.
    """

    format: str
    scale_dtype: torch.dtype | None
    scale_rows: int
    group: int

    @classmethod
    def of(cls, reader: ExpertReader, layer: int) -> _Form:
        fmt = WEIGHT_FORMATS[reader.layer_format(layer)]
        if reader.scales_by_row(layer):
            return cls(fmt.name, _SCALES.get(fmt.name), 1, 0)
        group = reader.group_size(layer, reader.intermediate_size)
        return cls(fmt.name, _SCALES.get(fmt.name), BLOCK if fmt.blocks else 1, group)

    @property
    def unit(self) -> int:
        """Intermediate features that a rank has whole."""
        return self.group or KERNEL_GROUP


@dataclass(frozen=True)
class _Memory:
    """The host's memory for a matrix, in dense rows of codes and of scales."""

    form: _Form
    name: str
    rows: int
    columns: int
    codes: int  # addresses
    scales: int

    @property
    def row_bytes(self) -> int:
        """Bytes of a row of codes."""
        return self.columns * WEIGHT_FORMATS[self.form.format].code_bits // 8

    @property
    def code_bytes(self) -> int:
        """Bytes of all codes."""
        return self.rows * self.row_bytes

    @property
    def depth(self) -> int:
        """Successive weights of a row that share a scale."""
        return self.form.group or self.columns

    @property
    def scale_shape(self) -> tuple[int, int]:
        """Rows and columns of scales."""
        return -(-self.rows // self.form.scale_rows), -(-self.columns // self.depth)

    @property
    def scale_bytes(self) -> int:
        """Bytes of all scales."""
        dtype = self.form.scale_dtype
        return 0 if dtype is None else math.prod(self.scale_shape) * dtype.itemsize

    def matrix(self) -> _core.Matrix:
        dtype, (rows, columns) = self.form.scale_dtype, (self.rows, self.columns)
        make = functools.partial(
            _core.Matrix,
            name=self.name,
            rows=rows,
            columns=columns,
            codes=self.codes,
            codes_stride=self.row_bytes,
        )
        if dtype is None:
            return make()
        return make(
            scales=self.scales,
            scales_stride=self.scale_shape[1] * dtype.itemsize,
            scale_rows=self.form.scale_rows,
            scale_depth=self.depth,
            scale_type=SCALE_TYPES[dtype],
        )

    def tensors(self) -> QuantizedMatrix:
        def tensor(address: int, rows: int, row_bytes: int, dtype: torch.dtype) -> torch.Tensor:
            memory = (ctypes.c_uint8 * (rows * row_bytes)).from_address(address)
            return torch.frombuffer(memory, dtype=torch.uint8).view(rows, row_bytes).view(dtype)

        storage = WEIGHT_FORMATS[self.form.format].code_storage
        codes = tensor(self.codes, self.rows, self.row_bytes, storage)
        dtype, (rows, columns) = self.form.scale_dtype, self.scale_shape
        if dtype is None:
            return QuantizedMatrix(codes)
        return QuantizedMatrix(codes, tensor(self.scales, rows, columns * dtype.itemsize, dtype))


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


def _address(pointers: Sequence[int], name: str, rank: int, ranks: int, least: int = 1) -> int:
    if len(pointers) != ranks:
        raise ValueError(f"{name}: expected {ranks} addresses, one per rank, got {len(pointers)}")
    return integer_in(pointers[rank], f"{name}[{rank}]", least)
