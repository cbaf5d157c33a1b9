"""The class that vLLM asks for weights and results of a layer's routed experts."""

from __future__ import annotations

from typing import Any

import torch
from vllm.config import get_current_vllm_config
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.fused_moe.config import FUSED_MOE_UNQUANTIZED_CONFIG
from vllm.model_executor.layers.fused_moe.fused_moe_method_base import FusedMoEMethodBase

from cpumoe._base.operators import define
from cpumoe.experts import Experts
from cpumoe.integrations.vllm.decision import Decision
from cpumoe.integrations.vllm.loading import ArrivingExperts


class CpumoeExpertsMethod(FusedMoEMethodBase):
    """Loads a layer's routed experts into cpumoe, and computes them there.

    Attributes:
        experts: the packed experts; None before they are loaded.
        weight_dtype: vLLM's name of the weights' form, for models that ask.
    """

    def __init__(self, moe: Any, decided: Decision) -> None:
        """Makes a method for one layer."""
        super().__init__(moe)
        self._form, self._activation, self._settings = decided
        self.weight_dtype = self._form.vllm_name
        self.experts: Experts | None = None
        self._arriving: ArrivingExperts | None = None
        self._key = ""

    @property
    def is_monolithic(self) -> bool:
        """Returns that vLLM chooses each token's experts."""
        return False

    def maybe_roundup_sizes(
        self,
        hidden_size: int,
        intermediate_size_per_partition: int,
        act_dtype: torch.dtype,
        moe_parallel_config: Any,
    ) -> tuple[int, int]:
        """Returns the sizes that vLLM's tensors have."""
        hidden, intermediate = super().maybe_roundup_sizes(
            hidden_size=hidden_size,
            intermediate_size_per_partition=intermediate_size_per_partition,
            act_dtype=act_dtype,
            moe_parallel_config=moe_parallel_config,
        )
        return hidden, self._form.padded(intermediate, moe_parallel_config.tp_size)

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
        self._arriving = ArrivingExperts(
            self._form,
            name=layer.layer_name,
            num_experts=num_experts,
            hidden_size=hidden_size,
            intermediate_size=intermediate_size_per_partition,
            activation=self._activation,
            has_bias=bool(self.moe.has_bias),
            model_dtype=params_dtype,
            options=self._settings.options,
        )
        original = extra_weight_attrs.pop("weight_loader")
        local = layer._map_global_expert_id_to_local_expert_id
        for name, parameter in self._arriving.parameters.items():
            layer.register_parameter(name, parameter)
            loading = self._arriving.loading(name)
            attributes = {**extra_weight_attrs, "is_transposed": False}
            if loading:
                attributes["quant_method"] = loading
            attributes["weight_loader"] = self._arriving.loader(name, original, local)
            for attribute, value in attributes.items():
                setattr(parameter, attribute, value)
        # Compiled code finds the layer by this name, as it finds vLLM's own layers.
        self._key = f"cpumoe.{layer.layer_name}"
        get_current_vllm_config().compilation_config.static_forward_context[self._key] = self

    def process_weights_after_loading(self, layer: Any) -> None:
        """Packs what is not packed yet, and removes vLLM's tensors."""
        if self._arriving is None:  # vLLM calls again after it has loaded adapters
            return
        self.experts = self._arriving.finish()
        for name in self._arriving.parameters:
            delattr(layer, name)
        self._arriving = None

    def get_fused_moe_quant_config(self, layer: Any) -> Any:
        """Returns a configuration that says nothing, because vLLM's kernels are not used."""
        return FUSED_MOE_UNQUANTIZED_CONFIG

    def apply(
        self,
        layer: Any,
        x: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        shared_experts: Any,
        shared_experts_input: torch.Tensor | None,
    ) -> torch.Tensor:
        """Returns the weighted sums of the experts in this process, ``[tokens, hidden]``."""
        result: torch.Tensor = torch.ops.cpumoe.vllm_experts(
            x, topk_ids, topk_weights, layer.expert_map, self._key
        )
        return result


class ModelOptCpumoeExpertsMethod(CpumoeExpertsMethod):
    """As the base class, for ModelOpt's names. vLLM's loader looks for "ModelOpt" in the name."""

    def uses_weight_scale_2_pattern(self) -> bool:
        """Returns that the factors of matrices are called ``weight_scale_2``."""
        return True


def _compute(
    x: torch.Tensor,
    topk_ids: torch.Tensor,
    topk_weights: torch.Tensor,
    expert_map: torch.Tensor | None,
    key: str,
) -> torch.Tensor:
    method = get_forward_context().no_compile_layers[key]
    ids = topk_ids
    if expert_map is not None:  # from experts of the model to those of this process, others are -1
        ids = torch.where(ids < 0, -1, expert_map[ids.clamp(min=0).long()].to(ids.dtype))
    with torch.no_grad():
        result: torch.Tensor = method.experts(x, ids, topk_weights)
    return result


def _fake(
    x: torch.Tensor,
    topk_ids: torch.Tensor,
    topk_weights: torch.Tensor,
    expert_map: torch.Tensor | None,
    key: str,
) -> torch.Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


_LIBRARY = define(
    "vllm_experts(Tensor x, Tensor topk_ids, Tensor topk_weights, Tensor? expert_map, str key) "
    "-> Tensor",
    _compute,
    _fake,
)
