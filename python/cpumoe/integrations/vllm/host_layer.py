"""A tiny layer through vLLM's own class of routed experts."""

from __future__ import annotations

import tempfile
from typing import Any

import torch
from vllm import envs
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.distributed import init_distributed_environment, initialize_model_parallel
from vllm.forward_context import set_forward_context
from vllm.model_executor.layers.fused_moe.layer import FusedMoEFactory
from vllm.model_executor.layers.quantization import get_quantization_config
from vllm.plugins import load_general_plugins

from cpumoe.integrations import vllm as plugin
from cpumoe.integrations.host_check import TOP_K, Answer, InactiveError, TinyLayer

_FORMAT = "mxfp4"


def compute(layer: TinyLayer) -> Answer:
    """Computes the layer as a worker of vLLM does.

    Raises:
        InactiveError: vLLM has not loaded cpumoe's plugin, or the plugin leaves vLLM as it is.
        RuntimeError: the result is wrong.
    """
    load_general_plugins()
    made: Any = get_quantization_config(_FORMAT)
    if not made.__module__.startswith("cpumoe."):
        raise InactiveError(plugin.inactive() or _not_loaded())
    config = VllmConfig()
    with tempfile.TemporaryDirectory() as folder, set_current_vllm_config(config):
        init_distributed_environment(1, 0, f"file://{folder}/ranks", 0, "gloo")
        initialize_model_parallel(backend="gloo")
        experts: Any = FusedMoEFactory(
            num_experts=len(layer.experts),
            top_k=TOP_K,
            hidden_size=layer.hidden,
            intermediate_size=layer.intermediate,
            params_dtype=torch.bfloat16,
            swiglu_limit=layer.activation.limit,
            quant_config=made(),
            prefix="model.layers.0.mlp.experts",
        ).routed_experts
        _load(experts, layer)
        with set_forward_context(None, config):
            output = experts.forward_modular(
                layer.hidden_states, layer.topk_weights, layer.topk_ids.int()
            )
    layer.verify(output)
    kind = type(experts)
    isa = experts.quant_method.experts.isa
    return Answer("plugin cpumoe", f"{kind.__module__}.{kind.__qualname__}", isa)


def _load(experts: Any, layer: TinyLayer) -> None:
    """Loads the weights as vLLM's loader does."""
    for index, expert in enumerate(layer.experts):
        for shard, matrix in (("w1", expert.gate), ("w2", expert.down), ("w3", expert.up)):
            for name, tensor in (("weight", matrix.codes), ("weight_scale", matrix.scales)):
                full = f"{'w2' if shard == 'w2' else 'w13'}_{name}"
                parameter = getattr(experts, full)
                parameter.weight_loader(
                    parameter, tensor, full, shard_id=shard, expert_id=index, return_success=True
                )
    experts.quant_method.process_weights_after_loading(experts)


def _not_loaded() -> str:
    if envs.VLLM_PLUGINS is not None and "cpumoe" not in envs.VLLM_PLUGINS:
        return f"VLLM_PLUGINS={','.join(envs.VLLM_PLUGINS)} does not name cpumoe"
    return "vLLM found no plugin cpumoe; install cpumoe where vLLM is installed"
