"""What the exported checkpoint does to weights: MXFP4 experts, FP8 blocks, bfloat16.

In training the forward pass sees the weights as they will be exported, and the gradients go to the
float weights as if nothing had happened (the straight-through estimator).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from cpumoe.formats import weight_format

FP8_BLOCK = 128
_FP8_MAX = 448.0
_FP4 = re.compile(r"\.mlp\.experts\.(gate_up_proj|down_proj)$")
_FP8 = re.compile(
    r"\.self_attn\.(q_a|q_b|kv|o_a|o_b)_proj\.weight$"
    r"|\.indexer\.q_b_proj\.weight$"
    r"|\.shared_experts\.(gate|up|down)_proj\.weight$"
)


def kind(name: str) -> str:
    """Returns how a parameter is stored: fp4, fp8, bf16 or fp32 (by transformers' names)."""
    if _FP4.search(name):
        return "fp4"
    if _FP8.search(name):
        return "fp8"
    keep = ("_hc.", "hc_head.", ".sinks", ".position_bias", "e_score_correction_bias")
    return "fp32" if any(part in name for part in keep) else "bf16"


def quantize_fp8(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns float8_e4m3fn ``[N, K]`` and float8_e8m0fnu ``[ceil(N/128), ceil(K/128)]``.

    A block's scale is the least power of two with which its largest weight fits.
    """
    rows, columns = weight.shape
    grid = -(-rows // FP8_BLOCK), -(-columns // FP8_BLOCK)
    padded = weight.new_zeros(grid[0] * FP8_BLOCK, grid[1] * FP8_BLOCK)
    padded[:rows, :columns] = weight
    amax = padded.view(grid[0], FP8_BLOCK, grid[1], FP8_BLOCK).abs().amax((1, 3))
    scales = torch.exp2(torch.ceil(torch.log2(amax.clamp(min=2.0**-100) / _FP8_MAX)))
    codes = (weight / _spread(scales, weight)).to(torch.float8_e4m3fn)
    return codes, scales.to(torch.float8_e8m0fnu)


def dequantize_fp8(codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """Returns the float32 weights of `quantize_fp8`."""
    return codes.float() * _spread(scales.float(), codes)


def exported(name: str, weight: torch.Tensor) -> torch.Tensor:
    """Returns the float32 values that a parameter has after export."""
    stored = kind(name)
    if stored == "fp4":
        fmt = weight_format("mxfp4")
        return fmt.dense(fmt.quantized(weight))
    if stored == "fp8":
        return dequantize_fp8(*quantize_fp8(weight))
    return weight if stored == "fp32" else weight.bfloat16().float()


@contextmanager
def as_exported(model: nn.Module, enabled: bool = True) -> Iterator[None]:
    """Within, `model` computes with its weights as exported."""
    masters: list[tuple[nn.Parameter, torch.Tensor]] = []
    try:
        with torch.no_grad():
            for name, parameter in model.named_parameters() if enabled else ():
                masters.append((parameter, parameter.data))
                parameter.data = exported(name, parameter.data)
        yield
    finally:
        for parameter, master in masters:
            parameter.data = master


def _spread(scales: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    blocks = scales.repeat_interleave(FP8_BLOCK, 0).repeat_interleave(FP8_BLOCK, 1)
    return blocks[: weight.shape[0], : weight.shape[1]]
