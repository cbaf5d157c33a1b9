"""Arithmetic that the formats' quantizers share."""

from __future__ import annotations

import torch

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
        raise ValueError("quantize: weights must be finite, got NaN or Inf")
    return amax


def round_to_integers(x: torch.Tensor) -> torch.Tensor:
    """Rounds in place, half to even; torch.round would use threads."""
    return x.add_(_ROUNDER).sub_(_ROUNDER)
