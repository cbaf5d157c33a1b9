"""Makes an unmodified SGLang use cpumoe for the experts on the CPU.

SGLang calls `register` in each of its processes, because cpumoe's metadata names it in the group
``sglang.srt.plugins``. `register` does nothing unless the command line has an option ``--kt-...``,
or ``CPUMOE_SGLANG=1`` is set. If one of the two is there, `register` makes cpumoe's module
importable as ``kt_kernel``, and does four more things:

- SGLang's models of DeepSeek, Kimi and GLM multiply the experts' sum by the routed scaling factor.
  SGLang's GPU experts, or the routing before them, multiply by this factor as well. `register`
  leaves the factor to the models.
- SGLang does not tell the module the model's SwiGLU limit and alpha. `register` makes SGLang do so.
- Layers of a draft model, which have numbers of decoder layers, keep their experts on the GPU.
- SGLang fails without ``--kt-num-gpu-experts``. With `register`, the CPU then has all experts.

Written for SGLang 0.5.23. sglang-kt does all this itself, and has no plugins.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cpumoe.integrations.sglang import pythonpath

logger = logging.getLogger(__name__)

MODULE = "kt_kernel"
SWITCH = "CPUMOE_SGLANG"
_OURS = "cpumoe.integrations.sglang.kt_kernel"
_HOST = "sglang.srt.layers.moe.kt_ep_wrapper"
# SGLang's layers hand their experts to this class.
_METHOD = f"{_HOST}.KTEPWrapperMethod"
_LAYER = "sglang.srt.layers.moe.fused_moe_triton.layer.FusedMoE"


def register() -> None:
    """Installs the module and the hooks in this process, if the user asks for them.

    Raises:
        ValueError: ``CPUMOE_SGLANG`` is neither 0 nor 1.
    """
    if not _wanted(sys.argv):
        return
    module = importlib.import_module(_OURS)
    sys.modules[MODULE] = module
    host = sys.modules.get(_HOST)
    if host is not None:  # It was imported before, and found no module.
        host.KTRANSFORMERS_AVAILABLE = True  # type: ignore[attr-defined]
        host.KTMoEWrapper = module.KTMoEWrapper  # type: ignore[attr-defined]
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    for target, hook in (
        (f"{_METHOD}.create_moe_runner", scale_once),
        (f"{_METHOD}.create_weights", tell_swiglu),
        (f"{_LAYER}.__init__", route_unscaled),
        (f"{_HOST}.create_kt_config_from_server_args", layer_settings),
    ):
        HookRegistry.register(target, hook, HookType.AROUND)
    logger.info("cpumoe computes the experts that --kt-... options leave to the CPU")


def scale_once(
    original: Callable[..., object], method: object, /, layer: object, moe_runner_config: Any
) -> object:
    """Leaves the routed scaling factor to the model, which applies it to all experts."""
    # The layer changes this object later, and the runner must see that, so it is not copied.
    moe_runner_config.routed_scaling_factor = None
    return original(method, layer, moe_runner_config)


def tell_swiglu(
    original: Callable[..., object], method: object, /, layer: Any, *args: object, **kwargs: object
) -> object:
    """Tells cpumoe's module the SwiGLU limit and alpha of the layer that is being made."""
    from cpumoe.integrations.sglang.checkpoint import host_swiglu
    from cpumoe.integrations.sglang.checks import number_or_none

    config = getattr(layer, "moe_runner_config", None)
    clamp = getattr(config, "gemm1_clamp_limit", None)
    limit = getattr(config, "swiglu_limit", None) if clamp is None else clamp
    token = host_swiglu.set(
        (
            number_or_none(limit, "swiglu_limit"),
            number_or_none(getattr(config, "gemm1_alpha", None), "gemm1_alpha"),
        )
    )
    try:
        return original(method, layer, *args, **kwargs)
    finally:
        host_swiglu.reset(token)


def route_unscaled(
    original: Callable[..., None], layer: Any, /, *args: object, **kwargs: object
) -> None:
    """Keeps the routed scaling factor out of the weights that the layer's routing computes.

    SGLang's GPU methods for DeepSeek-V4's experts ask for weights that are scaled already. The
    model applies the factor nonetheless, because it recognises SGLang's wrapper.
    """
    original(layer, *args, **kwargs)
    wrapper: type = importlib.import_module(_HOST).KTEPWrapperMethod
    if isinstance(layer.quant_method, wrapper):
        layer.should_fuse_routed_scaling_factor_in_topk = False


def layer_settings(original: Callable[..., Any], server_args: object, layer_idx: int) -> Any:
    """Returns SGLang's settings for a layer; None, which means "all on the GPU", for a draft's."""
    from sglang.srt.runtime_context import get_flags

    if get_flags().moe.in_speculative_scope:
        return None
    settings = original(server_args, layer_idx)
    if settings is not None and settings.num_gpu_experts is None:
        settings.num_gpu_experts = 0
    return settings


def _wanted(arguments: list[str]) -> bool:
    """Whether the user asks for experts on the CPU, and no other module computes them."""
    switch = os.environ.get(SWITCH, "")
    if switch not in ("", "0", "1"):
        raise ValueError(f"{SWITCH}: expected 0 or 1, got {switch!r}")
    if switch:
        return switch == "1"
    if not any(argument.startswith("--kt-") for argument in arguments):
        return False
    if _is_installed():
        logger.info("kt_kernel is installed and is used; %s=1 chooses cpumoe", SWITCH)
        return False
    return True


def _is_installed() -> bool:
    """Whether there is a ``kt_kernel`` that is not cpumoe's."""
    loaded = sys.modules.get(MODULE)
    spec = importlib.util.find_spec(MODULE) if loaded is None else loaded.__spec__
    if spec is None or spec.origin is None:
        return loaded is not None or spec is not None
    folders = Path(spec.origin).resolve().parents
    return spec.name != _OURS and pythonpath().resolve() not in folders
