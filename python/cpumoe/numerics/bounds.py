"""Bounds on the error of a correct kernel, from the roundings that kernels do.

With u = 2^-24, b = 2^-8, L = min(5, sqrt(n)) for a sum of n terms, and ``|.|_2`` taken along k:
  1. g = Wx: |dg| <= L sqrt(K) u (|g| + 3 |w.x|_2). Here |g| + 3 |w.x|_2 bounds the partial sums. K
     rounding errors of random sign add up to at most L sqrt(K) of them (Higham & Mary 2019).
     A kernel may hold x as integers, written I(x): 21 bits per group, or 14 in bf16 calls. This
     adds |W(I(x) - x)|.
  2. h = (u+c) f(g): |dh| <= |f'| |u+c| |dg| + |f| |du| + second order (|f''| <= a/2 for
     f = g sigmoid(a g); `GLU.gate_error`) + the error of exp. Clamps do not increase an error.
  3. y = Wd h: the precision's roundings of x and h (below), plus float32 accumulation as in 1, plus
     |Wd| 2^-20 A for I(h), where A is a group's max |h|. With 14 bits, |Wd(I(h) - h)| is added, and
     b |h| below is at least half a unit of these integers.
  4. The sum over experts: each expert's error times |w_e|, plus the output's unit roundoff times
     its size.

Precision "auto" with fp32 hidden states adds only |Wd| |dh| in step 3. For other hidden states, and
where PyTorch allows bf16 products of fp32, "auto" is "bf16" (`resolve_precision`).

Precision "bf16" rounds x and h to bf16. Step 3 has three terms:
  - |Wd| |dh|, since these errors may be coherent;
  - L b |wd.h|_2, for the rounding of h to bf16 with random signs;
  - |y(bf16 x, bf16 h) - y(x, h)|, the effect of the roundings where they are coherent, as for
    constant weights.

Precision "int8" rounds x and h as `quantize_activations` does, written Q. A rounding is off by at
most half a code's value, A/254 with A the group's max |x|, so that output errors are about 1 %. The
rounding of x is known exactly, except for ties, for which both ways are tried. So steps 1 and 2
begin at Q(x), and step 3 has the error |y(Q(x), Q(h)) - y(x, h)| itself. Unknown is only the error
dh of the kernel's h, for which step 3 also has |Wd| |Q(h + dh) - Q(h)|. With dA = max |dh| of the
group:
  - h 127/A moves by at most t = 127 (|dh| + |h| dA/A) / (A - dA) + 2^-15 (float32 roundings);
  - the code moves by at most floor(t + 1/2 + h's distance from its code);
  - the code's value moves by at most dA/127.
Q(h) never moves by more than the sum of both distances from h: A/254 + dh, and the known one. A
kernel may compute an expert with many tokens in bf16 where the CPU multiplies bf16 faster, so the
bound is at least that of "bf16".
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from typing_extensions import Unpack

from cpumoe._base.renamed import with_old_arguments
from cpumoe._base.tensors import dtype_name
from cpumoe.formats.rounding import power_of_two
from cpumoe.numerics.activations import (
    GREATEST_CODE,
    LEAST_MAGNITUDE,
    dequantize_activations,
    in_groups,
    quantize_activations,
)
from cpumoe.numerics.glu import GLU
from cpumoe.numerics.precision import PRECISIONS, check_precision, resolve_precision
from cpumoe.numerics.reference_layer import (
    DenseExpert,
    ExpertMatrices,
    LayerOptions,
    ReferenceLayer,
)

_U32 = 2.0**-24  # unit roundoff of float32
_UBF16 = 2.0**-8  # unit roundoff of bfloat16: 8 bits of precision
_UNIT_ROUNDOFF = {torch.bfloat16: _UBF16, torch.float16: 2.0**-11, torch.float32: _U32}
# The bound on a sum of n independent rounding errors, in units of its 2-norm. By Hoeffding, it is
# exceeded with probability < 2 exp(-LAMBDA^2 / 2) even if all errors are at their maximum.
_LAMBDA = 5.0
# Activations as integers: bits of the magnitude with two and with three digits. A group has two
# digits if its other magnitudes sum to at least twice the greatest, and the greatest is not tiny.
# The last constant is the least unit.
_TWO_DIGITS, _THREE_DIGITS = 13, 20
_OTHERS_TO_GREATEST = 2.0
_LEAST_OF_TWO_DIGITS = 2.0**-106
_LEAST_UNIT = 2.0**-148
# Products and inputs below the normal range may be flushed to zero.
_TINY = 2.0**-125
# Relative error allowed to a vector exp and the division of the sigmoid or of gelu, or to those and
# two tanh.
_ACTIVATION_EPS = 2.0**-20
_SOFTCAPPED_EPS = 2.0**-19
# Activations that share an int8 scale, for weights without a format.
_GROUP_SIZE = 32


@with_old_arguments("compute", "swiglu")
def experts_forward_with_bound(
    hidden_states: torch.Tensor,
    topk_ids: torch.Tensor,
    topk_weights: torch.Tensor,
    gate: ExpertMatrices | None,
    up: ExpertMatrices,
    down: ExpertMatrices,
    *,
    precision: str = PRECISIONS[0],
    output_dtype: torch.dtype = torch.bfloat16,
    **options: Unpack[LayerOptions],
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the float64 output and a bound on a kernel's error, both ``[tokens, hidden]``.

    The documentation of this module derives the bound.

    Args:
        hidden_states: see `experts_forward`.
        topk_ids: see `experts_forward`.
        topk_weights: see `experts_forward`.
        gate: see `experts_forward`.
        up: see `experts_forward`.
        down: see `experts_forward`.
        precision: the kernel's precision, one of `PRECISIONS`.
        output_dtype: dtype of the kernel's output: bfloat16, float16 or float32.
        options: see `LayerOptions`.

    Raises:
        IndexError: see `experts_forward`.
        ValueError: see `experts_forward`. Also: the precision is unknown, `output_dtype` is another
            one.
    """
    output, bounds = experts_forward_with_bounds(
        hidden_states,
        topk_ids,
        topk_weights,
        gate,
        up,
        down,
        precisions=(precision,),
        output_dtype=output_dtype,
        **options,
    )
    return output, bounds[precision]


