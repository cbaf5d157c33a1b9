"""DeepSeek-V4's routers in fp32."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import nn

_ROUTERS = frozenset({"DeepseekV4TopKRouter", "DeepseekV4HashRouter"})


def use_fp32_routers(model: nn.Module) -> int:
    """Makes DeepSeek-V4's routers compute in fp32, and returns their number.

    The reference implementation computes them in fp32, but transformers 5.24 uses the model's
    dtype. This function keeps transformers' class and code. It converts the routers' weights and
    their incoming hidden states to fp32. Models of other families are not changed.
    """
    routers = [module for module in model.modules() if type(module).__name__ in _ROUTERS]
    for router in routers:
        router.float()
        router.register_forward_pre_hook(_as_fp32)
    return len(routers)


def _as_fp32(router: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    if cast("torch.Tensor", router.weight).dtype != torch.float32:  # model.to(dtype) came between
        router.float()
    return tuple(
        arg.float() if isinstance(arg, torch.Tensor) and arg.is_floating_point() else arg
        for arg in args
    )
