"""What a weight format is, and a matrix in one.

A weight matrix is ``[N, K]`` (N output rows, K inputs along the contraction). Every format here
stores two 4-bit codes per byte, the even ``k`` in the low nibble, and one scale per group of
consecutive ``k`` of a row.
"""

from __future__ import annotations

import functools
import math
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch

from cpumoe._base.tensors import describe, dtype_name, plain

GroupQuantizer = Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]

E8M0_NAN = 255

# Quantizing works on blocks that are too small for PyTorch to divide among threads. Threads would
# wait for each other after every operation, which on busy cores costs ten times what it saves.
_BLOCK_WEIGHTS = (1 << 15) - 1


@dataclass(frozen=True)
class QuantizedMatrix:
    """One weight matrix, or a stack of them, as a checkpoint stores it.

    Attributes:
        codes: uint8 ``[..., N, K/2]``, two 4-bit codes per byte, low nibble = even k. Rows may be
            strided; the last dimension is contiguous.
        scales: ``[..., N, K/group_size]``; E8M0 bytes as uint8 (mxfp4) or bfloat16 (int4).
        name: the scales' name in error messages, such as a checkpoint tensor's; may be empty.
    """

    codes: torch.Tensor
    scales: torch.Tensor
    name: str = field(default="", kw_only=True)

    @property
    def shape(self) -> tuple[int, ...]:
        """The logical shape ``[..., N, K]`` of the weights."""
        return (*self.codes.shape[:-1], self.codes.shape[-1] * 2)

    @property
    def nbytes(self) -> int:
        """Bytes of codes and scales."""
        return self.codes.nbytes + self.scales.nbytes

    def __getitem__(self, index: int) -> QuantizedMatrix:
        """Returns matrix `index` of a stack, without a copy."""
        return QuantizedMatrix(self.codes[index], self.scales[index])


