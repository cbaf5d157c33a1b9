"""E2M1, the 4-bit floating point numbers of the MXFP4 and NVFP4 formats.

Source: OCP Microscaling Formats (MX) Specification v1.0, section 5.3.3.
"""

from __future__ import annotations

import torch

from cpumoe.formats.rounding import round_to_integers

E2M1_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)

# Two E2M1 codes in a byte, the even one in the low nibble. PyTorch has this dtype since 2.8.
FLOAT4: torch.dtype | None = getattr(torch, "float4_e2m1fn_x2", None)


def round_e2m1(magnitude: torch.Tensor) -> torch.Tensor:
    """Codes 0..7 of the E2M1 values nearest to `magnitude`, ties to the even code.

    The step of E2M1 is 2^e / 2 in [2^e, 2^(e+1)), with e = 0 below 1, and r steps have the code
    r + 2e there. The code is even exactly if r is, so rounding r half to even suffices.
    """
    biased = magnitude.clamp(1, 7).view(torch.int32) >> 23  # e + 127
    steps_per_one = ((255 - biased) << 23).view(torch.float32)  # 2^(1 - e)
    steps = round_to_integers(magnitude * steps_per_one)
    codes = steps.to(torch.int32).add_(biased - 127, alpha=2)
    return codes.clamp_(max=7).to(torch.uint8)
