"""Loading a model whose experts cpumoe computes."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, DeepseekV3Config, DeepseekV3ForCausalLM
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING

from cpumoe.checkpoint import UnsupportedFormatError, open_checkpoint
from cpumoe.integrations.transformers.experts_module import CpuExperts
from cpumoe.integrations.transformers.in_memory import experts_forward
from cpumoe.integrations.transformers.options import (
    ExpertsOptions,
    loading_with,
    set_default_options,
)
from cpumoe.integrations.transformers.quantizers import HOST_QUANTIZERS, QUANTIZERS, our_method

IMPLEMENTATION = "cpumoe"


class KimiK2Config(DeepseekV3Config):
    """Kimi-K2 is DeepSeek-V3's architecture under another name, which transformers lacks."""

    model_type = "kimi_k2"


class KimiK2ForCausalLM(DeepseekV3ForCausalLM):
    """The model of `KimiK2Config`."""

    config_class = KimiK2Config


AutoConfig.register(KimiK2Config.model_type, KimiK2Config, exist_ok=True)
AutoModelForCausalLM.register(KimiK2Config, KimiK2ForCausalLM, exist_ok=True)
ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, experts_forward)


def from_pretrained(
    path: str | os.PathLike[str],
    *,
    model_class: Any = AutoModelForCausalLM,
    options: ExpertsOptions | None = None,
    dtype: torch.dtype = torch.bfloat16,
    **kwargs: Any,
) -> Any:
    """Loads a transformers model whose routed experts cpumoe computes; patches nothing.

    Experts are packed from the checkpoint's mapped files, in its own low-precision format: memory
    for dense ones is never allocated. Everything else is the host's, dense, in `dtype`.

    Args:
        path: a checkpoint folder, or a name on the hub.
        model_class: the class whose `from_pretrained` to call.
        options: how experts are made; default: `ExpertsOptions()`.
        dtype: of everything but the experts: bfloat16 or float32.
        **kwargs: for the class's `from_pretrained`.

    Returns:
        The model, in evaluation mode. Its experts record no gradients, and it cannot be saved.

    Raises:
        FileNotFoundError: no such folder or file.
        CheckpointError: a damaged checkpoint, or not an MoE model.
        UnsupportedFormatError: experts in a format that cpumoe does not know.
        ValueError: experts that compute something else than cpumoe does.
    """
    if dtype not in (torch.bfloat16, torch.float32):
        raise ValueError(f"dtype: expected torch.bfloat16 or torch.float32, got {dtype}")
    _check_folder(path)
    config = kwargs.pop("config", None) or AutoConfig.from_pretrained(
        path, trust_remote_code=kwargs.get("trust_remote_code")
    )
    _use_our_quantizer(config, path)
    with loading_with(options or ExpertsOptions()):
        model = model_class.from_pretrained(path, config=config, dtype=torch.bfloat16, **kwargs)
    if not any(isinstance(module, CpuExperts) for module in model.modules()):
        raise ValueError(
            f"{type(model).__name__}: transformers has no experts module in it that cpumoe knows"
        )
    # The host's loader keeps unquantized tensors in the checkpoint's bf16 whatever it is asked for.
    return model.to(dtype) if dtype == torch.float32 else model


def enable(options: ExpertsOptions | None = None) -> None:
    """Makes transformers' own `from_pretrained` give routed experts to cpumoe.

    From now on, in this process, checkpoints with quantization method fp8, mxfp4 or
    compressed-tensors load as by our `from_pretrained`; one whose routed experts are in a format
    that cpumoe does not know is refused. Models without routed experts are not touched. Calling it
    again changes the options.

    Independently of this, importing the package registers ``experts_implementation="cpumoe"``.

    Args:
        options: how experts are made; default: `ExpertsOptions()`.
    """
    set_default_options(options or ExpertsOptions())
    AUTO_QUANTIZER_MAPPING.update(QUANTIZERS)


def disable() -> None:
    """Undoes `enable`; models loaded meanwhile stay as they are."""
    set_default_options(ExpertsOptions())
    AUTO_QUANTIZER_MAPPING.update(HOST_QUANTIZERS)


def _check_folder(path: str | os.PathLike[str]) -> None:
    """Refuses what cannot be loaded before the host begins; a name on the hub is checked later."""
    if not Path(path).exists():
        return
    with open_checkpoint(path) as reader:
        reader.check_supported()


def _use_our_quantizer(config: Any, path: str | os.PathLike[str]) -> None:
    owner = config
    if getattr(owner, "quantization_config", None) is None:
        owner = config.get_text_config(decoder=True)
    quantization = getattr(owner, "quantization_config", None)
    method = quantization.get("quant_method") if isinstance(quantization, dict) else None
    if not isinstance(quantization, dict) or method not in QUANTIZERS:
        raise UnsupportedFormatError(
            f"{path}: quantization method {method!r} is not supported; supported: "
            f"{', '.join(QUANTIZERS)}"
        )
    owner.quantization_config = {**quantization, "quant_method": our_method(method)}
