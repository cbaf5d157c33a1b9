"""The gated linear unit between an expert's gate/up and down projections."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch

_GELU_LINEAR = 2 * math.sqrt(2 / math.pi)
_GELU_CUBIC = 0.044715


def _silu(gate: torch.Tensor, alpha: float) -> torch.Tensor:
    return gate * torch.sigmoid(alpha * gate)


def _gelu_tanh(gate: torch.Tensor, _alpha: float) -> torch.Tensor:
    return torch.nn.functional.gelu(gate, approximate="tanh")


def _relu(gate: torch.Tensor, _alpha: float) -> torch.Tensor:
    return torch.relu(gate)


def _relu2(gate: torch.Tensor, _alpha: float) -> torch.Tensor:
    return torch.relu(gate).square()


_FUNCTIONS = {"silu": _silu, "gelu_tanh": _gelu_tanh, "relu": _relu, "relu2": _relu2}
# Bounds on the second derivatives. relu's slope jumps by 1 at zero, which `error` allows for.
_CURVATURES = {"gelu_tanh": 0.81, "relu": 0.0, "relu2": 2.0}


@dataclass(frozen=True)
class GLU:
    """``h = (u + up_offset) * f(g)`` after clamping g above and u on both sides.

    g is the gate projection and u the up projection. ``GLU("gelu_tanh")`` is GeGLU as Gemma has it.
    The clamps are ``g = min(g, limit)`` and ``u = clamp(u, -limit, limit)``; ``limit=None`` leaves
    them out. Source of the name: Shazeer, "GLU Variants Improve Transformer", 2020.

    Attributes:
        function: f: ``"silu"`` (``g * sigmoid(alpha * g)``), ``"gelu_tanh"`` (PyTorch's ``gelu``
            with ``approximate="tanh"``), ``"relu"``, or ``"relu2"`` (relu squared).
        alpha: gain inside the sigmoid of ``"silu"``; positive and finite. Others have 1.
        limit: bound of both clamps; positive and finite, or None for no clamps.
        up_offset: number added to the up projection; finite.

    Raises:
        ValueError: a value is outside these ranges.
    """

    function: str
    alpha: float = 1.0
    limit: float | None = None
    up_offset: float = 0.0

    def __post_init__(self) -> None:
        """Checks the values."""
        name = type(self).__name__
        if self.function not in _FUNCTIONS:
            known = ", ".join(_FUNCTIONS)
            raise ValueError(f"{name}: function must be one of {known}, got {self.function!r}")
        if not (math.isfinite(self.alpha) and self.alpha > 0):
            raise ValueError(f"{name}: alpha must be positive and finite, got {self.alpha}")
        if self.alpha != 1 and self.function != "silu":
            raise ValueError(f"{name}: alpha must be 1 for {self.function}, got {self.alpha}")
        if self.limit is not None and not (math.isfinite(self.limit) and self.limit > 0):
            raise ValueError(
                f"{name}: limit must be positive and finite, or None for no clamp, got {self.limit}"
            )
        if not math.isfinite(self.up_offset):
            raise ValueError(f"{name}: up_offset must be finite, got {self.up_offset}")

    def clamp(self, gate: torch.Tensor, up: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns gate and up, tensors of any shapes, after clamping. NaN stays NaN."""
        if self.limit is None:
            return gate, up
        return gate.clamp(max=self.limit), up.clamp(min=-self.limit, max=self.limit)

    def gate(self, gate: torch.Tensor) -> torch.Tensor:
        """Returns f of a clamped float tensor, in its dtype."""
        return _FUNCTIONS[self.function](gate, self.alpha)

    def gate_error(self, gate: torch.Tensor, error: torch.Tensor) -> torch.Tensor:
        """Bounds ``|f(gate + d) - f(gate)|`` for all ``|d| <= error``, elementwise.

        The bound is the slope at `gate` times the error, plus half the greatest curvature times the
        error's square.
        """
        if self.function == "silu":
            sigmoid = torch.sigmoid(self.alpha * gate)
            slope = sigmoid * (1 + self.alpha * gate * (1 - sigmoid))
            return slope.abs() * error + self.alpha / 4 * error.square()
        if self.function == "gelu_tanh":
            sigmoid = torch.sigmoid(_GELU_LINEAR * (gate + _GELU_CUBIC * gate**3))
            inner = _GELU_LINEAR * (gate + 3 * _GELU_CUBIC * gate**3)
            slope = sigmoid * (1 + inner * (1 - sigmoid))
        elif self.function == "relu":
            slope = torch.ones_like(gate)
        else:
            slope = 2 * torch.relu(gate)
        return slope.abs() * error + _CURVATURES[self.function] / 2 * error.square()

    def __call__(self, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        """Returns h for float tensors gate and up of equal shape, in their dtype."""
        gate, up = self.clamp(gate, up)
        return (up + self.up_offset) * self.gate(gate)


@dataclass(frozen=True)
class SwiGLU(GLU):
    """``h = (u + up_offset) * g * sigmoid(alpha * g)``, a `GLU` with the function ``"silu"``.

    ``SwiGLU()`` is the plain ``silu(g) * u``. Sources: gpt-oss (``swiglu`` in openai/gpt-oss
    ``torch/model.py``: alpha 1.702, limit 7, offset 1) and DeepSeek-V4 (``swiglu_limit``).

    Attributes:
        function: ``"silu"``; no argument.
        alpha: see `GLU`.
        limit: see `GLU`.
        up_offset: see `GLU`.

    Raises:
        ValueError: see `GLU`.
    """

    function: str = field(default="silu", init=False, repr=False)
