"""vLLM's classes of quantized checkpoints, with routed experts in cpumoe.

The classes are at the top of the module, because vLLM pickles its configuration for its workers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from vllm.model_executor.layers.fused_moe import RoutedExperts
from vllm.model_executor.layers.quantization import (
    get_quantization_config,
    register_quantization_config,
)
from vllm.model_executor.layers.quantization.utils.quant_utils import is_layer_skipped

from cpumoe.integrations.vllm import decision, stored, unquantized
from cpumoe.integrations.vllm.method import CpumoeExpertsMethod, ModelOptCpumoeExpertsMethod
from cpumoe.integrations.vllm.stored import StoredForm

# How a layer is stored; a reason why cpumoe does not compute it; None: it is not quantized.
_Answer = StoredForm | str | None


class _WithCpumoe:
    """Answers for routed experts that cpumoe can compute, and lets the base class do the rest."""

    method: type[CpumoeExpertsMethod] = CpumoeExpertsMethod

    def stored_form(self, layer: Any, prefix: str) -> _Answer:
        """Returns how the layer's experts are stored."""
        raise NotImplementedError

    def get_quant_method(self, layer: Any, prefix: str) -> Any:
        """Returns cpumoe's method for routed experts, and the base class's for all else."""
        if isinstance(layer, RoutedExperts):
            method = _method(self, layer, prefix)
            if isinstance(method, CpumoeExpertsMethod):
                return method
            if method is not None:
                decision.leave(method)
        return super().get_quant_method(layer, prefix)  # type: ignore[misc]


class _AnyDtype(_WithCpumoe):
    @classmethod
    def get_supported_act_dtypes(cls) -> list[torch.dtype]:
        """Returns the dtypes of hidden states. vLLM's own kernels take bf16 alone."""
        return [torch.bfloat16, torch.float16, torch.float32]


def _method(config: _WithCpumoe, layer: Any, prefix: str) -> CpumoeExpertsMethod | str | None:
    """Returns the method for a layer's experts, or why vLLM computes them, if that needs a word."""
    if not decision.settings().enabled:
        return decision.DISABLED
    form = config.stored_form(layer, prefix)
    if form is None or isinstance(form, str):
        return form
    if layer.apply_router_weight_on_input:
        return decision.WEIGHTED_INPUT
    decided = decision.decide(layer.moe_config, form)
    if isinstance(decided, str):
        return decided
    decision.take(form)
    return config.method(layer.moe_config, decided)


_GptOssMxfp4Base: Any = get_quantization_config("gpt_oss_mxfp4")
_Mxfp4Base: Any = get_quantization_config("mxfp4")
_Fp8Base: Any = get_quantization_config("fp8")
_DeepseekV4Base: Any = get_quantization_config("deepseek_v4_fp8")
_CompressedTensorsBase: Any = get_quantization_config("compressed-tensors")
_ModelOptNvFp4Base: Any = get_quantization_config("modelopt_fp4")


class CpumoeGptOssMxfp4Config(_AnyDtype, _GptOssMxfp4Base):
    """gpt-oss in MXFP4."""

    def stored_form(self, layer: Any, prefix: str) -> _Answer:
        """Returns MXFP4 whose rows of gate and up alternate."""
        return stored.mxfp4(interleaved=True)


class CpumoeMxfp4Config(_AnyDtype, _Mxfp4Base):
    """Other models in MXFP4."""

    def stored_form(self, layer: Any, prefix: str) -> _Answer:
        """Returns MXFP4."""
        return stored.mxfp4()


class CpumoeFp8Config(_WithCpumoe, _Fp8Base):
    """FP8 in blocks, as DeepSeek-V3 has it."""

    def stored_form(self, layer: Any, prefix: str) -> _Answer:
        """Returns FP8 in blocks, or MXFP4 in a checkpoint whose other layers are FP8."""
        return _fp8(self, prefix)


class CpumoeDeepseekV4Config(_WithCpumoe, _DeepseekV4Base):
    """DeepSeek-V4: experts in MXFP4 or FP8."""

    def stored_form(self, layer: Any, prefix: str) -> _Answer:
        """Returns MXFP4 or FP8 in blocks, as the model's config says."""
        config: Any = self
        if config.moe_quant_algo:
            return f"experts of DeepSeek-V4 in {config.moe_quant_algo}"
        return stored.mxfp4() if config.expert_dtype == "fp4" else _fp8(self, prefix)


