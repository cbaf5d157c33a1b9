"""A weight matrix as a checkpoint stores it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

# Rows, and successive k, of the blocks of weights that share a scale.
BLOCK = 128


def group_of(k: int, scales: int, unit: int) -> int | None:
    """Returns how many successive weights of a row share a scale; None: no such number is known.

    The scales belong to equal groups, or to groups of ``unit * 2^n`` weights, the last of which has
    fewer. A single scale belongs to the whole row.

    Args:
        k: weights of a row.
        scales: scales of a row.
        unit: a number of weights that all groups are a multiple of.
    """
    if scales < 2:
        return k if scales == 1 else None
    if k % (scales * unit) == 0:
        return k // scales
    group = unit
    while group * scales < k:
        group *= 2
    return group if -(-k // group) == scales else None


@dataclass(frozen=True)
class QuantizedMatrix:
    """One weight matrix, or a stack of them, as a checkpoint stores it.

    Attributes:
        codes: uint8 ``[..., N, K/2]``, two 4-bit codes per byte, low nibble = even k; or bfloat16
            (bf16), float16 (fp16) or float8_e4m3fn (fp8) ``[..., N, K]``. Rows may be strided; the
            last dimension is contiguous.
        scales: ``[..., N, ceil(K/group_size)]``; E8M0 bytes as uint8 (mxfp4), or bfloat16, float16
            or float32 (int4; see `group_of`). For fp8, float32, bfloat16 or float8_e8m0fnu:
            ``[..., ceil(N/128), ceil(K/128)]`` for blocks, or ``[..., N, 1]`` for rows.
            float8_e4m3fn for nvfp4. None: the format has none (bf16, fp16).
        factor: float32 ``[...]``, one for each matrix, which multiplies all its weights (nvfp4).
            None: the format has none.
        name: the name in error messages, such as a checkpoint tensor's; may be empty.
    """

    codes: torch.Tensor
    scales: torch.Tensor | None = None
    factor: torch.Tensor | None = None
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
    def scale_grid(self) -> tuple[int, int] | None:
        """Rows, and successive k, that share a scale; None: there are no scales."""
        if self.scales is None or not self.scales.shape[-1]:
            return None
        *_, n, k = self.shape
        rows, columns = self.scales.shape[-2:]
        if rows == n and columns == 1:
            return 1, k
        if self.codes.dtype == torch.float8_e4m3fn:
            return BLOCK, BLOCK
        unit = 16 if self.scales.dtype == torch.float8_e4m3fn else 32
        return 1, group_of(k, columns, unit) or k // columns

    @property
    def group_size(self) -> int | None:
        """Successive k that share a scale; None: there are no scales."""
        grid = self.scale_grid
        return None if grid is None else grid[1]

    @property
    def nbytes(self) -> int:
        """Bytes of codes, scales and factors."""
        parts = (self.codes, self.scales, self.factor)
        return sum(part.nbytes for part in parts if part is not None)

    def __getitem__(self, index: int | slice) -> QuantizedMatrix:
        """Returns matrix `index` of a stack, or rows of a matrix, without a copy.

        Raises:
            ValueError: the rows begin within a block that shares a scale, and end in another one.
        """
        stacked = self.codes.dim() > 2
        factor = self.factor[index] if stacked and self.factor is not None else self.factor
        if self.scales is None:
            return QuantizedMatrix(self.codes[index], None, factor)
        grid = self.scale_grid
        if stacked or grid is None or grid[0] == 1:
            return QuantizedMatrix(self.codes[index], self.scales[index], factor)
        rows = range(self.codes.shape[0])[index]
        if isinstance(rows, int):
            rows = range(rows, rows + 1)
        first, last = rows.start // grid[0], (rows.stop - 1) // grid[0]
        if rows.step != 1 or (rows.start % grid[0] and first != last):
            raise ValueError(
                f"{self.name or 'matrix'}: blocks of {grid[0]} rows share scales, so rows must "
                f"begin with a block, got rows {rows.start} to {rows.stop} in steps of {rows.step}"
            )
        return QuantizedMatrix(self.codes[index], self.scales[first : last + 1], factor)


def stacked_rows(matrices: Sequence[QuantizedMatrix]) -> QuantizedMatrix | None:
    """Returns a matrix with the rows of several, one matrix after the other, in new tensors.

    Args:
        matrices: one or more matrices ``[N, K]`` of one format.

    Returns:
        The matrix; None: no matrix has all these rows as they are. K, groups of scales, dtypes or
        factors then differ, or a matrix before the last ends within a block that shares a scale.
    """
    first = matrices[0]
    for each in matrices[1:]:
        same = each.shape[-1] == first.shape[-1] and each.codes.dtype == first.codes.dtype
        if not same or not _equal_kinds(each.scales, first.scales):
            return None
        if each.scale_grid != first.scale_grid or not _equal(each.factor, first.factor):
            return None
    grid = first.scale_grid
    if grid is not None and any(each.shape[0] % grid[0] for each in matrices[:-1]):
        return None
    codes = _joined([each.codes for each in matrices])
    scales = None if grid is None else _joined([each.given_scales for each in matrices])
    return QuantizedMatrix(codes, scales, first.factor)


def _joined(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    dtype = tensors[0].dtype
    if dtype.itemsize > 1:
        return torch.cat([*tensors])
    # PyTorch joins bytes, but not numbers of every narrow dtype.
    return torch.cat([each.view(torch.uint8) for each in tensors]).view(dtype)


def _equal_kinds(one: torch.Tensor | None, other: torch.Tensor | None) -> bool:
    if one is None or other is None:
        return one is other
    return one.dtype == other.dtype and one.shape[-1] == other.shape[-1]


def _equal(one: torch.Tensor | None, other: torch.Tensor | None) -> bool:
    if one is None or other is None:
        return one is other
    return torch.equal(one, other)