@dataclass(frozen=True)
class WeightFormat:
    """One row of the format table.

    Attributes:
        name: the format's name in every API, e.g. ``"mxfp4"``.
        group_size: number of weights along K that share one scale.
        code_bits: bits of one stored code.
        scale_dtype: the dtype that a scale represents.
        scale_storage: the dtype in which scales are stored in tensors (uint8 bytes for E8M0).
        values: the value of each of the 16 codes, before scaling.
        code_dtypes: checkpoint dtypes accepted for codes; they differ in name only, not in bytes.
        scale_dtypes: checkpoint dtypes accepted for scales.
        quantize_groups: turns float32 ``[..., G, group_size]`` into uint8 nibbles of this shape
            and scales ``[..., G]`` in `scale_storage`.
    """

    name: str
    group_size: int
    code_bits: int
    scale_dtype: torch.dtype
    scale_storage: torch.dtype
    values: tuple[float, ...]
    code_dtypes: tuple[torch.dtype, ...]
    scale_dtypes: tuple[torch.dtype, ...]
    quantize_groups: GroupQuantizer

    @property
    def bits_per_weight(self) -> float:
        """Stored bits per weight, scales included (4.25 for mxfp4, 4.5 for int4)."""
        return self.code_bits + 8 * self.scale_dtype.itemsize / self.group_size

    def check_k(self, k: int, what: str = "K") -> None:
        """Raises ValueError when `k` is not a positive multiple of the group size."""
        if k <= 0 or k % self.group_size:
            raise ValueError(
                f"{self.name}: {what} must be a positive multiple of {self.group_size}, got {k}"
            )

    def normalize_codes(self, tensor: torch.Tensor, name: str) -> torch.Tensor:
        """Returns checkpoint codes as uint8 bytes ``[..., N, K/2]``, as a view where possible.

        Args:
            tensor: ``[..., N, K/2]`` int8, uint8 or float4_e2m1fn_x2, or ``[..., N, K/8]`` int32
                (eight codes a word, lowest bits first). The dtype is one of `code_dtypes`.
            name: the tensor's name, for errors.

        Raises:
            TypeError: `tensor` is no tensor in memory on the CPU, or its dtype is another one.
            ValueError: the last dimension is not contiguous, or is the only one.
        """
        _require_dtype(tensor, name, self.code_dtypes)
        tensor = _require_rows(tensor, name)
        if tensor.dtype.itemsize > 1 and sys.byteorder != "little":
            raise ValueError(f"{name}: {dtype_name(tensor.dtype)} codes need a little-endian CPU")
        return tensor.view(torch.uint8)

    def normalize_scales(self, tensor: torch.Tensor, name: str) -> torch.Tensor:
        """Returns checkpoint scales in `scale_storage`, as a view where possible.

        E8M0 scales are reinterpreted, never converted: ``.to(uint8)`` would turn the scale 2^3 into
        the byte 8.

        Args:
            tensor: ``[..., N, K/group_size]`` in one of `scale_dtypes`.
            name: the tensor's name, for errors.

        Raises:
            TypeError: `tensor` is no tensor in memory on the CPU, or its dtype is another one.
            ValueError: the last dimension is not contiguous, or is the only one.
        """
        _require_dtype(tensor, name, self.scale_dtypes)
        return _require_rows(tensor, name).view(self.scale_storage)

    def check_scales(self, scales: torch.Tensor, name: str) -> None:
        """Refuses scales that make weights NaN or infinite.

        Args:
            scales: normalized scales ``[..., N, K/group_size]``.
            name: the tensor's name, for errors.

        Raises:
            ValueError: a scale is NaN or infinite (E8M0 byte 255); the message has its index.
        """
        if self._all_finite(scales):
            return
        is_e8m0 = self.scale_dtype == torch.float8_e8m0fnu
        bad = scales == E8M0_NAN if is_e8m0 else ~scales.isfinite()
        index = [int(i) for i in bad.nonzero()[0]]
        value = "255 (NaN)" if is_e8m0 else str(float(scales[tuple(index)]))
        raise ValueError(
            f"{name}: scales must be finite, got {value} at index {index} "
            f"({int(bad.sum())} such scales); the checkpoint is damaged"
        )

    def _all_finite(self, scales: torch.Tensor) -> bool:
        """Whether all scales are finite, from their extremes, which PyTorch finds quickly."""
        if not scales.numel():
            return True
        if self.scale_dtype == torch.float8_e8m0fnu:
            return int(scales.max()) != E8M0_NAN
        # Both extremes are NaN if any scale is.
        return all(math.isfinite(extreme.item()) for extreme in scales.aminmax())

    def dequantize(
        self, codes: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype = torch.float32
    ) -> torch.Tensor:
        """Returns the exact weights ``[..., N, K]``; float32 rounds only beyond its range.

        Args:
            codes: uint8 ``[..., N, K/2]`` (see `normalize_codes`).
            scales: ``[..., N, K/group_size]`` (see `normalize_scales`).
            dtype: torch.float32 or torch.float64.

        Raises:
            TypeError: codes or scales are no tensors in memory on the CPU.
            ValueError: the shapes do not fit together.
        """
        codes, scales = plain(codes, "codes"), plain(scales, "scales")
        k = codes.shape[-1] * 2
        self.check_k(k)
        expected = (*codes.shape[:-1], k // self.group_size)
        if tuple(scales.shape) != expected:
            raise ValueError(
                f"{self.name}: codes {list(codes.shape)} need scales {list(expected)}, "
                f"got {list(scales.shape)}"
            )
        pairs = torch.nn.functional.embedding(codes.int(), _pair_table(self.values, dtype))
        groups = pairs.view(*expected, self.group_size)
        factors = scales.view(self.scale_dtype).to(torch.float32).to(dtype)
        return groups.mul_(factors.unsqueeze(-1)).view(*codes.shape[:-1], k)

    def quantize(self, weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Rounds weights to the nearest codes, with float32 arithmetic.

        Args:
            weights: floating point ``[..., N, K]``, finite.

        Returns:
            codes uint8 ``[..., N, K/2]`` and scales ``[..., N, K/group_size]`` in `scale_storage`.

        Raises:
            TypeError: `weights` is no tensor in memory on the CPU.
            ValueError: K is not a multiple of the group size, or a weight is NaN or infinite.
        """
        weights = plain(weights, "weights")
        k = weights.shape[-1]
        self.check_k(k)
        rows = weights.reshape(-1, k)
        codes = rows.new_empty((rows.shape[0], k // 2), dtype=torch.uint8)
        scales = rows.new_empty((rows.shape[0], k // self.group_size), dtype=self.scale_storage)
        step = max(1, _BLOCK_WEIGHTS // k)
        for start in range(0, rows.shape[0], step):
            block = slice(start, start + step)
            groups = rows[block].float().reshape(-1, k // self.group_size, self.group_size)
            nibbles, scales[block] = self.quantize_groups(groups)
            pairs = nibbles.view(-1, k // 2, 2)
            torch.add(pairs[..., 0], pairs[..., 1], alpha=16, out=codes[block])
        lead = weights.shape[:-1]
        return codes.view(*lead, -1), scales.view(*lead, -1)


def _require_dtype(tensor: torch.Tensor, name: str, accepted: Iterable[torch.dtype]) -> None:
    expected = " or ".join(dtype_name(d) for d in accepted)
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(
            f"{name}: expected a torch.Tensor of {expected}, got {type(tensor).__name__}"
        )
    if tensor.dtype not in accepted:
        raise TypeError(f"{name}: expected {expected}, got {describe(tensor)}")


def _require_rows(tensor: torch.Tensor, name: str) -> torch.Tensor:
    tensor = plain(tensor, name)
    if tensor.dim() < 2:
        raise ValueError(f"{name}: expected a dense [..., N, K] tensor, got {describe(tensor)}")
    if tensor.stride(-1) == 1:
        return tensor
    if tensor.shape[-1] == 1:
        # A last dimension of one is contiguous whatever its stride is, but .view(dtype) wants 1.
        return tensor.as_strided(tensor.shape, (*tensor.stride()[:-1], 1))
    raise ValueError(
        f"{name}: the last dimension must be contiguous, got {describe(tensor)} with strides "
        f"{list(tensor.stride())}; pass .contiguous()"
    )


@functools.cache
def _pair_table(values: tuple[float, ...], dtype: torch.dtype) -> torch.Tensor:
    """``[256, 2]``: the two values of each code byte, low nibble first."""
    pairs = [(values[byte & 15], values[byte >> 4]) for byte in range(256)]
    return torch.tensor(pairs, dtype=dtype, device="cpu")  # not the caller's default device
