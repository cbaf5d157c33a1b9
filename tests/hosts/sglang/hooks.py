"""Checks that cpumoe's plugin reaches the classes of an installed SGLang 0.5.23.

python hooks.py MODEL EXPERTS    two folders that engine.py wrote; prints a line per case

SGLang finds the plugin by its metadata, as in a server, and makes layers of its own class.
"""

import sys
from contextlib import nullcontext

import torch
from cases import run

SCALING = 1.5
LIMIT = 10.0


def main(model, experts):
    start(model, experts)
    cases = (
        module_is_found,
        layers_state_their_limit,
        gpu_does_not_scale,
        routing_does_not_scale,
        draft_layers_stay_on_the_gpu,
        cpu_has_all_experts_unless_told,
    )
    return run({f"plugin: {case.__name__.replace('_', ' ')}": case for case in cases})


def module_is_found():
    from sglang.srt.layers.moe import kt_ep_wrapper
    from sglang.srt.layers.moe.fused_moe_triton import layer

    from cpumoe.integrations.sglang.kt_kernel import KTMoEWrapper

    assert kt_ep_wrapper.KTRANSFORMERS_AVAILABLE
    assert kt_ep_wrapper.KTMoEWrapper is KTMoEWrapper
    hooked = kt_ep_wrapper.create_kt_config_from_server_args
    assert layer.create_kt_config_from_server_args is hooked


def layers_state_their_limit():
    wrapper = make_layer().quant_method.wrapper
    assert wrapper._activation.limit == LIMIT


def gpu_does_not_scale():
    layer = make_layer()
    assert layer.moe_runner_config.routed_scaling_factor is None
    assert layer.quant_method.gpu_method.runner.config.routed_scaling_factor is None


def routing_does_not_scale():
    layer = make_layer()
    assert layer.quant_method.gpu_method.fuse_routed_scaling_factor_in_topk
    assert not layer.should_fuse_routed_scaling_factor_in_topk
    assert make_layer(draft=True).should_fuse_routed_scaling_factor_in_topk


def draft_layers_stay_on_the_gpu():
    assert type(make_layer().quant_method).__name__ == "KTEPWrapperMethod"
    assert type(make_layer(draft=True).quant_method).__name__ == "Mxfp4MarlinMoEMethod"


def cpu_has_all_experts_unless_told():
    from sglang.srt.runtime_context import get_exec

    with get_exec().moe.override(kt_num_gpu_experts=None):
        assert make_layer().quant_method.num_gpu_experts == 0


def start(model, experts):
    """Does what SGLang's scheduler does before it makes a model."""
    from sglang.srt.plugins import load_plugins

    load_plugins()
    from sglang.srt.layers.moe import initialize_moe_config
    from sglang.srt.runtime_context import get_parallel, publish
    from sglang.srt.server_args import ServerArgs

    args = ServerArgs(
        model_path=model,
        device="cpu",
        attention_backend="torch_native",
        kt_weight_path=experts,
        kt_method="MXFP4",
        kt_num_gpu_experts=3,
        kt_cpuinfer=1,
        kt_threadpool_count=1,
    )
    publish(args, role="scheduler")
    initialize_moe_config()
    get_parallel().override_permanently(
        tp_size=1, tp_rank=0, moe_ep_size=1, moe_ep_rank=0, moe_tp_size=1, moe_tp_rank=0
    )


def make_layer(draft=False):
    """Makes SGLang's layer of experts as its DeepSeek-V4 does."""
    from sglang.srt.layers.moe.fused_moe_triton.layer import FusedMoE
    from sglang.srt.layers.moe.utils import draft_model_build_scope
    from sglang.srt.layers.quantization.mxfp4_marlin_moe import Mxfp4MarlinMoEMethod

    with draft_model_build_scope() if draft else nullcontext():
        return FusedMoE(
            num_experts=8,
            hidden_size=256,
            intermediate_size=128,
            layer_id=1,
            top_k=2,
            params_dtype=torch.bfloat16,
            routed_scaling_factor=SCALING,
            swiglu_limit=LIMIT,
            quant_method=Mxfp4MarlinMoEMethod(None, ""),
        )


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
