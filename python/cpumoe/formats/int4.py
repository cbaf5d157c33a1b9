"""Symmetric INT4: codes -8..7, and one scale per 32 of them.

Scales are bf16, as quantizing makes them, fp16 or fp32. Source: compressed-tensors 0.20,
``pack-quantized``, whose scales have the dtype of the unquantized model.
"""

from __future__ import annotations

import torch

from cpumoe.formats.rounding import group_amax, round_to_integers
from cpumoe.formats.weight_format import WeightFormat


def _quantize_groups(groups: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Rounds like ``calculate_qparams`` of compressed-tensors: q = round(w / scale).

    q is in -8..7, and scale = bf16(amax / 7.5), where 7.5 is half of that range. A zero scale
    becomes bf16's epsilon. Codes are offset binary: nibble = q + 8.
    """
    scales = (group_amax(groups) / 7.5).to(torch.bfloat16)
    scales[scales == 0] = torch.finfo(torch.bfloat16).eps
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
