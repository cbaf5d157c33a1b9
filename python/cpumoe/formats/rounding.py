"""Arithmetic that the formats' quantizers share."""

from __future__ import annotations

from collections.abc import Callable

import torch

from cpumoe._base.tensors import dtype_name
from cpumoe.formats.quantized_matrix import BLOCK

# Turns float32 weights into codes, and into scales of a dtype; see `WeightFormat`.
Quantizer = Callable[[torch.Tensor, torch.dtype], tuple[torch.Tensor, torch.Tensor]]

_NOT_FINITE = "weights must be finite, got NaN or Inf"

# Quantizing works on blocks that are too small for PyTorch to divide among threads. Threads would
# wait for each other after every operation, which on busy cores costs ten times what it saves.
_BLOCK_WEIGHTS = (1 << 15) - 1

# Adding and subtracting this number rounds a float32 below 2^22 to an integer, half to even.
_ROUNDER = 1.5 * 2**23


def power_of_two(exponent: torch.Tensor) -> torch.Tensor:
    """Returns 2^exponent exactly, in float64. torch.ldexp and torch.pow use the default dtype.

    Args:
        exponent: integers of any shape, clamped to -1022..1023.
    """
    biased = exponent.long().clamp(-1022, 1023) + 1023
    return (biased << 52).view(torch.float64)


def group_amax(groups: torch.Tensor) -> torch.Tensor:
    """Returns the greatest magnitude of each group; raises ValueError unless all are finite."""
    amax = groups.abs().amax(dim=-1)  # aminmax would use threads
    if not bool(amax.isfinite().all()):
        raise ValueError(_NOT_FINITE)
    return amax


def rounded_scales(scales: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Returns float32 scales as numbers of `dtype`; raises ValueError if one is too great."""
    result = scales.to(dtype)
    if not bool(result.isfinite().all()):
        raise ValueError(
            f"weights need scales up to {float(scales.max()):g}, and the greatest number of "
            f"{dtype_name(dtype)} is {torch.finfo(dtype).max:g}; choose scales of another type"
        )
    return result


def power_of_two_above(x: torch.Tensor) -> torch.Tensor:
    """Returns the least E8M0 numbers that are at least `x`, which is float32 and positive."""
    mantissa, exponent = torch.frexp(x)  # x = mantissa * 2^exponent, mantissa in [0.5, 1)
    byte = exponent - (mantissa == 0.5).int() + 127
    return byte.clamp_(0, 254).to(torch.uint8).view(torch.float8_e8m0fnu)


def rounded(weights: torch.Tensor, dtype: torch.dtype, name: str) -> torch.Tensor:
    """Returns weights as the numbers of the format `name`, which are those of `dtype`.

    Raises:
        ValueError: a weight is NaN or infinite, or `dtype` would make it so.
    """
    codes = torch.empty(weights.shape, dtype=dtype, device="cpu")
    codes.copy_(weights)
    if bool(codes.isfinite().all()):
        return codes
    if not bool(weights.isfinite().all()):
        raise ValueError(_NOT_FINITE)
    raise ValueError(
        f"weights must be at most {torch.finfo(dtype).max:g}, the greatest number of {name}, got "
        f"{float(weights.abs().max()):g}; choose another format"
    )


def round_to_integers(x: torch.Tensor) -> torch.Tensor:
    """Rounds in place, half to even; torch.round would use threads."""
    return x.add_(_ROUNDER).sub_(_ROUNDER)


def quantized_rows(
    weights: torch.Tensor, quantize: Quantizer, group: int, scale_dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns codes ``[..., N, K/2]`` and scales ``[..., N, ceil(K/group)]`` of weights.

    Args:
        weights: floating point ``[..., N, K]``, K even.
        quantize: turns float32 ``[n, G, group]`` into nibbles of this shape and scales ``[n, G]``.
        group: weights of a row that share a scale.
        scale_dtype: the dtype of the scales.
    """
    k = weights.shape[-1]
    rows = weights.reshape(-1, k)
    codes = rows.new_empty((rows.shape[0], k // 2), dtype=torch.uint8)
    scales = rows.new_empty((rows.shape[0], -(-k // group)), dtype=scale_dtype)
    missing = -k % group  # weights of the last group
    step = max(1, _BLOCK_WEIGHTS // k)
    for start in range(0, rows.shape[0], step):
        block = slice(start, start + step)
        whole = rows[block].float()
        if missing:
            whole = torch.nn.functional.pad(whole, (0, missing))
        groups = whole.reshape(-1, scales.shape[-1], group)
        nibbles, scales[block] = quantize(groups, scale_dtype)
        pairs = nibbles.flatten(-2)[:, :k].reshape(-1, k // 2, 2)
        torch.add(pairs[..., 0], pairs[..., 1], alpha=16, out=codes[block])
    lead = weights.shape[:-1]
    return codes.view(*lead, -1), scales.view(*lead, -1)


def quantized_blocks(
    weights: torch.Tensor,
    quantize: Quantizer,
    code_dtype: torch.dtype,
    scale_dtype: torch.dtype,
    *,
    by_row: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns codes ``[..., N, K]`` and scales of weights ``[..., N, K]``.

    Args:
        weights: floating point.
        quantize: turns float32 ``[n, k]`` that share a scale into codes, and one scale ``[1]``.
        code_dtype: the dtype of the codes.
        scale_dtype: the dtype of the scales.
        by_row: whether a row shares a scale, and not a block of 128 x 128 weights.
    """
    *lead, n, k = weights.shape
    rows, depth = (1, k) if by_row else (BLOCK, BLOCK)
    codes = torch.empty(weights.shape, dtype=code_dtype, device="cpu")
    shape = (*lead, -(-n // rows), -(-k // depth))
    scales = torch.empty(shape, dtype=scale_dtype, device="cpu")
    stacks = (tensor.reshape(-1, *tensor.shape[-2:]) for tensor in (weights, codes, scales))
    for matrix, matrix_codes, matrix_scales in zip(*stacks, strict=True):
        for i, row in enumerate(range(0, n, rows)):
            for j, column in enumerate(range(0, k, depth)):
                block = slice(row, row + rows), slice(column, column + depth)
                matrix_codes[block], scale = quantize(matrix[block].float(), scale_dtype)
                matrix_scales[i, j] = scale[0]
    return codes, scales
