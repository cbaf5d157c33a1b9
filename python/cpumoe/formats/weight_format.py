"""What a weight format is, and a matrix in one.

A weight matrix is ``[N, K]`` (N output rows, K inputs along the contraction). Formats of 4 bits
store two codes per byte, the even ``k`` in the low nibble, and one scale per group of consecutive
``k`` of a row. A format without scales stores the weights themselves.
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

# K is a multiple of this number in every format, because kernels multiply so many k together.
K_MULTIPLE = 32

# Quantizing works on blocks that are too small for PyTorch to divide among threads. Threads would
# wait for each other after every operation, which on busy cores costs ten times what it saves.
_BLOCK_WEIGHTS = (1 << 15) - 1


@dataclass(frozen=True)
class QuantizedMatrix:
    """One weight matrix, or a stack of them, as a checkpoint stores it.

    Attributes:
        codes: uint8 ``[..., N, K/2]``, two 4-bit codes per byte, low nibble = even k; or bfloat16
            ``[..., N, K]`` (bf16). Rows may be strided; the last dimension is contiguous.
        scales: ``[..., N, K/group_size]``; E8M0 bytes as uint8 (mxfp4) or bfloat16 (int4); None:
            the format has none (bf16).
        name: the name in error messages, such as a checkpoint tensor's; may be empty.
    """

    codes: torch.Tensor
    scales: torch.Tensor | None = None
    name: str = field(default="", kw_only=True)

    @property
    def shape(self) -> tuple[int, ...]:
        """The logical shape ``[..., N, K]`` of the weights."""
        per_element = 2 if self.codes.dtype == torch.uint8 else 1
        return (*self.codes.shape[:-1], self.codes.shape[-1] * per_element)

    @property
    def given_scales(self) -> torch.Tensor:
        """The scales of a matrix in a format that has scales."""
        assert self.scales is not None
        return self.scales

    @property
    def group_size(self) -> int | None:
        """Successive k that share a scale; None: there are no scales."""
        if self.scales is None or not self.scales.shape[-1]:
            return None
        return self.shape[-1] // self.scales.shape[-1]

    @property
    def nbytes(self) -> int:
        """Bytes of codes and scales."""
        return self.codes.nbytes + (0 if self.scales is None else self.scales.nbytes)

    def __getitem__(self, index: int | slice) -> QuantizedMatrix:
        """Returns matrix `index` of a stack, or rows of a matrix, without a copy."""
        scales = None if self.scales is None else self.scales[index]
        return QuantizedMatrix(self.codes[index], scales)


@dataclass(frozen=True)
class WeightFormat:
    """One row of the format table.

    Attributes:
        name: the format's name in every API, e.g. ``"mxfp4"``.
        code_bits: bits of one stored code.
        code_dtypes: checkpoint dtypes accepted for codes; they differ in name only, not in bytes.
        values: the value of each of the 16 codes, before scaling; empty: codes are numbers of their
            dtype.
        group_size: the usual number of weights along K that share one scale; 0: no scales.
        groups_vary: whether any multiple of `group_size` may share a scale.
        scale_dtype: the dtype that a scale represents; None: no scales.
        scale_storage: the dtype in which scales are stored in tensors (uint8 bytes for E8M0).
        scale_dtypes: checkpoint dtypes accepted for scales.
        quantize_groups: turns float32 ``[..., G, group_size]`` into uint8 nibbles of this shape
            and scales ``[..., G]`` in `scale_storage`. A format without values rounds to its dtype.
    """

    name: str
    code_bits: int
    code_dtypes: tuple[torch.dtype, ...]
    values: tuple[float, ...] = ()
    group_size: int = 0
    groups_vary: bool = False
    scale_dtype: torch.dtype | None = None
    scale_storage: torch.dtype | None = None
    scale_dtypes: tuple[torch.dtype, ...] = ()
    quantize_groups: GroupQuantizer | None = None

    @property
    def bits_per_weight(self) -> float:
        """Stored bits per weight, scales included (4.25 for mxfp4, 4.5 for int4, 16 for bf16)."""
        if self.scale_dtype is None:
            return self.code_bits
        return self.code_bits + 8 * self.scale_dtype.itemsize / self.group_size

    def check_k(self, k: int, what: str = "K") -> None:
        """Raises ValueError when `k` is not a positive multiple of 32."""
        if k <= 0 or k % K_MULTIPLE:
            raise ValueError(
                f"{self.name}: {what} must be a positive multiple of {K_MULTIPLE}, got {k}"
            )

    def check_shapes(self, codes: torch.Tensor, scales: torch.Tensor | None, name: str) -> None:
        """Checks that scales fit the codes.

        Args:
            codes: normalized codes of ``[..., N, K]`` weights.
            scales: normalized scales ``[..., N, K/group_size]``; None: there are none.
            name: the matrix' name, for errors.

        Raises:
            ValueError: K is no multiple of 32, or the scales have another shape.
        """
        k = codes.shape[-1] * codes.itemsize * 8 // self.code_bits
        self.check_k(k, f"{name}: K")
        if scales is None:
            return
        expected = (*codes.shape[:-1], k // self.group_size)
        got = tuple(scales.shape)
        if self.groups_vary and got[:-1] == expected[:-1] and got[-1] > 0:
            group, rest = divmod(k, got[-1])
            if rest == 0 and group % self.group_size == 0:
                return
        if got != expected:
            more = ", or fewer for larger groups" if self.groups_vary else ""
            raise ValueError(f"{name} scales: expected {list(expected)}{more}, got {list(got)}")

    def normalize_codes(self, tensor: torch.Tensor, name: str) -> torch.Tensor:
        """Returns checkpoint codes as `QuantizedMatrix` has them, as a view where possible.

        Args:
            tensor: ``[..., N, K/2]`` int8, uint8 or float4_e2m1fn_x2, or ``[..., N, K/8]`` int32
                (eight codes a word, lowest bits first), or bfloat16 ``[..., N, K]``. The dtype is
                one of `code_dtypes`.
            name: the tensor's name, for errors.

        Raises:
            TypeError: `tensor` is no tensor in memory on the CPU, or its dtype is another one.
            ValueError: the last dimension is not contiguous, or is the only one.
        """
        _require_dtype(tensor, name, self.code_dtypes)
        tensor = _require_rows(tensor, name)
        if not self.values:
            return tensor
        if tensor.dtype.itemsize > 1 and sys.byteorder != "little":
            raise ValueError(f"{name}: {dtype_name(tensor.dtype)} codes need a little-endian CPU")
        return tensor.view(torch.uint8)

    def normalize_scales(self, tensor: torch.Tensor | None, name: str) -> torch.Tensor | None:
        """Returns checkpoint scales in `scale_storage`, as a view where possible.

        E8M0 scales are reinterpreted, never converted: ``.to(uint8)`` would turn the scale 2^3 into
        the byte 8.

        Args:
            tensor: ``[..., N, K/group_size]`` in one of `scale_dtypes`; None for a format without.
            name: the tensor's name, for errors.

        Raises:
            TypeError: `tensor` is no tensor in memory on the CPU, or its dtype is another one.
            ValueError: the last dimension is not contiguous, or is the only one.
        """
        if self.scale_storage is None:
            if tensor is not None:
                raise TypeError(f"{name}: {self.name} has no scales; pass the weights alone")
            return None
        if tensor is None:
            raise TypeError(f"{name}: {self.name} needs scales, got None")
        _require_dtype(tensor, name, self.scale_dtypes)
        return _require_rows(tensor, name).view(self.scale_storage)

    def check_scales(self, scales: torch.Tensor | None, name: str) -> None:
        """Refuses scales that make weights NaN or infinite.

        Args:
            scales: normalized scales ``[..., N, K/group_size]``; None: there are none.
            name: the tensor's name, for errors.

        Raises:
            ValueError: a scale is NaN or infinite (E8M0 byte 255); the message has its index.
        """
        if scales is None or self._all_finite(scales):
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
        self,
        codes: torch.Tensor,
        scales: torch.Tensor | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> torch.Tensor:
        """Returns the exact weights ``[..., N, K]``; float32 rounds only beyond its range.

        Args:
            codes: uint8 ``[..., N, K/2]``, or bfloat16 ``[..., N, K]`` (see `normalize_codes`).
            scales: ``[..., N, K/group_size]`` (see `normalize_scales`); None: there are none.
            dtype: torch.float32 or torch.float64.

        Raises:
            TypeError: codes or scales are no tensors in memory on the CPU.
            ValueError: the shapes do not fit together.
        """
        codes = plain(codes, "codes")
        scales = None if scales is None else plain(scales, "scales")
        self.check_shapes(codes, scales, self.name)
        if scales is None:
            return codes.to(dtype, copy=True)
        pairs = torch.nn.functional.embedding(codes.int(), _pair_table(self.values, dtype))
        groups = pairs.view(*scales.shape, -1)
        assert self.scale_dtype is not None
        factors = scales.view(self.scale_dtype).to(torch.float32).to(dtype)
        return groups.mul_(factors.unsqueeze(-1)).view(*codes.shape[:-1], -1)

    def quantize(
        self, weights: torch.Tensor, group_size: int | None = None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Rounds weights to the nearest codes, with float32 arithmetic.

        Args:
            weights: floating point ``[..., N, K]``, finite.
            group_size: weights that share a scale; default: the format's usual number.

        Returns:
            codes and scales as in `QuantizedMatrix`.

        Raises:
            TypeError: `weights` is no tensor in memory on the CPU.
            ValueError: K is no multiple of 32 or of the group size, or a weight is NaN or infinite.
        """
        weights = plain(weights, "weights")
        k = weights.shape[-1]
        self.check_k(k)
        group = self._checked_group(group_size, k)
        if self.quantize_groups is None:
            codes = torch.empty(weights.shape, dtype=self.code_dtypes[0], device="cpu")
            codes.copy_(weights)
            if not bool(codes.isfinite().all()):
                raise ValueError("quantize: weights must be finite, got NaN or Inf")
            return codes, None
        rows = weights.reshape(-1, k)
        codes = rows.new_empty((rows.shape[0], k // 2), dtype=torch.uint8)
        scales = rows.new_empty((rows.shape[0], k // group), dtype=self.scale_storage)
        step = max(1, _BLOCK_WEIGHTS // k)
        for start in range(0, rows.shape[0], step):
            block = slice(start, start + step)
            groups = rows[block].float().reshape(-1, k // group, group)
            nibbles, scales[block] = self.quantize_groups(groups)
            pairs = nibbles.view(-1, k // 2, 2)
            torch.add(pairs[..., 0], pairs[..., 1], alpha=16, out=codes[block])
        lead = weights.shape[:-1]
        return codes.view(*lead, -1), scales.view(*lead, -1)

    def _checked_group(self, group_size: int | None, k: int) -> int:
        group = self.group_size if group_size is None else group_size
        allowed = group == self.group_size or (
            self.groups_vary and group > 0 and group % self.group_size == 0 and k % group == 0
        )
        if not allowed:
            raise ValueError(f"{self.name}: K {k} has no groups of {group} weights")
        return group


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
