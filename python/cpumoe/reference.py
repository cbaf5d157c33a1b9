"""The golden model in PyTorch: dequantize, run the routed experts, bound a kernel's error.

Slow and plain on purpose. Weights are dequantized one expert at a time, so that memory stays at one
expert whatever the checkpoint's size.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from cpumoe.formats import QuantizedMatrix, WeightFormat, describe, weight_format
from cpumoe.swiglu import SwiGLU

# A stack [experts, N, K] (dense or quantized) or a sequence of one matrix [N, K] per expert, which
# may read lazily: only experts that get a token are asked for.
ExpertMatrices = torch.Tensor | QuantizedMatrix | Sequence[torch.Tensor] | Sequence[QuantizedMatrix]
# [experts, N], or one [N] per expert.
ExpertBiases = torch.Tensor | Sequence[torch.Tensor | None] | None

_PLAIN = SwiGLU()

_U32 = 2.0**-24  # unit roundoff of float32
_UBF16 = 2.0**-8  # unit roundoff of bfloat16: 8 bits of precision
_UNIT_ROUNDOFF = {torch.bfloat16: _UBF16, torch.float16: 2.0**-11, torch.float32: _U32}
# Deviations that a sum of n independent rounding errors stays within, in units of its 2-norm
# (Hoeffding: exceeded with probability < 2 exp(-LAMBDA^2 / 2) even for errors at their maximum).
_LAMBDA = 5.0
# Products and inputs below the normal range may be flushed to zero.
_TINY = 2.0**-125
# Relative error allowed to a vector exp and the division of the sigmoid.
_ACTIVATION_EPS = 2.0**-20


def dequantize(
    codes: torch.Tensor,
    scales: torch.Tensor,
    format: str | WeightFormat,
    dtype: torch.dtype = torch.float64,
) -> torch.Tensor:
    """Returns the weights ``[..., N, K]`` of checkpoint codes and scales, exactly.

    Args:
        codes: a checkpoint's codes (see `WeightFormat.normalize_codes`).
        scales: a checkpoint's scales (see `WeightFormat.normalize_scales`).
        format: a weight format or its name.
        dtype: torch.float32 or torch.float64.

    Raises:
        TypeError: a dtype that the format does not have.
        ValueError: an unknown format, shapes that do not belong together, NaN scales.
    """
    fmt = weight_format(format)
    normalized = fmt.normalize_scales(scales, "scales")
    fmt.check_scales(normalized, "scales")
    return fmt.dequantize(fmt.normalize_codes(codes, "codes"), normalized, dtype)


def experts_forward(
    hidden_states: torch.Tensor,
    topk_ids: torch.Tensor,
    topk_weights: torch.Tensor,
    gate: ExpertMatrices,
    up: ExpertMatrices,
    down: ExpertMatrices,
    *,
    format: str | WeightFormat | None = None,
    swiglu: SwiGLU = _PLAIN,
    gate_bias: ExpertBiases = None,
    up_bias: ExpertBiases = None,
    down_bias: ExpertBiases = None,
    expert_mask: torch.Tensor | None = None,
    dtype: torch.dtype = torch.float64,
) -> torch.Tensor:
    """Returns ``sum_e w_e * (down_e h_e + down_bias_e)`` ``[tokens, hidden]`` in `dtype`.

    ``h_e = swiglu(gate_e x + gate_bias_e, up_e x + up_bias_e)``. Nothing is rounded below `dtype`.

    Args:
        hidden_states: float ``[tokens, hidden]``.
        topk_ids: int32/int64 ``[tokens, top_k]``. The ids -1 and num_experts are skipped.
        topk_weights: float ``[tokens, top_k]``.
        gate: ``[intermediate, hidden]`` per expert: dense float, or `QuantizedMatrix`.
        up: as `gate`.
        down: ``[hidden, intermediate]`` per expert.
        format: the weight format of `QuantizedMatrix` weights; None for dense ones.
        swiglu: the activation.
        gate_bias: ``[intermediate]`` per expert, or None.
        up_bias: as `gate_bias`.
        down_bias: ``[hidden]`` per expert, or None.
        expert_mask: bool ``[experts]``, True = skipped, or None.
        dtype: dtype of all arithmetic.

    Raises:
        IndexError: an id below -1 or above num_experts.
        ValueError: shapes that do not belong together, quantized weights without a format.
    """
    weights = _Weights(gate, up, down, format, gate_bias, up_bias, down_bias, dtype)
    output = torch.zeros(hidden_states.shape, dtype=dtype)
    routing = _routing(hidden_states, topk_ids, topk_weights, len(weights), expert_mask)
    for expert, tokens, scale in routing:
        w = weights.expert(expert)
        x = hidden_states[tokens].to(dtype)
        h = swiglu(*_gate_up(w, x))
        output.index_add_(0, tokens, _linear(h, w.down, w.down_bias) * scale.to(dtype)[:, None])
    return output


def experts_forward_with_bound(
    hidden_states: torch.Tensor,
    topk_ids: torch.Tensor,
    topk_weights: torch.Tensor,
    gate: ExpertMatrices,
    up: ExpertMatrices,
    down: ExpertMatrices,
    *,
    format: str | WeightFormat | None = None,
    swiglu: SwiGLU = _PLAIN,
    gate_bias: ExpertBiases = None,
    up_bias: ExpertBiases = None,
    down_bias: ExpertBiases = None,
    expert_mask: torch.Tensor | None = None,
    output_dtype: torch.dtype = torch.bfloat16,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the float64 output and a bound on a bf16 kernel's error, both ``[tokens, hidden]``.

    A kernel rounds x and h to bf16 and the output to `output_dtype`, and adds in float32. With
    u = 2^-24, b = 2^-8, L = min(5, sqrt(n)) for a sum of n terms, and ``|.|_2`` taken along k:
      1. g = Wx: |dg| <= L sqrt(K) u (|g| + 3 |w.x|_2); |g| + 3 |w.x|_2 bounds the partial sums, L
         that n rounding errors of random sign add up to sqrt(n) of them (Higham & Mary 2019).
      2. h = (u+c) s(g), s(g) = g sigmoid(a g): |dh| <= |s'| |u+c| |dg| + |s| |du| + second order
         (|s''| <= a/2) + the error of exp. Clamps do not lengthen an error.
      3. y = Wd h: |Wd| |dh| (these may be coherent), + L b |wd.h|_2 (h to bf16, random signs),
         + |y(bf16 x, bf16 h) - y(x, h)|, which is what the roundings do where they are coherent, as
         for constant weights, + float32 accumulation as in 1.
      4. sum over experts with |w_e|, + the output's unit roundoff times its size.

    Args: as `experts_forward`; `output_dtype` is the kernel's (bfloat16, float16 or float32).

    Raises:
        IndexError: as `experts_forward`.
        ValueError: as `experts_forward`.
    """
    weights = _Weights(gate, up, down, format, gate_bias, up_bias, down_bias, torch.float64)
    output = torch.zeros(hidden_states.shape, dtype=torch.float64)
    bound = torch.zeros_like(output)
    routing = _routing(hidden_states, topk_ids, topk_weights, len(weights), expert_mask)
    for expert, tokens, scale in routing:
        y, dy = _expert_bound(hidden_states[tokens], weights.expert(expert), swiglu)
        scale = scale.double()[:, None]
        output.index_add_(0, tokens, y * scale)
        # The product with the routing weight and the sum over experts round in float32.
        bound.index_add_(0, tokens, (dy + 8 * _U32 * y.abs()) * scale.abs())
    limits = torch.finfo(output_dtype)
    subnormal = limits.smallest_normal * limits.eps / 2  # half the spacing near zero
    return output, bound + _UNIT_ROUNDOFF[output_dtype] * (output.abs() + bound) + subnormal


