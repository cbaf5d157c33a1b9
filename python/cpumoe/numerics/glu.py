"""The activation between an expert's gate/up and down projections: a gated linear unit, mostly."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from numbers import Real

import torch

from cpumoe._base.scalars import boolean

_GELU_LINEAR = 2 * math.sqrt(2 / math.pi)
_GELU_CUBIC = 0.044715


_FUNCTIONS = ("silu", "gelu", "gelu_tanh", "relu", "relu2", "softcapped_silu")
_GELU = {"gelu": "none", "gelu_tanh": "tanh"}  # names of PyTorch's `gelu` for its forms
# Bounds on the second derivatives, where they do not depend on a parameter.
_CURVATURES = {"gelu": 0.8, "gelu_tanh": 0.81, "relu": 0.0, "relu2": 2.0}


def _softcap(x: torch.Tensor, cap: float) -> torch.Tensor:
    return torch.tanh(x / cap) * cap


@dataclass(frozen=True)
class GLU:
    """``h = (u + up_offset) * f(g)`` after clamping g above and u on both sides.

    g is the gate projection and u the up projection. ``GLU("gelu_tanh")`` is GeGLU as Gemma has it.
    The clamps are ``g = min(g, limit)`` and ``u = clamp(u, -limit, limit)``; ``limit=None`` leaves
    them out. Source of the name: Shazeer, "GLU Variants Improve Transformer", 2020.

    Experts without a gate projection, such as Nemotron-H's, have ``gated=False``: ``h = f(u)``.

    Attributes:
        function: f: ``"silu"`` (``g * sigmoid(alpha * g)``), ``"gelu"``
            (``g * (1 + erf(g / sqrt(2))) / 2``), ``"gelu_tanh"`` (PyTorch's ``gelu`` with
            ``approximate="tanh"``), ``"relu"``, ``"relu2"`` (relu squared), or
            ``"softcapped_silu"`` (``cap(g, gate_cap) * sigmoid(g)``, with ``cap(u, up_cap)`` in the
            place of u, where ``cap(x, c) = c * tanh(x / c)``).
        alpha: gain inside the sigmoid of ``"silu"``; positive and finite. Others have 1.
        limit: bound of both clamps; positive and finite, or None for no clamps.
        up_offset: number added to the up projection; finite.
        gate_cap: of ``"softcapped_silu"``; positive and finite. Others have None.
        up_cap: as `gate_cap`.
        gated: whether experts have a gate projection. Without one there are no limit, offset and
            caps.

    Raises:
        TypeError: a value is no number, or `gated` is no bool.
        ValueError: a value is outside these ranges.
    """

    function: str
    alpha: float = 1.0
    limit: float | None = None
    up_offset: float = 0.0
    gate_cap: float | None = None
    up_cap: float | None = None
    gated: bool = True

    def __post_init__(self) -> None:
        """Checks the values."""
        name = type(self).__name__
        if self.function not in _FUNCTIONS:
            known = ", ".join(_FUNCTIONS)
            raise ValueError(f"{name}: function must be one of {known}, got {self.function!r}")
        for field_name in ("alpha", "limit", "up_offset", "gate_cap", "up_cap"):
            value = getattr(self, field_name)
            optional = field_name not in ("alpha", "up_offset")
            if not (isinstance(value, Real) or (value is None and optional)):
                raise TypeError(f"{name}: {field_name} must be a number, got {value!r}")
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
        capped = self.function == "softcapped_silu"
        for cap, cap_name in ((self.gate_cap, "gate_cap"), (self.up_cap, "up_cap")):
            if capped and (cap is None or not math.isfinite(cap) or cap <= 0):
                raise ValueError(f"{name}: {cap_name} must be positive and finite, got {cap}")
            if not capped and cap is not None:
                raise ValueError(f"{name}: {cap_name} must be None for {self.function}, got {cap}")
        boolean(self.gated, f"{name}: gated")
        if not self.gated and (capped or self.limit is not None or self.up_offset):
            raise ValueError(
                f"{name}: gated must be True with a limit, an offset or caps, got {self}"
            )

    def clamp(self, gate: torch.Tensor, up: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns gate and up, tensors of any shapes, after clamping. NaN stays NaN.

        Without a gate projection, up takes the place of the gate.
        """
        if not self.gated:
            return up, up
        if self.limit is None:
            return gate, up
        return gate.clamp(max=self.limit), up.clamp(min=-self.limit, max=self.limit)

    def gate(self, gate: torch.Tensor) -> torch.Tensor:
        """Returns f of a clamped float tensor, in its dtype."""
        if self.function == "silu":
            return gate * torch.sigmoid(self.alpha * gate)
        if self.function in _GELU:
            return torch.nn.functional.gelu(gate, approximate=_GELU[self.function])
        if self.gate_cap is not None:
            return _softcap(gate, self.gate_cap) * torch.sigmoid(gate)
        return torch.relu(gate) if self.function == "relu" else torch.relu(gate).square()

    def up(self, up: torch.Tensor) -> torch.Tensor:
        """Returns the factor of f(g) for a clamped float tensor, in its dtype."""
        if not self.gated:
            return torch.ones_like(up)
        return (up if self.up_cap is None else _softcap(up, self.up_cap)) + self.up_offset

    def gate_error(self, gate: torch.Tensor, error: torch.Tensor) -> torch.Tensor:
        """Bounds ``|f(gate + d) - f(gate)|`` for all ``|d| <= error``, elementwise.

        The bound is the slope at `gate` times the error, plus half the greatest curvature times the
        error's square. relu's slope counts as 1 everywhere.
        """
        curvature = _CURVATURES.get(self.function, 0.0)
        if self.function == "silu":
            sigmoid = torch.sigmoid(self.alpha * gate)
            slope = sigmoid * (1 + self.alpha * gate * (1 - sigmoid))
            curvature = self.alpha / 2
        elif self.gate_cap is not None:
            sigmoid = torch.sigmoid(gate)
            tanh = torch.tanh(gate / self.gate_cap)
            slope = sigmoid * ((1 - tanh.square()) + self.gate_cap * tanh * (1 - sigmoid))
            curvature = 0.85 + 0.77 / self.gate_cap
        elif self.function == "gelu_tanh":
            sigmoid = torch.sigmoid(_GELU_LINEAR * (gate + _GELU_CUBIC * gate**3))
            inner = _GELU_LINEAR * (gate + 3 * _GELU_CUBIC * gate**3)
            slope = sigmoid * (1 + inner * (1 - sigmoid))
        elif self.function == "gelu":
            density = torch.exp(-gate.square() / 2) / math.sqrt(2 * math.pi)
            slope = torch.special.ndtr(gate) + gate * density
        elif self.function == "relu":
            slope = torch.ones_like(gate)
        else:
            slope = 2 * torch.relu(gate)
        return slope.abs() * error + curvature / 2 * error.square()

    def __call__(self, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        """Returns h for float tensors gate and up of equal shape, in their dtype."""
        gate, up = self.clamp(gate, up)
        if not self.gated:
            return self.gate(gate)
        return self.up(up) * self.gate(gate)


@dataclass(frozen=True)
class SwiGLU(GLU):
    """``h = (u + up_offset) * g * sigmoid(alpha * g)``, a `GLU` with the function ``"silu"``.

    ``SwiGLU()`` is the plain ``silu(g) * u``. Sources: gpt-oss (``swiglu`` in openai/gpt-oss
    ``torch/model.py``: alpha 1.702, limit 7, offset 1) and DeepSeek-V4 (``swiglu_limit``).

    Attributes:
        function: ``"silu"``; no argument, as are the caps and `gated`.
        alpha: see `GLU`.
        limit: see `GLU`.
        up_offset: see `GLU`.

    Raises:
        TypeError, ValueError: see `GLU`.
    """

    function: str = field(default="silu", init=False, repr=False)
    gate_cap: float | None = field(default=None, init=False, repr=False)
    up_cap: float | None = field(default=None, init=False, repr=False)
    gated: bool = field(default=True, init=False, repr=False)