class CpumoeCompressedTensorsConfig(_WithCpumoe, _CompressedTensorsBase):
    """compressed-tensors: INT4, NVFP4, MXFP4 and FP8."""

    def stored_form(self, layer: Any, prefix: str) -> _Answer:
        """Returns the form of the projections, which are alike."""
        config: Any = self
        config._add_fused_moe_to_target_scheme_map()
        names = (layer.ckpt_gate_proj_name, layer.ckpt_up_proj_name, layer.ckpt_down_proj_name)
        schemes = [config.get_scheme_dict(layer, f"{prefix}.0.{name}") for name in names]
        if any(scheme != schemes[0] for scheme in schemes):
            return "projections in several formats"
        return None if schemes[0] is None else compressed_form(schemes[0])


class CpumoeModelOptNvFp4Config(_WithCpumoe, _ModelOptNvFp4Base):
    """ModelOpt's NVFP4."""

    method = ModelOptCpumoeExpertsMethod

    def stored_form(self, layer: Any, prefix: str) -> _Answer:
        """Returns NVFP4."""
        config: Any = self
        if config.is_layer_excluded(prefix):
            return None
        if not config.is_checkpoint_nvfp4_serialized or config.group_size != 16:
            return "NVFP4 that is not in the checkpoint, or has other groups than 16"
        return stored.nvfp4(packed=False)


def _fp8(config: Any, prefix: str) -> _Answer:
    if is_layer_skipped(
        prefix=prefix,
        ignored_layers=config.ignored_layers,
        fused_mapping=config.packed_modules_mapping,
        match_mode=config.ignored_layers_match_mode,
    ):
        return None
    if config.store_dtype == "mxfp4":
        return stored.mxfp4()
    if not config.is_checkpoint_fp8_serialized or config.weight_block_size != [128, 128]:
        return "FP8 without blocks of 128 x 128 weights in the checkpoint"
    return stored.fp8_blocks()


def compressed_form(scheme: dict[str, Any]) -> _Answer:
    """Returns how experts are stored, from compressed-tensors' arguments of their projections."""
    weights = scheme["weights"]
    strategy = getattr(weights.strategy, "value", weights.strategy)
    kind = getattr(weights.type, "value", weights.type)
    what = (kind, weights.num_bits, strategy, weights.group_size)
    named = f"{kind}{weights.num_bits} with strategy {strategy} and group {weights.group_size}"
    if not weights.symmetric or weights.dynamic or getattr(weights, "actorder", None):
        return f"{named}, which is not symmetric, static and in order"
    if what[:2] == ("int", 4) and scheme.get("format") == "pack-quantized":
        if scheme.get("input_activations") is not None:
            return f"{named} with quantized activations"
        group = weights.group_size
        if strategy == "channel":
            return stored.int4(None)
        return stored.int4(group) if strategy == "group" and group % 32 == 0 else named
    if what == ("float", 4, "group", 32):
        return stored.mxfp4("weight_packed")
    if what == ("float", 4, "tensor_group", 16):
        return stored.nvfp4(packed=True)
    if what[:3] == ("float", 8, "channel"):
        return stored.fp8_rows()
    if what[:3] == ("float", 8, "block") and list(weights.block_structure or ()) == [128, 128]:
        return stored.fp8_blocks("weight_scale")
    return named


CONFIGS: dict[str, Callable[..., Any]] = {
    "gpt_oss_mxfp4": CpumoeGptOssMxfp4Config,
    "mxfp4": CpumoeMxfp4Config,
    "fp8": CpumoeFp8Config,
    "deepseek_v4_fp8": CpumoeDeepseekV4Config,
    "compressed-tensors": CpumoeCompressedTensorsConfig,
    "modelopt_fp4": CpumoeModelOptNvFp4Config,
}


def register() -> None:
    """Makes vLLM use these classes for the checkpoints that its own classes are for.

    Raises:
        ImportError: another plugin replaces vLLM's class of experts that are not quantized.
    """
    unquantized.register()
    for name, config in CONFIGS.items():
        register_quantization_config(name)(config)