@with_old_arguments("computes", "swiglu")
@torch.autocast("cpu", enabled=False)  # type: ignore[untyped-decorator]
def experts_forward_with_bounds(
    hidden_states: torch.Tensor,
    topk_ids: torch.Tensor,
    topk_weights: torch.Tensor,
    gate: ExpertMatrices | None,
    up: ExpertMatrices,
    down: ExpertMatrices,
    *,
    precisions: Sequence[str],
    output_dtype: torch.dtype = torch.bfloat16,
    **options: Unpack[LayerOptions],
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Returns the output and bounds by precision; see `experts_forward_with_bound`."""
    for precision in precisions:
        check_precision(precision)
    if output_dtype not in _UNIT_ROUNDOFF:
        known = " or ".join(map(dtype_name, _UNIT_ROUNDOFF))
        raise ValueError(f"output_dtype: expected {known}, got {dtype_name(output_dtype)}")
    layer = ReferenceLayer(gate, up, down, **options)
    output = torch.zeros(hidden_states.shape, dtype=torch.float64, device="cpu")
    bounds = {precision: torch.zeros_like(output) for precision in precisions}
    for routed in layer.routed(hidden_states, topk_ids, topk_weights, torch.float64):
        expert = _Expert(hidden_states[routed.tokens], routed.expert, layer.activation, _GROUP_SIZE)
        scale = routed.weights.double()[:, None]
        output.index_add_(0, routed.tokens, expert.y * scale)
        for precision, bound in bounds.items():
            dy = _bound_of(expert, resolve_precision(precision, hidden_states.dtype))
            # The product with the routing weight and the sum over experts round in float32.
            bound.index_add_(0, routed.tokens, (dy + 8 * _U32 * expert.y.abs()) * scale.abs())
    limits = torch.finfo(output_dtype)
    subnormal = limits.smallest_normal * limits.eps / 2  # half the spacing near zero
    for bound in bounds.values():
        bound += _UNIT_ROUNDOFF[output_dtype] * (output.abs() + bound) + subnormal
    return output, bounds


@with_old_arguments("compute", "swiglu")
def error_bound(
    hidden_states: torch.Tensor,
    topk_ids: torch.Tensor,
    topk_weights: torch.Tensor,
    gate: ExpertMatrices | None,
    up: ExpertMatrices,
    down: ExpertMatrices,
    *,
    precision: str = PRECISIONS[0],
    output_dtype: torch.dtype = torch.bfloat16,
    **options: Unpack[LayerOptions],
) -> torch.Tensor:
    """Returns only the bound of `experts_forward_with_bound`, float64 ``[tokens, hidden]``."""
    matrices = (gate, up, down)
    return experts_forward_with_bound(
        hidden_states,
        topk_ids,
        topk_weights,
        *matrices,
        precision=precision,
        output_dtype=output_dtype,
        **options,
    )[1]


class _Magnitudes:
    """A matrix' magnitudes, normalized so that extreme scales neither overflow nor underflow.

    They are float32, which is twice as fast as float64 and precise enough for a bound.
    """

    def __init__(self, weight: torch.Tensor) -> None:
        self._greatest = weight.abs().amax().clamp_min(_TINY)
        first = (weight / self._greatest).float().abs()
        self._powers = {1: first, 2: first.square()}

    def product(self, x: torch.Tensor, power: int) -> torch.Tensor:
        """``(sum_k (|w| |x|)^power)^(1/power)``, ``[tokens, N]``; power is 1 or 2."""
        greatest = x.abs().amax().clamp_min(_TINY)
        x_power = (x / greatest).float().abs().pow(power)
        total: torch.Tensor = (x_power @ self._powers[power].T).double()
        return total.pow(1 / power) * (greatest * self._greatest * 1.001)


class _Expert:
    """An expert's float64 results for its tokens x, and what bounds of all precisions need."""

    def __init__(
        self, x: torch.Tensor, dense: DenseExpert, activation: GLU, group_size: int
    ) -> None:
        self.x, self.dense, self.activation, self.group_size = x, dense, activation, group_size
        self.gate, self.up, self.down = (_Magnitudes(w) for w in (dense.gate, dense.up, dense.down))
        self.y = dense.output(activation(*dense.gate_up(x.double())))

    def intermediate(
        self, x: torch.Tensor, *, two_digits: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns h of a rounded x, and a bound on the error of float32 arithmetic."""
        gate, up = self.dense.gate_up(x)
        h = self.activation(gate, up)
        rounding = _in_integers(x, self.group_size, two_digits=two_digits) - x
        d_gate = _accumulation_error(x, self.gate, gate, self.dense.gate_bias)
        d_gate = d_gate + (rounding @ self.dense.gate.double().T).abs()
        d_up = _accumulation_error(x, self.up, up, self.dense.up_bias)
        d_up = d_up + (rounding @ self.dense.up.double().T).abs()
        propagated = _activation_error(gate, up, d_gate, d_up, self.activation)
        relative = _ACTIVATION_EPS if self.activation.up_cap is None else _SOFTCAPPED_EPS
        return h, propagated + relative * h.abs() + _TINY

    def output(self, h: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns y of a rounded h, and a bound on the error of float32 arithmetic."""
        y = self.dense.output(h)
        error = _accumulation_error(h, self.down, y, self.dense.down_bias)
        return y, error + self.down.product(_greatest_rounding(h, self.group_size), 1)


def _bound_of(expert: _Expert, precision: str) -> torch.Tensor:
    """The bound of steps 1 to 3 for a resolved precision, before the routing weight."""
    if precision == "int8":
        return torch.maximum(_bf16_bound(expert, two_digits=False), _int8_bound(expert))
    if precision == "bf16":
        return _bf16_bound(expert, two_digits=expert.x.dtype == torch.bfloat16)
    return _fp32_bound(expert)


def _fp32_bound(expert: _Expert) -> torch.Tensor:
    h, d_h = expert.intermediate(expert.x.double(), two_digits=False)
    return expert.down.product(d_h, 1) + expert.output(h)[1]


def _bf16_bound(expert: _Expert, *, two_digits: bool) -> torch.Tensor:
    h, d_h = expert.intermediate(expert.x.bfloat16().double(), two_digits=two_digits)
    y, accumulated = expert.output(h.bfloat16().double())
    rounding = _UBF16 * h.abs()
    if two_digits:
        integers = _in_integers(h, expert.group_size, two_digits=True)
        accumulated = accumulated + ((integers - h) @ expert.dense.down.double().T).abs()
        spread = _greatest_rounding_to_two_digits(h, expert.group_size)
        rounding = torch.maximum(rounding, spread)
    random = min(_LAMBDA, math.sqrt(h.shape[-1])) * expert.down.product(rounding, 2)
    propagated = expert.down.product(d_h, 1)
    return (y - expert.y).abs() + random + propagated + accumulated


def _int8_bound(expert: _Expert) -> torch.Tensor:
    """The greater of the bounds for the two ways to round ties."""
    group_size = expert.group_size
    ways = [quantize_activations(expert.x, group_size=group_size, fused=f) for f in (False, True)]
    x = torch.cat([dequantize_activations(*way, group_size=group_size) for way in ways])
    h, d_h = expert.intermediate(x, two_digits=False)
    codes, scales = quantize_activations(h.float(), group_size=group_size)
    y, accumulated = expert.output(dequantize_activations(codes, scales, group_size=group_size))
    moved = expert.down.product(_rounding_change(h, d_h, codes, scales, group_size), 1)
    bound = (y - torch.cat([expert.y] * len(ways))).abs() + moved + accumulated
    return torch.stack(bound.chunk(len(ways))).amax(0)


def _rounding_change(
    h: torch.Tensor,
    d_h: torch.Tensor,
    codes: torch.Tensor,
    scales: torch.Tensor,
    group_size: int,
) -> torch.Tensor:
    """How far Q(h) may be from the value of codes and scales if h itself is off by d_h."""
    k = h.shape[-1]
    h, d_h, codes = (in_groups(t.double(), group_size) for t in (h, d_h, codes))
    greatest, change = h.abs().amax(-1, keepdim=True), d_h.amax(-1, keepdim=True)
    known = (codes * scales.double().unsqueeze(-1) - h).abs()
    worst = known + d_h + (greatest + change) * (1.001 / 254) + LEAST_MAGNITUDE
    least = greatest - change
    shift = GREATEST_CODE * (d_h + h.abs() / greatest * change) / least + 2.0**-15
    distance = (h * (GREATEST_CODE / greatest) - codes).abs()
    steps = (distance + shift + 0.5).floor()
    worth = (greatest + change) / GREATEST_CODE
    moved = steps * worth + codes.abs() * (change + 4 * _U32 * greatest) / GREATEST_CODE
    # If not steady, the group may count as zero, or its greatest magnitude is too uncertain.
    steady = (least > greatest / 2) & (least >= LEAST_MAGNITUDE)
    return torch.where(steady, torch.minimum(moved, worst), worst).flatten(-2)[..., :k]


def _accumulation_error(
    x: torch.Tensor, weight: _Magnitudes, y: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    k = x.shape[-1]
    size = y.abs() + 3 * weight.product(x, 2)
    if bias is not None:
        size = size + 2 * bias.abs()
    flushed = _TINY * (1 + x.abs().sum(-1, keepdim=True))
    relative = min(_LAMBDA, math.sqrt(k)) * math.sqrt(k) * _U32
    return size * relative + flushed


def _in_integers(x: torch.Tensor, group_size: int, *, two_digits: bool) -> torch.Tensor:
    """Returns x as kernels may hold it: multiples of 2^-13 or 2^-20 of the power of two above."""
    greatest = _group_greatest(x, group_size)
    power = power_of_two(torch.frexp(greatest).exponent)
    units = [(power * 2.0**-bits).clamp_min(_LEAST_UNIT) for bits in (_TWO_DIGITS, _THREE_DIGITS)]
    two, three = (torch.round(x / unit) * unit for unit in units)
    if not two_digits:
        return three
    few = ~_has_outlier(two, group_size, _OTHERS_TO_GREATEST) & (greatest >= _LEAST_OF_TWO_DIGITS)
    return torch.where(few, two, three)


def _has_outlier(x: torch.Tensor, group_size: int, others: float) -> torch.Tensor:
    """Whether an element's group has others that sum to less than `others` times its greatest."""
    groups = in_groups(x.abs(), group_size)
    greatest, total = (f(-1, keepdim=True) for f in (groups.amax, groups.sum))
    return _of_each(total - greatest < others * greatest, x, group_size)


def _greatest_rounding(x: torch.Tensor, group_size: int) -> torch.Tensor:
    """Returns how far any x may be from its value in three digits."""
    return (_group_greatest(x, group_size) * 2.0**-_THREE_DIGITS).clamp_min(_LEAST_UNIT)


def _greatest_rounding_to_two_digits(x: torch.Tensor, group_size: int) -> torch.Tensor:
    """Returns how far x may be from its value in two digits; zero in groups with an outlier."""
    # 1.01, because the kernel's x is slightly different.
    greatest = 1.01 * _group_greatest(x, group_size)
    half_unit = power_of_two(torch.frexp(greatest).exponent - _TWO_DIGITS - 1)
    return torch.where(_has_outlier(x, group_size, 0.98 * _OTHERS_TO_GREATEST), 0.0, half_unit)


def _group_greatest(x: torch.Tensor, group_size: int) -> torch.Tensor:
    """The greatest magnitude of each element's group."""
    return _of_each(in_groups(x.abs(), group_size).amax(-1, keepdim=True), x, group_size)


def _of_each(of_group: torch.Tensor, x: torch.Tensor, group_size: int) -> torch.Tensor:
    """Returns what belongs to the groups of x, ``[..., groups, 1]``, for each element of x."""
    return of_group.repeat_interleave(group_size, -1).flatten(-2)[..., : x.shape[-1]]


def _activation_error(
    gate: torch.Tensor,
    up: torch.Tensor,
    d_gate: torch.Tensor,
    d_up: torch.Tensor,
    activation: GLU,
) -> torch.Tensor:
    gate, up = activation.clamp(gate, up)
    if not activation.gated:
        return activation.gate_error(up, d_up)
    d_activated = activation.gate_error(gate, d_gate)
    # The slope of a soft cap is at most 1.
    return (activation.up(up).abs() + d_up) * d_activated + activation.gate(gate).abs() * d_up
