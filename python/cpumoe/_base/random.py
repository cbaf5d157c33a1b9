"""Random numbers that depend on their seed alone, not on the default dtype or device."""

from __future__ import annotations

import torch


def uniform(*shape: int, generator: torch.Generator) -> torch.Tensor:
    """Returns float32 numbers of that shape on the CPU, in [0, 1)."""
    return torch.rand(shape, dtype=torch.float32, device="cpu", generator=generator)


def normal(*shape: int, generator: torch.Generator) -> torch.Tensor:
    """Returns float32 numbers of that shape on the CPU, with mean 0 and deviation 1."""
    return torch.randn(shape, dtype=torch.float32, device="cpu", generator=generator)
