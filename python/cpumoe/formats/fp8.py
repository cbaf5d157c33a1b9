"""FP8: E4M3 codes, and one scale per block of 128 x 128 of them, or per row.

A weight is code * scale. Sources: DeepSeek-V3's ``inference/kernel.py`` (blocks, whose scales are
called ``weight_scale_inv``), compressed-tensors 0.20 ``float-quantized`` (rows).
"""

from __future__ import annotations

import torch

from cpumoe.formats.quantized_matrix import BLOCK
from cpumoe.formats.rounding import group_amax, power_of_two_above, rounded_scales
from cpumoe.formats.weight_format import WeightFormat

_GREATEST = torch.finfo(torch.float8_e4m3fn).max  # 448


def _quantize_block(
    weights: torch.Tensor, scale_dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rounds float32 weights that share a scale: scale = amax / 448, or 1 if all are zero.

    The scale is rounded to the nearest number of its dtype, but to the next greater power of two if
    that is E8M0, so that no weight saturates. PyTorch rounds to the nearest code, ties to even.
    """
    scale = group_amax(weights.reshape(1, -1)) / _GREATEST
    scale[scale == 0] = 1.0
    if scale_dtype == torch.float8_e8m0fnu:
        scale = power_of_two_above(scale)
    else:
        scale = rounded_scales(scale, scale_dtype)
        scale[scale == 0] = 1.0
    codes = (weights / scale.float()).clamp_(-_GREATEST, _GREATEST)
    return codes.to(torch.float8_e4m3fn), scale


FP8 = WeightFormat(
    name="fp8",
    group_size=BLOCK,
    blocks=True,
    code_bits=8,
    scale_dtype=torch.float32,
    scale_storage=torch.float32,
    code_dtypes=(torch.float8_e4m3fn,),
    scale_dtypes=(torch.float32, torch.bfloat16, torch.float8_e8m0fnu, torch.uint8),
    quantize_block=_quantize_block,
)
