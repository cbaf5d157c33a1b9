"""MXFP4: E2M1 codes, and one E8M0 scale (a power of two) per 32 of them.

Source: OCP Microscaling Formats (MX) Specification v1.0, sections 5.3, 5.4 and 6.3.
"""

from __future__ import annotations

import torch

from cpumoe.formats.e2m1 import E2M1_VALUES, FLOAT4, round_e2m1
from cpumoe.formats.rounding import group_amax, power_of_two
from cpumoe.formats.weight_format import WeightFormat

E8M0_BIAS = 127


def _quantize_groups(
    groups: torch.Tensor, _scale_dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """MXFP4 by the MX spec v1.0, section 6.3.

    Shared exponent = floor(log2(amax)) - 2 (2 is E2M1's largest exponent), clamped to E8M0's range;
    an all-zero group gets byte 0. Elements round to nearest, ties to even; those above 6 saturate.
    """
    amax = group_amax(groups)
    _, exponent = torch.frexp(amax)  # amax = m * 2^exponent, m in [0.5, 1)
    shared = torch.where(amax == 0, -E8M0_BIAS, exponent - 3).clamp_(-E8M0_BIAS, E8M0_BIAS)
    # Multiplying by a power of two is exact unless it underflows, and then rounds to zero anyway.
    scaled = groups * power_of_two(-shared).float().unsqueeze(-1)
    nibbles = (scaled < 0).view(torch.uint8) * 8 + round_e2m1(scaled.abs())
    return nibbles, (shared + E8M0_BIAS).to(torch.uint8)


MXFP4 = WeightFormat(
    name="mxfp4",
    group_size=32,
    code_bits=4,
    scale_dtype=torch.float8_e8m0fnu,
    scale_storage=torch.uint8,
    values=E2M1_VALUES + tuple(-v for v in E2M1_VALUES),
    code_dtypes=(torch.uint8, torch.int8, *((FLOAT4,) if FLOAT4 else ())),
    scale_dtypes=(torch.float8_e8m0fnu, torch.uint8),
    quantize_groups=_quantize_groups,
)
