"""What a weight format is.

A weight matrix is ``[N, K]`` (N output rows, K inputs along the contraction). Formats of 4 bits
store two codes per byte, the even ``k`` in the low nibble, and one scale per group of consecutive
``k`` of a row. A matrix may have one more factor, which multiplies all its weights. In other
formats a code is a number of its dtype. A scale may belong to a block of 128 x 128 weights or to a
row. A format without scales stores the weights themselves.
"""

from __future__ import annotations

import functools
import math
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from cpumoe._base.scalars import integer
from cpumoe._base.tensors import describe, dtype_name, plain
from cpumoe.formats.quantized_matrix import BLOCK, QuantizedMatrix, group_of
from cpumoe.formats.rounding import (
    Quantizer,
    group_amax,
    quantized_blocks,
    quantized_rows,
    rounded,
)
from cpumoe.formats.scale_choice import ScaleChoice

# The least byte that is no valid scale. E4M3 scales (nvfp4) are not negative.
_INVALID_SCALE = {torch.float8_e8m0fnu: 0xFF, torch.float8_e4m3fn: 0x7F}

# Kernels multiply so many k together. Slices of a matrix's columns must begin with such a group.
KERNEL_GROUP = 32


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
        scales_choose_kernels: whether the engine has other kernels for other dtypes of scales, so
            that a layer is made for the dtypes of its experts' scales.
        quantize_groups: turns float32 ``[..., G, group_size]`` and a dtype into uint8 nibbles of
            this shape and scales ``[..., G]`` of the dtype. A format without values rounds to its
            dtype.
        quantize_block: turns float32 ``[n, k]`` that share a scale, and a dtype, into codes and one
            scale ``[1]`` of the dtype.
        factor_for: turns the greatest magnitudes of matrices into their float32 factors. Weights
            are divided by the factor before they are quantized. None: no factors.
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
    scales_choose_kernels: bool = False
    quantize_groups: Quantizer | None = None
    quantize_block: Quantizer | None = None
    factor_for: Callable[[torch.Tensor], torch.Tensor] | None = None

    @property
    def bits_per_weight(self) -> float:
        """Stored bits per weight, scales included (4.25 for mxfp4, 4.5 for int4, 16 for bf16)."""
        if self.scale_dtype is None:
            return self.code_bits
        sharing = self.group_size * (BLOCK if self.blocks else 1)
        return self.code_bits + 8 * self.scale_dtype.itemsize / sharing

    @property
    def num_parts(self) -> int:
        """How many tensors a matrix may consist of: codes, scales, a factor."""
        return 1 + (self.scale_dtype is not None) + (self.factor_for is not None)

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
        """Raises ValueError unless `k` is positive, and rows of so many codes are whole bytes."""
        if k <= 0:
            raise ValueError(f"{self.name}: {what} must be positive, got {k}")
        if not self.takes_k(k):
            codes = 8 // self.code_bits
            raise ValueError(
                f"{self.name}: {what} must be a multiple of {codes}, because a byte has {codes} "
                f"codes, got {k}"
            )

    def takes_k(self, k: int) -> bool:
        """Whether rows of `k` codes are whole bytes."""
        return k * self.code_bits % 8 == 0

    def check_shapes(self, codes: torch.Tensor, scales: torch.Tensor | None, name: str) -> None:
        """Checks that scales fit the codes.

        Args:
            codes: normalized codes of ``[..., N, K]`` weights.
            scales: normalized scales (see `QuantizedMatrix`); None: there are none.
            name: the matrix' name, for errors.

        Raises:
            TypeError: scales are missing, or the format has none.
            ValueError: K is 0, or the scales have another shape.
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
        expected = (*lead, -(-k // self.group_size))
        if self.groups_vary and got[:-1] == expected[:-1] and group_of(k, got[-1], self.group_size):
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
        if self.blocks and tensor.dim() < 2:
            raise ValueError(
                f"{name}: expected a scale for each block or row, got {describe(tensor)}; repeat a "
                f"matrix' scale for each row, [..., N, 1]"
            )
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

    def normalize_factor(
        self, factor: torch.Tensor | None, lead: Sequence[int], name: str
    ) -> torch.Tensor | None:
        """Returns checkpoint factors as `QuantizedMatrix` has them.

        Args:
            factor: float32, with one element for each matrix of ``[*lead, N, K]``; None: all are 1.
            lead: the dimensions before the matrices'.
            name: the tensor's name, for errors.

        Raises:
            TypeError: the format has no factors, or `factor` is no tensor of float32 in memory on
                the CPU.
            ValueError: the shape is another one, or a factor is NaN or infinite.
        """
        if factor is None:
            return None
        if self.factor_for is None:
            raise TypeError(
                f"{name}: expected none in {self.name}, got {describe(factor)}; pass the other "
                f"parts alone"
            )
        _require_dtype(factor, name, (torch.float32,), self.remedy)
        factor = plain(factor, name)
        if tuple(factor.shape) != tuple(lead) and factor.numel() * math.prod(lead) != 1:
            raise ValueError(
                f"{name}: expected {list(lead)}, one factor per matrix, got {list(factor.shape)}; "
                f"{self.remedy}"
            )
        if not bool(factor.isfinite().all()):
            raise ValueError(f"{name}: factors must be finite; the checkpoint is damaged")
        return factor.reshape(tuple(lead))

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
            ValueError: a scale is NaN, infinite (E8M0 byte 255), or a negative E4M3 scale; the
                message has its index.
        """
        if scales is None or not scales.numel():
            return
        if scales.dtype.itemsize == 1:
            least = _INVALID_SCALE.get(scales.dtype, _INVALID_SCALE[torch.float8_e8m0fnu])
            stored = scales.view(torch.uint8)
            if int(stored.max()) < least:  # PyTorch finds extremes quickly
                return
            bad = stored >= least
        elif all(math.isfinite(extreme.item()) for extreme in scales.aminmax()):
            return  # both extremes would be NaN if any scale were
        else:
            bad = ~scales.isfinite()
        index = [int(i) for i in bad.nonzero()[0]]
        scale = scales[tuple(index)]
        negative = scale.dtype == torch.float8_e4m3fn and not bool(scale.float().isnan())
        must = "not be negative" if negative else "be finite"
        value = "255 (NaN)" if scale.dtype == torch.uint8 else str(float(scale))
        raise ValueError(
            f"{name}: scales must {must}, got {value} at index {index} "
            f"({int(bad.sum())} such scales); the checkpoint is damaged"
        )

    def dequantize(
        self,
        codes: torch.Tensor,
        scales: torch.Tensor | None = None,
        factor: torch.Tensor | None = None,
        *,
        dtype: torch.dtype = torch.float32,
    ) -> torch.Tensor:
        """Returns the weights ``[..., N, K]``.

        They are exact in float64. In float32 they are exact within its range, except where scales
        (fp8, int4) or factors (nvfp4) are float32. Their products are rounded.

        Args:
            codes: as in a `QuantizedMatrix` (see `normalize_codes`).
            scales: as in a `QuantizedMatrix` (see `normalize_scales`); None: there are none.
            factor: as in a `QuantizedMatrix` (see `normalize_factor`); None: 1.
            dtype: torch.float32 or torch.float64.

        Raises:
            TypeError: codes or scales are no tensors in memory on the CPU; scales are missing, or
                the format has none.
            ValueError: the shapes do not fit together.
        """
        codes = plain(codes, "codes")
        factor = self.normalize_factor(factor, codes.shape[:-2], "factor")
        scales = None if scales is None else plain(scales, "scales")
        self.check_shapes(codes, scales, self.name)
        if scales is None:
            return codes.to(dtype, copy=True)
        if self.blocks:
            return _scaled_blocks(QuantizedMatrix(codes, scales), dtype)
        pairs = torch.nn.functional.embedding(codes.int(), _pair_table(self.values, dtype))
        group = QuantizedMatrix(codes, scales).group_size
        assert group is not None
        if self.scale_dtype == torch.float8_e8m0fnu:
            scales = scales.view(self.scale_dtype)
        factors = scales.to(torch.float32).to(dtype)
        if factor is not None:
            factors = factors * factor[..., None, None].to(dtype)
        weights = pairs.flatten(-2)
        k = weights.shape[-1]
        if group * scales.shape[-1] > k:  # the last group is not full
            return weights.mul_(factors.repeat_interleave(group, -1)[..., :k])
        return weights.view(*scales.shape, -1).mul_(factors.unsqueeze(-1)).view_as(weights)

    def dense(self, matrix: QuantizedMatrix, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Returns the weights of a matrix as `dequantize` does."""
        return self.dequantize(matrix.codes, matrix.scales, matrix.factor, dtype=dtype)

    def quantized(
        self,
        weights: torch.Tensor,
        group_size: int | None = None,
        *,
        scale_dtype: torch.dtype | None = None,
        name: str = "",
    ) -> QuantizedMatrix:
        """Returns the parts that `quantize` returns as a matrix; errors begin with its name."""
        try:
            parts = self.quantize(weights, group_size, scale_dtype)
            return QuantizedMatrix(*parts, name=name)
        except ValueError as error:
            raise ValueError(f"{name}: {error}" if name else str(error)) from error

    def quantize(
        self,
        weights: torch.Tensor,
        group_size: int | None = None,
        scale_dtype: torch.dtype | None = None,
    ) -> tuple[Any, ...]:
        """Rounds weights to the nearest codes, with float32 arithmetic.

        Args:
            weights: floating point ``[..., N, K]``, finite.
            group_size: weights of a row that share a scale; default: the format's usual number.
                For fp8, the default is a scale per block of 128 x 128 weights, and K is a scale
                per row. A last group may have fewer weights (int4: if the number is 32 * 2^n).
            scale_dtype: the dtype of scales, one of `scale_dtypes`; default: `scale_storage`.

        Returns:
            codes and scales as in `QuantizedMatrix`, where scales are None if the format has none.
            A format with factors (nvfp4) has them as a third part.

        Raises:
            TypeError: `weights` is no tensor in memory on the CPU, or `group_size` is no integer.
            ValueError: the weights are no floating point matrices, K is odd in a format of 4 bits,
                the format has no such groups or no scales of this dtype, a weight is NaN or
                infinite or too great for the format or its scales, or there are no weights.
        """
        weights = plain(weights, "weights")
        if weights.dim() < 2 or not weights.is_floating_point():
            raise ValueError(
                f"weights: expected floating point [..., N, K], got {describe(weights)}"
            )
        if not weights.numel():
            raise ValueError(f"weights: expected at least one weight, got {describe(weights)}")
        k = weights.shape[-1]
        self.check_k(k)
        group = self.checked_group(group_size, k)
        scales = self.checked_scale_dtype(scale_dtype)
        if scales is None:
            return rounded(weights, self.code_dtypes[0], self.name), None
        if self.quantize_block is not None:
            dtypes = self.code_dtypes[0], scales
            by_row = group_size == k
            return quantized_blocks(weights, self.quantize_block, *dtypes, by_row=by_row)
        assert self.quantize_groups is not None
        how = self.quantize_groups, group, scales
        if self.factor_for is None:
            return quantized_rows(weights, *how)
        factor = self.factor_for(group_amax(weights.flatten(-2).float()))
        return *quantized_rows(weights / factor[..., None, None], *how), factor

    def checked_scale_dtype(self, dtype: torch.dtype | None) -> torch.dtype | None:
        """Returns the dtype in a `QuantizedMatrix` of scales of `dtype`; None: the usual one.

        Raises:
            ValueError: the format has no such scales.
        """
        if dtype is None:
            return self.scale_storage
        if dtype not in self.scale_dtypes:
            known = _names(self.scale_dtypes) or "none"
            raise ValueError(f"{self.name}: scales: expected {known}, got {dtype_name(dtype)}")
        return self.stored_scale(dtype)

    def check_scale_choice(self, choice: ScaleChoice, *columns: int) -> None:
        """Raises ValueError unless matrices with so many columns may have these scales."""
        self.checked_scale_dtype(choice.dtype)
        if self.blocks and choice.group_size is not None:
            raise ValueError(
                f"{self.name}: scales belong to blocks of {BLOCK} x {BLOCK} weights or to rows, "
                f"got groups of {choice.group_size} weights"
            )
        for k in columns:
            self.checked_group(choice.group_of(k), k)

    def checked_group(self, group_size: int | None, k: int) -> int:
        """Returns how many weights of a row of `k` share a scale; None: the usual number.

        Raises:
            TypeError: `group_size` is no integer.
            ValueError: the format has no such groups.
        """
        group = self.group_size if group_size is None else integer(group_size, "group_size")
        allowed = (group_size is None or group == k) if self.blocks else group == self.group_size
        if not (allowed or (self.groups_vary and self.has_groups(k, group))):
            if self.blocks:
                expected = f"none for blocks of {BLOCK} x {BLOCK} weights, or a row ({k} weights)"
            elif self.groups_vary:
                unit = self.group_size
                expected = (
                    f"a multiple of {unit} that divides a row of {k} weights, {unit} * 2^n, or the "
                    "row"
                )
            else:
                expected = f"{self.group_size or 'none'}, which is fixed"
            raise ValueError(
                f"{self.name}: weights that share a scale: expected {expected}, got {group}"
            )
        return group

    def has_groups(self, k: int, group: int) -> bool:
        """Whether a row of `k` weights may have scales for groups of so many.

        The number of scales must tell how many weights share one; see `group_of`.
        """
        if group == k:
            return True
        if group <= 0 or group % self.group_size:
            return False
        return group > k or group_of(k, -(-k // group), self.group_size) == group


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
