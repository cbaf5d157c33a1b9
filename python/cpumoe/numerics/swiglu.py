"""The gated activation between an expert's gate/up and down projections."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class SwiGLU:
    """``h = (u + up_offset) * g * sigmoid(alpha * g)`` after clamping g above and u on both sides.

    g is the gate projection and u the up projection. ``SwiGLU()`` is the plain ``silu(g) * u``. The
    clamps are ``g = min(g, limit)`` and ``u = clamp(u, -limit, limit)``; ``limit=None`` leaves them
    out. Sources: gpt-oss (``swiglu`` in openai/gpt-oss ``torch/model.py``: alpha 1.702, limit 7,
    offset 1) and DeepSeek-V4 (``swiglu_limit``).

    Attributes:
        alpha: gain inside the sigmoid; positive and finite.
        limit: bound of both clamps; positive and finite, or None for no clamps.
        up_offset: number added to the up projection; finite.

    Raises:
        ValueError: a value is outside these ranges.
    """

    alpha: float = 1.0
    limit: float | None = None
    up_offset: float = 0.0

    def __post_init__(self) -> None:
        """Checks the values."""
        if not (math.isfinite(self.alpha) and self.alpha > 0):
            raise ValueError(f"SwiGLU: alpha must be positive and finite, got {self.alpha}")
        if self.limit is not None and not (math.isfinite(self.limit) and self.limit > 0):
            raise ValueError(
                f"SwiGLU: limit must be positive and finite, or None for no clamp, got {self.limit}"
            )
        if not math.isfinite(self.up_offset):
            raise ValueError(f"SwiGLU: up_offset must be finite, got {self.up_offset}")

    def clamp(self, gate: torch.Tensor, up: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns gate and up, tensors of any shapes, after clamping. NaN stays NaN."""
        if self.limit is None:
            return gate, up
        return gate.clamp(max=self.limit), up.clamp(min=-self.limit, max=self.limit)

    def __call__(self, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        """Returns h for float tensors gate and up of equal shape, in their dtype."""
        gate, up = self.clamp(gate, up)
        return (up + self.up_offset) * gate * torch.sigmoid(self.alpha * gate)
