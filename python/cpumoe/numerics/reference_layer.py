"""A layer for the reference: dequantizes experts one by one, and groups tokens by expert."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from typing_extensions import TypedDict

from cpumoe._base.tensors import describe
from cpumoe.formats import QuantizedMatrix, WeightFormat, weight_format
from cpumoe.numerics.glu import GLU, SwiGLU

# A stack [experts, N, K] (dense or quantized), or a sequence of one matrix [N, K] per expert. Only
# experts that get a token are accessed, so that a sequence may read lazily.
ExpertMatrices = torch.Tensor | QuantizedMatrix | Sequence[torch.Tensor] | Sequence[QuantizedMatrix]
# [experts, N], or one [N] per expert.
ExpertBiases = torch.Tensor | Sequence[torch.Tensor | None] | None

_PLAIN: GLU = SwiGLU()
_BIASES = ("gate_bias", "up_bias", "down_bias")


class LayerOptions(TypedDict, total=False):
    """A layer's options for the reference's functions, besides its matrices. All are optional.

    Attributes:
        format: the weight format of `QuantizedMatrix` weights; None for dense ones.
        activation: the activation; default: plain ``silu(g) * u``.
        gate_bias: ``[intermediate]`` per expert, or None.
        up_bias: as `gate_bias`.
        down_bias: ``[hidden]`` per expert, or None.
        expert_mask: bool ``[experts]``, True = skipped, or None.
    """

    format: str | WeightFormat | None
    activation: GLU
    gate_bias: ExpertBiases
    up_bias: ExpertBiases
    down_bias: ExpertBiases
    expert_mask: torch.Tensor | None


@dataclass(frozen=True)
class DenseExpert:
    """One expert's matrices and biases."""

    gate: torch.Tensor
    up: torch.Tensor
    down: torch.Tensor
    gate_bias: torch.Tensor | None
    up_bias: torch.Tensor | None
    down_bias: torch.Tensor | None

    def gate_up(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns both projections of x, ``[tokens, intermediate]``."""
        return _linear(x, self.gate, self.gate_bias), _linear(x, self.up, self.up_bias)

    def output(self, h: torch.Tensor) -> torch.Tensor:
        """Returns the down projection of h, ``[tokens, hidden]``."""
        return _linear(h, self.down, self.down_bias)


@dataclass(frozen=True)
class Routed:
    """One expert and the tokens that are routed to it.

    Attributes:
        expert: the expert.
        tokens: int64 indices of the tokens. A token appears as often as it names the expert.
        weights: the tokens' routing weights for this expert.
    """

    expert: DenseExpert
    tokens: torch.Tensor
    weights: torch.Tensor


@dataclass(frozen=True)
class ReferenceLayer:
    """A layer's matrices and options; see `LayerOptions`. Without a gate, `up` takes its place."""

    gate: ExpertMatrices | None
    up: ExpertMatrices
    down: ExpertMatrices
    format: str | WeightFormat | None = None
    activation: GLU = _PLAIN
    gate_bias: ExpertBiases = None
    up_bias: ExpertBiases = None
    down_bias: ExpertBiases = None
    expert_mask: torch.Tensor | None = None

    def __post_init__(self) -> None:
        """Refuses stacks of different lengths, and a gate that is missing."""
        if self.gate is None and self.activation.gated:
            raise TypeError(
                "gate: expected the gate projections, got None; pass them, or "
                "activation=GLU(..., gated=False) for experts that have none"
            )
        counts = [_count(m) for m in (self._gates, self.up, self.down)]
        if len(set(counts)) != 1:
            raise ValueError(f"gate, up, down: expected as many experts each, got {counts}")
        for name in _BIASES:
            stack = getattr(self, name)
            if stack is not None and len(stack) != self.num_experts:
                raise ValueError(f"{name}: expected {self.num_experts} experts, got {len(stack)}")
        mask = self.expert_mask
        if mask is not None and (mask.dtype, *mask.shape) != (torch.bool, self.num_experts):
            raise ValueError(
                f"expert_mask: expected bool [{self.num_experts}], got {describe(mask)}"
            )

    @property
    def num_experts(self) -> int:
        """Experts of the layer."""
        return _count(self.up)

    @property
    def _gates(self) -> ExpertMatrices:
        return self.up if self.gate is None else self.gate

    def routed(
        self,
        hidden_states: torch.Tensor,
        topk_ids: torch.Tensor,
        topk_weights: torch.Tensor,
        dtype: torch.dtype,
    ) -> Iterator[Routed]:
        """Yields each expert that has tokens, in ascending order, with weights in `dtype`."""
        if hidden_states.dim() != 2:
            raise ValueError(
                f"hidden_states: expected [tokens, hidden], got {list(hidden_states.shape)}"
            )
        tokens, num_experts = hidden_states.shape[0], self.num_experts
        shape = topk_ids.shape
        if topk_ids.dim() != 2 or shape[0] != tokens or shape != topk_weights.shape:
            raise ValueError(
                f"topk_ids, topk_weights: expected [{tokens}, top_k] each, got "
                f"{list(shape)}, {list(topk_weights.shape)}"
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
            if self.expert_mask is not None and bool(self.expert_mask[expert]):
                continue
            dense = self._expert(expert, dtype)
            hidden = dense.gate.shape[1]
            if hidden_states.shape[1] != hidden:
                raise ValueError(
                    f"hidden_states: expected [tokens, {hidden}], got {list(hidden_states.shape)}"
                )
            rows, columns = (topk_ids == expert).nonzero(as_tuple=True)
            yield Routed(dense, rows, topk_weights[rows, columns])

    def _expert(self, index: int, dtype: torch.dtype) -> DenseExpert:
        gate, up, down = (self._dense(m[index], dtype) for m in (self._gates, self.up, self.down))
        if gate.shape != up.shape or down.shape != gate.shape[::-1]:
            raise ValueError(
                f"experts.{index}: expected gate and up [I, H] and down [H, I], got "
                f"{list(gate.shape)}, {list(up.shape)}, {list(down.shape)}"
            )
        biases = (
            self._bias(name, index, len(matrix), dtype)
            for name, matrix in zip(_BIASES, (gate, up, down), strict=True)
        )
        return DenseExpert(gate, up, down, *biases)

    def _bias(self, name: str, index: int, rows: int, dtype: torch.dtype) -> torch.Tensor | None:
        stack: ExpertBiases = getattr(self, name)
        bias = None if stack is None else stack[index]
        if bias is None:
            return None
        if tuple(bias.shape) != (rows,):
            raise ValueError(f"experts.{index}: {name}: expected [{rows}], got {list(bias.shape)}")
        return bias.to(dtype)

    def _dense(self, matrix: torch.Tensor | QuantizedMatrix, dtype: torch.dtype) -> torch.Tensor:
        if isinstance(matrix, QuantizedMatrix):
            if self.format is None:
                raise ValueError("format: expected the format of the quantized weights, got None")
            parts = matrix.codes, matrix.scales, self.format
            return dequantize(*parts, dtype, factor=matrix.factor)
        if not matrix.dtype.is_floating_point:
            raise ValueError(f"weights: expected float or QuantizedMatrix, got {describe(matrix)}")
        return matrix.to(dtype)


def dequantize(
    codes: torch.Tensor,
    scales: torch.Tensor | None,
    format: str | WeightFormat,
    dtype: torch.dtype = torch.float64,
    *,
    factor: torch.Tensor | None = None,
) -> torch.Tensor:
    """Returns the weights ``[..., N, K]`` of checkpoint codes and scales, exactly.

    Args:
        codes: a checkpoint's codes (see `WeightFormat.normalize_codes`).
        scales: a checkpoint's scales (see `WeightFormat.normalize_scales`); None: there are none.
        format: a weight format or its name.
        dtype: torch.float32 or torch.float64.
        factor: float32 ``[...]``, which multiplies all weights of a matrix (nvfp4); None: 1.

    Raises:
        TypeError: codes or scales have a dtype that the format does not have.
        ValueError: the format is unknown, the shapes do not fit together, or a scale is NaN.
    """
    fmt = weight_format(format)
    normalized = fmt.normalize_scales(scales, "scales")
    fmt.check_scales(normalized, "scales")
    return fmt.dequantize(fmt.normalize_codes(codes, "codes"), normalized, factor, dtype=dtype)


def _count(matrices: ExpertMatrices) -> int:
    if isinstance(matrices, QuantizedMatrix):
        return matrices.codes.shape[0]
    return len(matrices)


def _linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    y: torch.Tensor = x @ weight.T
    return y if bias is None else y + bias
