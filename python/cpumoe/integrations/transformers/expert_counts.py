"""How often tokens have used each expert of a model."""

from __future__ import annotations

import torch
from torch import nn

from cpumoe.checkpoint.reader import VISION_EXPERTS
from cpumoe.integrations.transformers.experts_module import CpuExperts


def expert_counts(model: nn.Module) -> torch.Tensor:
    """Returns how often tokens have used each expert since it was packed.

    Experts for the tokens of images do not count.

    Args:
        model: a transformers model whose experts cpumoe computes.

    Returns:
        int64 ``[layers, experts]``, with a row of zeros for a layer without routed experts.

    Raises:
        ValueError: cpumoe computes no experts of the model.
    """
    used = {
        module.layer: module.experts.statistics().expert_tokens
        for name, module in model.named_modules()
        if isinstance(module, CpuExperts)
        and module.experts is not None
        and VISION_EXPERTS not in f".{name}."
    }
    if not used:
        raise ValueError("model: expected experts that cpumoe computes, got none")
    layers = max(int(model.config.get_text_config().num_hidden_layers), max(used) + 1)  # type: ignore[operator, union-attr]
    experts = max(map(len, used.values()))
    counts = torch.zeros((layers, experts), dtype=torch.int64, device="cpu")
    for layer, tokens in used.items():
        counts[layer, : len(tokens)] = tokens
    return counts
