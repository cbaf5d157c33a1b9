"""The reference in PyTorch: dequantizes weights, runs routed experts, bounds a kernel's error.

The code is slow and plain on purpose. It dequantizes one expert at a time, so that it needs memory
for one expert, whatever the checkpoint's size.
"""

from __future__ import annotations

import torch
from typing_extensions import Unpack

from cpumoe._base.renamed import with_old_arguments
from cpumoe.numerics.activations import dequantize_activations, quantize_activations
from cpumoe.numerics.bounds import (
    error_bound,
    experts_forward_with_bound,
    experts_forward_with_bounds,
)
from cpumoe.numerics.reference_layer import (
    ExpertBiases,
    ExpertMatrices,
    LayerOptions,
    ReferenceLayer,
    dequantize,
)

__all__ = [
    "ExpertBiases",
    "ExpertMatrices",
    "LayerOptions",
    "dequantize",
    "dequantize_activations",
    "error_bound",
    "experts_forward",
    "experts_forward_with_bound",
    "experts_forward_with_bounds",
    "quantize_activations",
]


@with_old_arguments("swiglu")
@torch.autocast("cpu", enabled=False)  # type: ignore[untyped-decorator]
def experts_forward(
    hidden_states: torch.Tensor,
    topk_ids: torch.Tensor,
    topk_weights: torch.Tensor,
    gate: ExpertMatrices | None,
    up: ExpertMatrices,
    down: ExpertMatrices,
    *,
    dtype: torch.dtype = torch.float64,
    **options: Unpack[LayerOptions],
) -> torch.Tensor:
    """Returns ``sum_e w_e * (down_e h_e + down_bias_e)`` ``[tokens, hidden]`` in `dtype`.

    ``h_e = activation(gate_e x + gate_bias_e, up_e x + up_bias_e)``. Nothing is rounded below
    `dtype`.

    Args:
        hidden_states: float ``[tokens, hidden]``.
        topk_ids: int32/int64 ``[tokens, top_k]``. The ids -1 and num_experts are skipped.
        topk_weights: float ``[tokens, top_k]``.
        gate: ``[intermediate, hidden]`` per expert: dense float, or `QuantizedMatrix`. None for
            experts without gate projections, with ``activation=GLU(..., gated=False)``.
        up: as `gate`.
        down: ``[hidden, intermediate]`` per expert, dense or quantized as `gate`.
        dtype: dtype of all arithmetic.
        options: format, activation, biases and expert_mask; see `LayerOptions`.

    Raises:
        IndexError: an id is below -1 or above num_experts.
        TypeError: `gate` is None, and `activation` needs it.
        ValueError: shapes do not fit together, or quantized weights come without a format.
    """
    layer = ReferenceLayer(gate, up, down, **options)
    output = torch.zeros(hidden_states.shape, dtype=dtype, device="cpu")
    for routed in layer.routed(hidden_states, topk_ids, topk_weights, dtype):
        h = layer.activation(*routed.expert.gate_up(hidden_states[routed.tokens].to(dtype)))
        y = routed.expert.output(h) * routed.weights.to(dtype)[:, None]
        output.index_add_(0, routed.tokens, y)
    return output
