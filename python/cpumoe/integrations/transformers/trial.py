"""Tries a model once, to see what it uses."""

from __future__ import annotations

from typing import Any

import torch

from cpumoe.integrations.transformers.experts_module import CpuExperts


def let_model_write(model: Any) -> None:
    """Lets a model read two tokens, and write two if it can, with the host's own loop and cache.

    The model is in evaluation mode meanwhile. Its experts compute and count nothing.
    """
    training = {module: module.training for module in model.modules()}
    experts = [module for module in training if isinstance(module, CpuExperts)]
    for each in experts:
        each.idle = True
    model.eval()
    ids = torch.zeros(1, 2, dtype=torch.int64, device="cpu")
    try:
        with torch.inference_mode():
            if not hasattr(model, "can_generate") or not model.can_generate():
                model(input_ids=ids)
                return
            model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=2,
                min_new_tokens=2,
                do_sample=False,
                pad_token_id=0,
            )
    finally:
        for each in experts:
            each.idle = False
        for module, was in training.items():
            module.training = was
