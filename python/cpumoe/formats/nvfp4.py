"""NVFP4: E2M1 codes, one E4M3 scale per 16 of them, and one float32 factor per matrix.

A weight is code * (scale * factor). Sources: TensorRT Model Optimizer's ``nvfp4_tensor.py`` (the
factor is called ``weight_scale_2``), compressed-tensors 0.20 ``nvfp4-pack-quantized`` (its
``weight_global_scale`` is 1 / factor).
"""

from __future__ import annotations

import torch

from cpumoe.formats.e2m1 import E2M1_VALUES, FLOAT4, round_e2m1
from cpumoe.formats.rounding import group_amax
from cpumoe.formats.weight_format import WeightFormat

_GREATEST_CODE = max(E2M1_VALUES)  # 6
_GREATEST_SCALE = torch.finfo(torch.float8_e4m3fn).max  # 448
_LEAST_SCALE = 2.0**-9  # the least E4M3 number


def _factor(amax: torch.Tensor) -> torch.Tensor:
    """The factor with which the greatest group of a matrix has the greatest scale."""
    factor = amax / (_GREATEST_CODE * _GREATEST_SCALE)
    return factor.masked_fill_(factor == 0, 1.0)


def _quantize_groups(
    groups: torch.Tensor, _scale_dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rounds weights that were divided by the factor: scale = E4M3(amax / 6), and at least 2^-9.

    Elements round to nearest, ties to even; those above 6 saturate.
    """
    scales = (group_amax(groups) / _GREATEST_CODE).clamp_(_LEAST_SCALE, _GREATEST_SCALE)
    scales = scales.to(torch.float8_e4m3fn)
    scaled = groups / scales.float().unsqueeze(-1)
    return (scaled < 0).view(torch.uint8) * 8 + round_e2m1(scaled.abs()), scales


NVFP4 = WeightFormat(
    name="nvfp4",
    group_size=16,
    code_bits=4,
    scale_dtype=torch.float8_e4m3fn,
    scale_storage=torch.float8_e4m3fn,
    values=E2M1_VALUES + tuple(-v for v in E2M1_VALUES),
    code_dtypes=(torch.uint8, torch.int8, *((FLOAT4,) if FLOAT4 else ())),
    scale_dtypes=(torch.float8_e4m3fn,),
    quantize_groups=_quantize_groups,
    factor_for=_factor,
)
