"""The table of weight formats: how a group of low-precision weights is stored and decoded.

A weight matrix is ``[N, K]`` (N output rows, K inputs along the contraction). Every format here
stores two 4-bit codes per byte, the even ``k`` in the low nibble, and one scale per group of
consecutive ``k`` of a row. To add a format, add one row to `WEIGHT_FORMATS` and, if its rounding is
new, one quantizer function.

Sources: OCP Microscaling Formats (MX) Specification v1.0, sections 5.3, 5.4 and 6.3 (MXFP4, E2M1,
E8M0); compressed-tensors 0.20 ``pack-quantized`` (INT4).
"""

from __future__ import annotations

import functools
import math
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch

from cpumoe._tensors import describe as describe
from cpumoe._tensors import dtype_name as dtype_name
from cpumoe._tensors import plain

GroupQuantizer = Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]

E2M1_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
E8M0_BIAS = 127
E8M0_NAN = 255

# Two E2M1 codes in a byte, the even one in the low nibble. PyTorch has this dtype since 2.8.
FLOAT4: torch.dtype | None = getattr(torch, "float4_e2m1fn_x2", None)

# Quantizing works on blocks that are too small for PyTorch to divide among threads. Threads would
# wait for each other after every operation, which on busy cores costs ten times what it saves.
_BLOCK_WEIGHTS = (1 << 15) - 1
# Adding and subtracting this number rounds a float32 below 2^22 to an integer, half to even.
_ROUNDER = 1.5 * 2**23


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


def power_of_two(exponent: torch.Tensor) -> torch.Tensor:
    """Returns 2^exponent exactly, in float64. torch.ldexp and torch.pow use the default dtype.

    Args:
        exponent: integers of any shape, clamped to -1022..1023.
    """
    biased = exponent.long().clamp(-1022, 1023) + 1023
    return (biased << 52).view(torch.float64)


@functools.cache
def _pair_table(values: tuple[float, ...], dtype: torch.dtype) -> torch.Tensor:
    """``[256, 2]``: the two values of each code byte, low nibble first."""
    pairs = [(values[byte & 15], values[byte >> 4]) for byte in range(256)]
    return torch.tensor(pairs, dtype=dtype, device="cpu")  # not the caller's default device


def _group_amax(groups: torch.Tensor) -> torch.Tensor:
    amax = groups.abs().amax(dim=-1)  # aminmax would use threads
    if not bool(amax.isfinite().all()):
        raise ValueError("quantize: weights must be finite, got NaN or Inf")
    return amax


def _round_to_integers(x: torch.Tensor) -> torch.Tensor:
    """Rounds in place, half to even; torch.round would use threads."""
    return x.add_(_ROUNDER).sub_(_ROUNDER)


def _round_e2m1(magnitude: torch.Tensor) -> torch.Tensor:
    """Codes 0..7 of the E2M1 values nearest to `magnitude`, ties to the even code.

    The step of E2M1 is 2^e / 2 in [2^e, 2^(e+1)), with e = 0 below 1, and r steps have the code
    r + 2e there. The code is even exactly if r is, so rounding r half to even suffices.
    """
    biased = magnitude.clamp(1, 7).view(torch.int32) >> 23  # e + 127
    steps_per_one = ((255 - biased) << 23).view(torch.float32)  # 2^(1 - e)
    steps = _round_to_integers(magnitude * steps_per_one)
    codes = steps.to(torch.int32).add_(biased - 127, alpha=2)
    return codes.clamp_(max=7).to(torch.uint8)


def _quantize_mxfp4_groups(groups: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """MXFP4 by the MX spec v1.0, section 6.3.

    Shared exponent = floor(log2(amax)) - 2 (2 is E2M1's largest exponent), clamped to E8M0's range;
    an all-zero group gets byte 0. Elements round to nearest, ties to even; those above 6 saturate.
    """
    amax = _group_amax(groups)
    _, exponent = torch.frexp(amax)  # amax = m * 2^exponent, m in [0.5, 1)
    shared = torch.where(amax == 0, -E8M0_BIAS, exponent - 3).clamp_(-E8M0_BIAS, E8M0_BIAS)
    # Multiplying by a power of two is exact unless it underflows, and then rounds to zero anyway.
    scaled = groups * power_of_two(-shared).float().unsqueeze(-1)
    nibbles = (scaled < 0).view(torch.uint8) * 8 + _round_e2m1(scaled.abs())
    return nibbles, (shared + E8M0_BIAS).to(torch.uint8)


def _quantize_int4_groups(groups: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Symmetric INT4 like ``calculate_qparams`` of compressed-tensors: q = round(w / scale).

    q is in -8..7, and scale = bf16(amax / 7.5), where 7.5 is half of that range. A zero scale
    becomes bf16's epsilon. Codes are offset binary: nibble = q + 8.
    """
    scales = (_group_amax(groups) / 7.5).to(torch.bfloat16)
    scales[scales == 0] = torch.finfo(torch.bfloat16).eps
    q = _round_to_integers(groups / scales.float().unsqueeze(-1)).clamp_(-8, 7)
    return q.add_(8).to(torch.uint8), scales


WEIGHT_FORMATS: dict[str, WeightFormat] = {
    row.name: row
    for row in (
        WeightFormat(
            name="mxfp4",
            group_size=32,
            code_bits=4,
            scale_dtype=torch.float8_e8m0fnu,
            scale_storage=torch.uint8,
            values=E2M1_VALUES + tuple(-v for v in E2M1_VALUES),
            code_dtypes=(torch.uint8, torch.int8, *((FLOAT4,) if FLOAT4 else ())),
            scale_dtypes=(torch.float8_e8m0fnu, torch.uint8),
            quantize_groups=_quantize_mxfp4_groups,
        ),
        WeightFormat(
            name="int4",
            group_size=32,
            code_bits=4,
            scale_dtype=torch.bfloat16,
            scale_storage=torch.bfloat16,
            values=tuple(float(q) for q in range(-8, 8)),
            code_dtypes=(torch.int32, torch.uint8, torch.int8),
            scale_dtypes=(torch.bfloat16,),
            quantize_groups=_quantize_int4_groups,
        ),
    )
}


def weight_format(name: str | WeightFormat) -> WeightFormat:
    """Returns the format called `name`, or `name` itself if it is a WeightFormat.

    Raises:
        ValueError: the format is unknown; the message lists the known ones.
    """
    if isinstance(name, WeightFormat):
        return name
    try:
        return WEIGHT_FORMATS[name]
    except KeyError:
        raise ValueError(
            f"weight format {name!r} is not supported; supported: {', '.join(WEIGHT_FORMATS)}"
        ) from None