def error_bound(
    hidden_states: torch.Tensor,
    topk_ids: torch.Tensor,
    topk_weights: torch.Tensor,
    gate: ExpertMatrices,
    up: ExpertMatrices,
    down: ExpertMatrices,
    *,
    format: str | WeightFormat | None = None,
    swiglu: SwiGLU = _PLAIN,
    gate_bias: ExpertBiases = None,
    up_bias: ExpertBiases = None,
    down_bias: ExpertBiases = None,
    expert_mask: torch.Tensor | None = None,
    output_dtype: torch.dtype = torch.bfloat16,
) -> torch.Tensor:
    """Returns the bound of `experts_forward_with_bound` alone, float64 ``[tokens, hidden]``."""
    return experts_forward_with_bound(
        hidden_states,
        topk_ids,
        topk_weights,
        gate,
        up,
        down,
        format=format,
        swiglu=swiglu,
        gate_bias=gate_bias,
        up_bias=up_bias,
        down_bias=down_bias,
        expert_mask=expert_mask,
        output_dtype=output_dtype,
    )[1]


@dataclass(frozen=True)
class _Expert:
    gate: torch.Tensor
    up: torch.Tensor
    down: torch.Tensor
    gate_bias: torch.Tensor | None
    up_bias: torch.Tensor | None
    down_bias: torch.Tensor | None


