"""What a weight format is.

A weight matrix is ``[N, K]`` (N output rows, K inputs along the contraction). Formats of 4 bits
store two codes per byte, the even ``k`` in the low nibble, and one scale per group of consecutive
``k`` of a row. In other formats a code is a number of its dtype. A scale may belong to a block of
128 x 128 weights or to a row. A format without scales stores the weights themselves.
"""

from __future__ import annotations

import functools
import math
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch

from cpumoe._base.tensors import describe, dtype_name, plain
from cpumoe.formats.quantized_matrix import BLOCK, QuantizedMatrix

Quantizer = Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]

E8M0_NAN = 255

# K is a multiple of this number in every format, because kernels multiply so many k together.
K_MULTIPLE = 32

# Quantizing works on blocks that are too small for PyTorch to divide among threads. Threads would
# wait for each other after every operation, which on busy cores costs ten times what it saves.
_BLOCK_WEIGHTS = (1 << 15) - 1


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
        blocks: whether scales belong to blocks of 128 x 128 weights, or to whole rows.
        scale_dtype: the dtype that a scale represents; None: no scales.
        scale_storage: the dtype in which scales are usually stored in tensors (uint8 bytes for
            E8M0).
        scale_dtypes: checkpoint dtypes accepted for scales.
        quantize_groups: turns float32 ``[..., G, group_size]`` into uint8 nibbles of this shape
            and scales ``[..., G]`` in `scale_storage`. A format without values rounds to its dtype.
        quantize_block: turns float32 ``[n, k]`` that share a scale into codes, and one scale
            ``[1]`` in `scale_storage`.
    """

    name: str
    code_bits: int
    code_dtypes: tuple[torch.dtype, ...]
    values: tuple[float, ...] = ()
    group_size: int = 0
    groups_vary: bool = False
    blocks: bool = False
    scale_dtype: torch.dtype | None = None
    scale_storage: torch.dtype | None = None
    scale_dtypes: tuple[torch.dtype, ...] = ()
    quantize_groups: Quantizer | None = None
    quantize_block: Quantizer | None = None

    @property
    def bits_per_weight(self) -> float:
        """Stored bits per weight, scales included (4.25 for mxfp4, 4.5 for int4, 16 for bf16)."""
        if self.scale_dtype is None:
            return self.code_bits
        sharing = self.group_size * (BLOCK if self.blocks else 1)
        return self.code_bits + 8 * self.scale_dtype.itemsize / sharing

    @property
    def code_storage(self) -> torch.dtype:
        """The dtype of codes in a `QuantizedMatrix`."""
        return torch.uint8 if self.values else self.code_dtypes[0]

    @property
    def remedy(self) -> str:
        """What to do about refused codes or scales, for the end of an error."""
        return (
            f"pass what a checkpoint in {self.name} stores, or what "
            f"weight_format({self.name!r}).quantize returns"
        )

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
            scales: normalized scales (see `QuantizedMatrix`); None: there are none.
            name: the matrix' name, for errors.

        Raises:
            TypeError: scales are missing, or the format has none.
            ValueError: K is no multiple of 32, or the scales have another shape.
        """
        self._require_scales(scales, f"{name} scales")
        k = codes.shape[-1] * codes.itemsize * 8 // self.code_bits
        self.check_k(k, f"{name}: K")
        if scales is not None:
            self.check_scale_shape(codes.shape[:-1], k, scales, name)

    def check_scale_shape(
        self, lead: Sequence[int], k: int, scales: torch.Tensor, name: str
    ) -> None:
        """Raises ValueError unless the scales have a shape that weights ``[*lead, k]`` may have."""
        got = tuple(scales.shape)
        if self.blocks:
            blocks = (*lead[:-1], -(-lead[-1] // BLOCK), -(-k // BLOCK))
            if got not in (blocks, (*lead, 1)):
                raise ValueError(
                    f"{name} scales: expected {list(blocks)} for blocks of {BLOCK} x {BLOCK} "
                    f"weights or {[*lead, 1]} for rows, got {list(got)}; {self.remedy}"
                )
            return
        expected = (*lead, k // self.group_size)
        if self.groups_vary and got[:-1] == expected[:-1] and got[-1] > 0:
            group, rest = divmod(k, got[-1])
            if rest == 0 and group % self.group_size == 0:
                return
        if got != expected:
            more = ", or fewer for larger groups" if self.groups_vary else ""
            raise ValueError(
                f"{name} scales: expected {list(expected)}{more}, got {list(got)}; {self.remedy}"
            )

    def normalize_codes(self, tensor: torch.Tensor, name: str) -> torch.Tensor:
        """Returns checkpoint codes as `QuantizedMatrix` has them, as a view where possible.

        Args:
            tensor: ``[..., N, K/2]`` int8, uint8 or float4_e2m1fn_x2, or ``[..., N, K/8]`` int32
                (eight codes a word, lowest bits first), or bfloat16 or float8_e4m3fn
                ``[..., N, K]``. The dtype is one of `code_dtypes`.
            name: the tensor's name, for errors.

        Raises:
            TypeError: `tensor` is no tensor in memory on the CPU, or its dtype is another one.
            ValueError: the last dimension is not contiguous, or is the only one.
        """
        _require_dtype(tensor, name, self.code_dtypes, self.remedy)
        tensor = _require_rows(tensor, name)
        if not self.values:
            return tensor
        if tensor.dtype.itemsize > 1 and sys.byteorder != "little":
            raise ValueError(f"{name}: {dtype_name(tensor.dtype)} codes need a little-endian CPU")
        return tensor.view(torch.uint8)

    def normalize_scales(self, tensor: torch.Tensor | None, name: str) -> torch.Tensor | None:
        """Returns checkpoint scales as `QuantizedMatrix` has them, as a view where possible.

        E8M0 scales are reinterpreted, never converted: ``.to(uint8)`` would turn the scale 2^3 into
        the byte 8.

        Args:
            tensor: scales in one of `scale_dtypes`; None for a format without.
            name: the tensor's name, for errors.

        Raises:
            TypeError: `tensor` is no tensor in memory on the CPU, or its dtype is another one.
            ValueError: the last dimension is not contiguous, or is the only one.
        """
        self._require_scales(tensor, name)
        if tensor is None:
            return None
        _require_dtype(tensor, name, self.scale_dtypes, self.remedy)
        return _require_rows(tensor, name).view(self.stored_scale(tensor.dtype))

    def _require_scales(self, scales: object, name: str) -> None:
        """Raises TypeError if scales are missing, or if the format has none."""
        if scales is None and self.scale_dtypes:
            raise TypeError(
                f"{name}: expected {_names(self.scale_dtypes)}, got None; {self.remedy}"
            )
        if scales is not None and not self.scale_dtypes:
            got = describe(scales) if isinstance(scales, torch.Tensor) else type(scales).__name__
            raise TypeError(
                f"{name}: expected none in {self.name}, got {got}; pass the weights alone"
            )

    def stored_scale(self, dtype: torch.dtype) -> torch.dtype:
        """The dtype in a `QuantizedMatrix` of scales that a checkpoint stores as `dtype`."""
        if self.scale_dtype == torch.float8_e8m0fnu:
            return torch.uint8
        return torch.float8_e8m0fnu if dtype == torch.uint8 else dtype

    def check_scales(self, scales: torch.Tensor | None, name: str) -> None:
        """Refuses scales that make weights NaN or infinite.

        Args:
            scales: normalized scales; None: there are none.
            name: the tensor's name, for errors.

        Raises:
            ValueError: a scale is NaN or infinite (E8M0 byte 255); the message has its index.
        """
        if scales is None or self._all_finite(scales):
            return
        is_e8m0 = scales.dtype.itemsize == 1
        bad = scales.view(torch.uint8) == E8M0_NAN if is_e8m0 else ~scales.isfinite()
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
        if scales.dtype.itemsize == 1:
            return int(scales.view(torch.uint8).max()) != E8M0_NAN
        # Both extremes are NaN if any scale is.
        return all(math.isfinite(extreme.item()) for extreme in scales.aminmax())

    def dequantize(
        self,
        codes: torch.Tensor,
        scales: torch.Tensor | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> torch.Tensor:
        """Returns the weights ``[..., N, K]``.

        They are exact in float64. In float32 they are exact within its range, except for float32
        scales (fp8), whose products are rounded once.

        Args:
            codes: as in a `QuantizedMatrix` (see `normalize_codes`).
            scales: as in a `QuantizedMatrix` (see `normalize_scales`); None: there are none.
            dtype: torch.float32 or torch.float64.

        Raises:
            TypeError: codes or scales are no tensors in memory on the CPU; scales are missing, or
                the format has none.
            ValueError: the shapes do not fit together.
        """
        codes = plain(codes, "codes")
        scales = None if scales is None else plain(scales, "scales")
        self.check_shapes(codes, scales, self.name)
        if scales is None:
            return codes.to(dtype, copy=True)
        if self.blocks:
            return _scaled_blocks(QuantizedMatrix(codes, scales), dtype)
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
            group_size: weights of a row that share a scale; default: the format's usual number.
                For fp8, the default is a scale per block of 128 x 128 weights, and K is a scale
                per row.

        Returns:
            codes and scales as in `QuantizedMatrix`.

        Raises:
            TypeError: `weights` is no tensor in memory on the CPU.
            ValueError: the weights are no floating point matrices, K is no multiple of 32 or of the
                group size, or a weight is NaN or infinite.
        """
        weights = plain(weights, "weights")
        if weights.dim() < 2 or not weights.is_floating_point():
            raise ValueError(
                f"weights: expected floating point [..., N, K], got {describe(weights)}"
            )
        k = weights.shape[-1]
        self.check_k(k)
        group = self._checked_group(group_size, k)
        if self.quantize_block is not None:
            return self._quantize_blocks(weights, self.quantize_block, by_row=group_size == k)
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

    def _quantize_blocks(
        self, weights: torch.Tensor, quantize: Quantizer, *, by_row: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        *lead, n, k = weights.shape
        rows, depth = (1, k) if by_row else (BLOCK, BLOCK)
        codes = torch.empty(weights.shape, dtype=self.code_dtypes[0], device="cpu")
        shape = (*lead, -(-n // rows), -(-k // depth))
        scales = torch.empty(shape, dtype=self.scale_storage, device="cpu")
        stacks = (tensor.reshape(-1, *tensor.shape[-2:]) for tensor in (weights, codes, scales))
        for matrix, matrix_codes, matrix_scales in zip(*stacks, strict=True):
            for i, row in enumerate(range(0, n, rows)):
                for j, column in enumerate(range(0, k, depth)):
                    block = slice(row, row + rows), slice(column, column + depth)
                    matrix_codes[block], scale = quantize(matrix[block].float())
                    matrix_scales[i, j] = scale[0]
        return codes, scales

    def _checked_group(self, group_size: int | None, k: int) -> int:
        group = self.group_size if group_size is None else group_size
        allowed = (group_size is None or group == k) if self.blocks else group == self.group_size
        allowed = allowed or (
            self.groups_vary and group > 0 and group % self.group_size == 0 and k % group == 0
        )
        if not allowed:
            raise ValueError(f"{self.name}: K {k} has no groups of {group} weights")
        return group


def _require_dtype(
    tensor: torch.Tensor, name: str, accepted: Iterable[torch.dtype], remedy: str = ""
) -> None:
    expected, end = _names(accepted), f"; {remedy}" if remedy else ""
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(
            f"{name}: expected a torch.Tensor of {expected}, got {type(tensor).__name__}{end}"
        )
    if tensor.dtype not in accepted:
        raise TypeError(f"{name}: expected {expected}, got {describe(tensor)}{end}")


def _names(dtypes: Iterable[torch.dtype]) -> str:
    return " or ".join(map(dtype_name, dtypes))


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


def _scaled_blocks(matrix: QuantizedMatrix, dtype: torch.dtype) -> torch.Tensor:
    """Returns code * scale of a matrix whose scales belong to blocks or rows."""
    *_, n, k = matrix.shape
    factors = matrix.given_scales.to(torch.float32).to(dtype)
    grid = matrix.scale_grid
    assert grid is not None
    if grid[0] > 1:
        factors = factors.repeat_interleave(grid[0], -2)[..., :n, :]
        factors = factors.repeat_interleave(grid[1], -1)[..., :k]
    return matrix.codes.to(dtype).mul_(factors)


@functools.cache
def _pair_table(values: tuple[float, ...], dtype: torch.dtype) -> torch.Tensor:
    """``[256, 2]``: the two values of each code byte, low nibble first."""
    pairs = [(values[byte & 15], values[byte >> 4]) for byte in range(256)]
    return torch.tensor(pairs, dtype=dtype, device="cpu")  # not the caller's default device
