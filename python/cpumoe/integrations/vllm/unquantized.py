"""vLLM's class of routed experts that are not quantized, with the experts in cpumoe.

vLLM makes this class in place of its own. vLLM passes nothing of the layer but its sizes, so that
an object learns from `create_weights` what else the layer wants.
"""

from __future__ import annotations

from typing import Any

import torch
from vllm.config import get_current_vllm_config
from vllm.model_executor.custom_op import CustomOp, op_registry_oot
from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import (
    UnquantizedFusedMoEMethod,
)

from cpumoe.integrations.vllm import decision, stored
from cpumoe.integrations.vllm.decision import Decision
from cpumoe.integrations.vllm.method import CpumoeExpertsMethod

_NAME = "UnquantizedFusedMoEMethod"


class UnquantizedCpumoeExpertsMethod(CpumoeExpertsMethod, UnquantizedFusedMoEMethod):
    """Experts in bf16 or fp16. An object whose layer is not cpumoe's becomes one of vLLM's."""

    def __init__(self, moe: Any) -> None:
        """Makes a method for one layer."""
        decided = _decide(moe)
        if isinstance(decided, Decision):
            super().__init__(moe, decided)
        else:
            decision.leave(decided)
            self._become_vllms()
            UnquantizedFusedMoEMethod.__init__(self, moe)

    def create_weights(
        self,
        layer: Any,
        num_experts: int,
        hidden_size: int,
        intermediate_size_per_partition: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        """Gives the layer the tensors that vLLM's loader fills."""
        sizes = (num_experts, hidden_size, intermediate_size_per_partition)
        if layer.apply_router_weight_on_input:
            decision.leave(decision.WEIGHTED_INPUT)
            self._become_vllms()
            self.create_weights(layer, *sizes, params_dtype, **extra_weight_attrs)
            return
        decision.take(self._form)
        super().create_weights(layer, *sizes, params_dtype, **extra_weight_attrs)

    def _become_vllms(self) -> None:
        self.__class__ = UnquantizedFusedMoEMethod


def _decide(moe: Any) -> Decision | str:
    if not decision.settings().enabled:
        return decision.DISABLED
    dtype = moe.in_dtype
    if dtype == torch.float32:  # vLLM's weights would be wider than the checkpoint's
        dtype = _checkpoint_dtype()
    form = stored.unquantized(dtype)
    return form if isinstance(form, str) else decision.decide(moe, form)


def _checkpoint_dtype() -> torch.dtype:
    """The dtype that the checkpoint's config states, or fp32."""
    model: Any = get_current_vllm_config().model_config
    for config in (getattr(model, "hf_text_config", None), getattr(model, "hf_config", None)):
        dtype = getattr(config, "dtype", None)
        dtype = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
        if isinstance(dtype, torch.dtype):
            return dtype
    return torch.float32


def register() -> None:
    """Makes vLLM use the class for experts that are not quantized.

    Raises:
        ImportError: another plugin replaces vLLM's class.
    """
    if op_registry_oot.get(_NAME) is UnquantizedCpumoeExpertsMethod:
        return
    if _NAME in op_registry_oot:
        raise ImportError(f"another plugin replaces {_NAME}")
    CustomOp.register_oot(name=_NAME)(UnquantizedCpumoeExpertsMethod)