class _Weights:
    """The experts' matrices, dequantized when asked for."""

    def __init__(
        self,
        gate: ExpertMatrices,
        up: ExpertMatrices,
        down: ExpertMatrices,
        format: str | WeightFormat | None,
        gate_bias: ExpertBiases,
        up_bias: ExpertBiases,
        down_bias: ExpertBiases,
        dtype: torch.dtype,
    ) -> None:
        self._matrices = (gate, up, down)
        self._biases = (gate_bias, up_bias, down_bias)
        self._format = None if format is None else weight_format(format)
        self._dtype = dtype
        counts = [_count(m) for m in self._matrices]
        if len(set(counts)) != 1:
            raise ValueError(f"gate, up, down: expected as many experts each, got {counts}")
        self._num_experts = counts[0]

    def __len__(self) -> int:
        return self._num_experts

    def expert(self, index: int) -> _Expert:
        gate, up, down = (self._dense(m[index]) for m in self._matrices)
        if gate.shape != up.shape or down.shape != gate.shape[::-1]:
            raise ValueError(
                f"experts.{index}: expected gate and up [I, H] and down [H, I], got "
                f"{list(gate.shape)}, {list(up.shape)}, {list(down.shape)}"
            )
        biases = (None if b is None else self._bias(b[index]) for b in self._biases)
        return _Expert(gate, up, down, *biases)

    def _dense(self, matrix: torch.Tensor | QuantizedMatrix) -> torch.Tensor:
        if isinstance(matrix, QuantizedMatrix):
            if self._format is None:
                raise ValueError("format: quantized weights need their format, got None")
            return dequantize(matrix.codes, matrix.scales, self._format, self._dtype)
        if not matrix.dtype.is_floating_point:
            raise ValueError(f"weights: expected float or QuantizedMatrix, got {describe(matrix)}")
        return matrix.to(self._dtype)

    def _bias(self, bias: torch.Tensor | None) -> torch.Tensor | None:
        return None if bias is None else bias.to(self._dtype)


def _count(matrices: ExpertMatrices) -> int:
    if isinstance(matrices, QuantizedMatrix):
        return matrices.codes.shape[0]
    return len(matrices)


def _routing(
    hidden_states: torch.Tensor,
    topk_ids: torch.Tensor,
    topk_weights: torch.Tensor,
    num_experts: int,
    expert_mask: torch.Tensor | None,
) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
    """Yields (expert, its tokens' indices, their weights), in the experts' order."""
    tokens = hidden_states.shape[0]
    if topk_ids.dim() != 2 or topk_ids.shape[0] != tokens or topk_ids.shape != topk_weights.shape:
        raise ValueError(
            f"topk_ids, topk_weights: expected [{tokens}, top_k] each, got "
            f"{list(topk_ids.shape)}, {list(topk_weights.shape)}"
        )
    bad = (topk_ids < -1) | (topk_ids > num_experts)
    if bool(bad.any()):
        row, column = (int(i) for i in bad.nonzero()[0])
        raise IndexError(
            f"topk_ids: expected -1..{num_experts}, got {int(topk_ids[row, column])} "
            f"at [{row}, {column}]"
        )
    for expert in sorted(set(topk_ids.flatten().tolist())):
        if not 0 <= expert < num_experts:
            continue
        if expert_mask is not None and bool(expert_mask[expert]):
            continue
        rows, columns = (topk_ids == expert).nonzero(as_tuple=True)
        yield expert, rows, topk_weights[rows, columns]


