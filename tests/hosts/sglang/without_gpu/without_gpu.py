"""A plugin for SGLang that makes its wrapper of experts on the CPU run without a GPU."""

from types import SimpleNamespace

import torch


def register():
    # The wrapper waits for the GPU and asks for its stream. cpumoe takes 0 as "no stream".
    torch.cuda.synchronize = lambda device=None: None
    torch.cuda.current_stream = lambda device=None: SimpleNamespace(cuda_stream=0)
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    target = "sglang.srt.layers.moe.fused_moe_native.moe_forward_native"
    HookRegistry.register(target, skip_masked, HookType.AROUND)


def skip_masked(original, layer, x, topk_output, config):
    """Makes SGLang's own computation skip the id -1, as its kernels for GPUs do.

    The wrapper gives that id to the experts that the CPU has.
    """
    ids, weights = topk_output.topk_ids, topk_output.topk_weights
    if bool((ids >= 0).all()):
        return original(layer, x, topk_output, config)
    tokens, slots = torch.where(ids >= 0)
    result = torch.zeros_like(x)
    if len(tokens):
        pairs = topk_output._replace(
            topk_ids=ids[tokens, slots, None], topk_weights=weights[tokens, slots, None]
        )
        result.index_add_(0, tokens, original(layer, x[tokens], pairs, config))
    return result
