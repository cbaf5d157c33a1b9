"""How the int8 precision rounds activations, in PyTorch."""

from __future__ import annotations

import torch

# The greatest magnitude of a code.
GREATEST_CODE = 127
# A group whose magnitudes are all below this counts as zero.
LEAST_MAGNITUDE = 2.0**-100


def quantize_activations(
    x: torch.Tensor, *, group_size: int = 32, fused: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rounds each group of activations to int8, to nearest, ties to even.

    With a = max |x| of a group, a code is round(x * (127 / a)), and the scale is a / 127. Both
    quotients are rounded to float32. A group that holds an infinity or NaN has zero codes and a NaN
    scale. A group with a < 2^-100 has zero codes and a zero scale.

    Args:
        x: bf16, fp16 or fp32 ``[..., K]``.
        group_size: activations that share a scale. The last group may have fewer.
        fused: whether x * (127 / a) is rounded to an integer at once, as by a CPU's fused
            multiply-add, or to float32 first. The codes differ only for ties, such as x = a / 2,
            whose code is 63 or 64.

    Returns:
        Codes int8 ``[..., K]`` and scales float32 ``[..., ceil(K / group_size)]``.
    """
    groups = in_groups(x.float(), group_size)
    greatest = groups.abs().amax(-1, keepdim=True)  # NaN where one is
    usable = (greatest >= LEAST_MAGNITUDE) & greatest.isfinite()
    # float64 holds products of float32 exactly. Its quotients, rounded to float32, are correctly
    # rounded, while PyTorch divides 127 by a float32 tensor less exactly.
    inverse = (GREATEST_CODE / greatest.double().where(usable, torch.ones_like(greatest))).float()
    product = groups.double() * inverse.double() if fused else groups * inverse
    codes = product.round().where(usable, torch.zeros_like(product)).to(torch.int8)
    unusable = torch.zeros_like(greatest).masked_fill(~greatest.isfinite(), torch.nan)
    scales = (greatest.double() / GREATEST_CODE).float().where(usable, unusable)
    return codes.flatten(-2)[..., : x.shape[-1]], scales.squeeze(-1)


def dequantize_activations(
    codes: torch.Tensor, scales: torch.Tensor, *, group_size: int = 32
) -> torch.Tensor:
    """Returns exact float64 values of codes ``[..., K]``; `group_size` of them share a scale."""
    worth = in_groups(codes.double(), group_size) * scales.double().unsqueeze(-1)
    return worth.flatten(-2)[..., : codes.shape[-1]]


def in_groups(x: torch.Tensor, group_size: int) -> torch.Tensor:
    """Returns ``[..., K]`` as ``[..., groups, group_size]``, with zeros behind the last element."""
    missing = -x.shape[-1] % group_size
    if missing:
        x = torch.nn.functional.pad(x, (0, missing))
    return x.reshape(*x.shape[:-1], -1, group_size)
