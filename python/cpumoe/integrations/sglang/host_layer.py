"""A tiny layer through the module and class by which SGLang computes experts on the CPU."""

from __future__ import annotations

import importlib
from typing import Any

import torch

from cpumoe.integrations.host_check import TOP_K, Answer, InactiveError, TinyLayer
from cpumoe.integrations.sglang.kt_kernel import KTMoEWrapper
from cpumoe.isa import isa

_PLUGINS = "sglang.srt.plugins"
_HOST = "sglang.srt.layers.moe.kt_ep_wrapper"


def compute(layer: TinyLayer) -> Answer:
    """Computes the layer with the wrapper that SGLang found.

    The variables of `cpumoe sglang` must be set, because SGLang finds cpumoe by them.

    Raises:
        InactiveError: SGLang found no wrapper, or another one.
        RuntimeError: the result is wrong.
    """
    plugin = "plugin cpumoe"
    try:
        importlib.import_module(_PLUGINS).load_plugins()
    except ModuleNotFoundError as error:
        if error.name != _PLUGINS:
            raise
        plugin = "kt_kernel on PYTHONPATH"  # sglang-kt has no plugins
    host: Any = importlib.import_module(_HOST)
    if not host.KTRANSFORMERS_AVAILABLE:
        raise InactiveError(
            "SGLang found no module kt_kernel; install cpumoe where SGLang is installed"
        )
    found = host.KTMoEWrapper
    if found is not KTMoEWrapper:
        raise InactiveError(f"SGLang found another kt_kernel: {found.__module__}")
    wrapper = found(
        layer_idx=layer.index,
        num_experts=len(layer.experts),
        num_experts_per_tok=TOP_K,
        hidden_size=layer.hidden,
        moe_intermediate_size=layer.intermediate,
        weight_path=str(layer.folder),
        method="MXFP4",
    )
    wrapper.load_weights(torch.arange(len(layer.experts), device="cpu"))
    wrapper.submit_forward(layer.hidden_states, layer.topk_ids, layer.topk_weights, None)
    layer.verify(wrapper.sync_forward(layer.hidden_states, None))
    return Answer(plugin, f"{_HOST}.KTMoEWrapper", isa())
