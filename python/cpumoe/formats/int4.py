"""Symmetric INT4: codes -8..7, and one scale per 32 of them.

Scales are bf16, as quantizing usually makes them, fp16 or fp32. Source: compressed-tensors 0.20,
``pack-quantized``, whose scales have the dtype of the unquantized model.
"""

from __future__ import annotations

import torch

from cpumoe.formats.rounding import group_amax, round_to_integers, rounded_scales
from cpumoe.formats.weight_format import WeightFormat


def _quantize_groups(
    groups: torch.Tensor, scale_dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rounds like ``calculate_qparams`` of compressed-tensors: q = round(w / scale).

    q is in -8..7, and scale = amax / 7.5, rounded to its dtype, where 7.5 is half of that range. A
    zero scale becomes the dtype's epsilon. Codes are offset binary: nibble = q + 8.
    """
    scales = rounded_scales(group_amax(groups) / 7.5, scale_dtype)
    scales[scales == 0] = torch.finfo(scale_dtype).eps
    q = round_to_integers(groups / scales.float().unsqueeze(-1)).clamp_(-8, 7)
    return q.add_(8).to(torch.uint8), scales


INT4 = WeightFormat(
    name="int4",
    group_size=32,
    groups_vary=True,
    code_bits=4,
    scale_dtype=torch.bfloat16,
    scale_storage=torch.bfloat16,
    values=tuple(float(q) for q in range(-8, 8)),
    code_dtypes=(torch.int32, torch.uint8, torch.int8),
    scale_dtypes=(torch.bfloat16, torch.float16, torch.float32),
    scales_choose_kernels=True,
    quantize_groups=_quantize_groups,
)
