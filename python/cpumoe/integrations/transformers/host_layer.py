"""A tiny layer through transformers' own class of experts."""

from __future__ import annotations

from typing import Any

import torch

from cpumoe.integrations.host_check import TOP_K, Answer, TinyLayer
from cpumoe.integrations.transformers.in_memory import packed_experts

_IMPLEMENTATION = "cpumoe"


def compute(layer: TinyLayer) -> Answer:
    """Computes the layer with ``experts_implementation="cpumoe"``.

    Raises:
        RuntimeError: the result is wrong, or cpumoe did not compute it.
    """
    from transformers import Qwen3MoeConfig
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

    config: Any = Qwen3MoeConfig(
        hidden_size=layer.hidden,
        moe_intermediate_size=layer.intermediate,
        num_experts=len(layer.experts),
        num_experts_per_tok=TOP_K,
    )
    config._experts_implementation = _IMPLEMENTATION
    module: Any = Qwen3MoeExperts(config).eval()
    gate_up = torch.cat([layer.dense("gate"), layer.dense("up")], dim=1)
    module.gate_up_proj = torch.nn.Parameter(gate_up, requires_grad=False)
    module.down_proj = torch.nn.Parameter(layer.dense("down"), requires_grad=False)
    layer.verify(
        module(layer.hidden_states, layer.topk_ids, layer.topk_weights.bfloat16()), limited=False
    )
    experts = packed_experts(module)
    if experts is None:
        raise RuntimeError("transformers computed the layer without cpumoe")
    name = f"{Qwen3MoeExperts.__module__}.{Qwen3MoeExperts.__qualname__}"
    return Answer(f'experts_implementation="{_IMPLEMENTATION}"', name, experts.isa)
