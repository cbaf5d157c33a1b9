"""Dense layers whose weights another module uses, too, such as a head tied to the embedding.

Such weights cannot be packed: the other module reads them as PyTorch stores them, and a packed copy
would be a second one in memory. For few tokens, cpumoe computes the product from the weights where
they are. The module keeps its weights. All other calls go to its own code.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from typing_extensions import override

import cpumoe
from cpumoe._base.tensors import dtype_name
from cpumoe._engine.plain_ops import MOST_TOKENS, ROW_DTYPES, row_product
from cpumoe.runtime import default_runtime

_RUNTIME = "_cpumoe_runtime"


class _Runtime:
    """Names threads. Copies of a module share them."""

    def __init__(self, runtime: cpumoe.Runtime | None) -> None:
        self._runtime = runtime

    def __deepcopy__(self, memo: dict[int, Any]) -> _Runtime:
        return self

    def core(self) -> Any:
        return (self._runtime or default_runtime()).core


class SharedLinear(nn.Linear):
    """A dense layer that reads the weights that it shares with another module."""

    @override
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Returns ``[..., out_features]`` for an input ``[..., in_features]``."""
        weight = self.weight
        few = (
            self._parameters["bias"] is None
            and input.dtype == weight.dtype
            and input.dtype in ROW_DTYPES
            and input.shape[-1:] == weight.shape[-1:]
            and input.numel() <= MOST_TOKENS * weight.shape[1]
        )
        if few:
            result = row_product(input, weight, self.__dict__[_RUNTIME].core())
            if result is not None:
                return result
        return super().forward(input)


def compute_in_place(module: nn.Linear, runtime: cpumoe.Runtime | None) -> str:
    """Lets cpumoe compute a module that shares its weights.

    Args:
        module: the module.
        runtime: the threads that compute; None: the shared ones.

    Returns:
        Why the module stays as it is; empty if cpumoe computes it.
    """
    shared = "shares its weights with another module"
    weight = module.weight
    if type(module) not in (nn.Linear, SharedLinear):
        return f"it is a {type(module).__name__} that {shared}"
    if module._parameters["bias"] is not None:
        return f"it has a bias and {shared}"
    if type(weight) is not nn.Parameter or weight.dtype not in ROW_DTYPES or not weight.is_cpu:
        return f"it {shared}, and they are {dtype_name(weight.dtype)} on {weight.device}"
    module.__dict__[_RUNTIME] = _Runtime(runtime)
    module.__class__ = SharedLinear
    return ""