def _linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    y: torch.Tensor = x @ weight.T
    return y if bias is None else y + bias


def _gate_up(w: _Expert, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return _linear(x, w.gate, w.gate_bias), _linear(x, w.up, w.up_bias)


def _positive_product(x: torch.Tensor, weight: torch.Tensor, power: int) -> torch.Tensor:
    """``(sum_k (|w| |x|)^power)^(1/power)``, ``[tokens, N]``.

    In float32, which is twice as fast and precise enough for a bound; normalized, so that scales
    far from one neither overflow nor vanish.
    """
    x_max, w_max = (t.abs().amax().clamp_min(_TINY) for t in (x, weight))
    x_power = (x / x_max).float().abs().pow(power)
    w_power = (weight / w_max).float().abs().pow(power)
    total: torch.Tensor = (x_power @ w_power.T).double()
    return total.pow(1 / power) * (x_max * w_max * 1.001)


def _accumulation_error(
    x: torch.Tensor, weight: torch.Tensor, y: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    k = x.shape[-1]
    size = y.abs() + 3 * _positive_product(x, weight, 2)
    if bias is not None:
        size = size + 2 * bias.abs()
    flushed = _TINY * (1 + x.abs().sum(-1, keepdim=True))
    relative = min(_LAMBDA, math.sqrt(k)) * math.sqrt(k) * _U32
    return size * relative + flushed


def _expert_bound(
    hidden_states: torch.Tensor, w: _Expert, swiglu: SwiGLU
) -> tuple[torch.Tensor, torch.Tensor]:
    """One expert's float64 output and the bound of steps 1 to 3, before the routing weight."""
    exact_x, x = hidden_states.double(), hidden_states.bfloat16().double()
    gate, up = _gate_up(w, x)
    d_gate = _accumulation_error(x, w.gate, gate, w.gate_bias)
    d_up = _accumulation_error(x, w.up, up, w.up_bias)
    h = swiglu(gate, up)
    d_h = _activation_error(gate, up, d_gate, d_up, swiglu) + _ACTIVATION_EPS * h.abs() + _TINY
    exact_h = h if torch.equal(exact_x, x) else swiglu(*_gate_up(w, exact_x))
    rounded_h = h.bfloat16().double()
    exact = _linear(exact_h, w.down, w.down_bias)
    y = _linear(rounded_h, w.down, w.down_bias)
    random = min(_LAMBDA, math.sqrt(h.shape[-1])) * _UBF16 * _positive_product(h, w.down, 2)
    propagated = _positive_product(d_h, w.down, 1)
    accumulated = _accumulation_error(rounded_h, w.down, y, w.down_bias)
    return exact, (y - exact).abs() + random + propagated + accumulated


def _activation_error(
    gate: torch.Tensor,
    up: torch.Tensor,
    d_gate: torch.Tensor,
    d_up: torch.Tensor,
    swiglu: SwiGLU,
) -> torch.Tensor:
    gate, up = swiglu.clamp(gate, up)
    sigmoid = torch.sigmoid(swiglu.alpha * gate)
    slope = sigmoid * (1 + swiglu.alpha * gate * (1 - sigmoid))
    d_swish = slope.abs() * d_gate + swiglu.alpha / 4 * d_gate.square()
    return ((up + swiglu.up_offset).abs() + d_up) * d_swish + (gate * sigmoid).abs() * d_up
