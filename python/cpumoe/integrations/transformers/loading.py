"""Loads models whose experts cpumoe computes."""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    DeepseekV3Model,
)
from transformers.conversion_mapping import (
    get_checkpoint_conversion_mapping,
    register_checkpoint_conversion_mapping,
)
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING

import cpumoe
from cpumoe.checkpoint import UnsupportedFormatError
from cpumoe.checkpoint.config import exact_dtype
from cpumoe.checkpoint.shards import read_config
from cpumoe.checkpoint.weight_files import CONFIG_NAME
from cpumoe.integrations.transformers.completeness import check_complete, host_report_held_back
from cpumoe.integrations.transformers.host_files import check_model_files, check_path, host_reads
from cpumoe.integrations.transformers.in_memory import experts_forward
from cpumoe.integrations.transformers.options import (
    ExpertsOptions,
    loading_with,
    set_default_options,
    whole_options,
)
from cpumoe.integrations.transformers.quantizers import (
    HOST_QUANTIZERS,
    QUANTIZERS,
    UNQUANTIZED,
    our_method,
)
from cpumoe.integrations.transformers.routers import use_fp32_routers

IMPLEMENTATION = "cpumoe"
_DTYPES = (torch.bfloat16, torch.float32)
_AUTO = "auto"
# Arguments that locate a checkpoint. Config and tokenizer must come from the same place.
_ORIGIN = (
    "cache_dir",
    "code_revision",
    "force_download",
    "local_files_only",
    "proxies",
    "revision",
    "subfolder",
    "token",
    "trust_remote_code",
)


class KimiK2Config(DeepseekV3Config):
    """The config of Kimi-K2: DeepSeek-V3's under a name that transformers does not know."""

    model_type = "kimi_k2"


class KimiK2Model(DeepseekV3Model):
    """The model of `KimiK2Config`, without a head."""

    config_class = KimiK2Config


class KimiK2ForCausalLM(DeepseekV3ForCausalLM):
    """The model of `KimiK2Config`."""

    config_class = KimiK2Config


AutoConfig.register(KimiK2Config.model_type, KimiK2Config, exist_ok=True)
AutoModel.register(KimiK2Config, KimiK2Model, exist_ok=True)
AutoModelForCausalLM.register(KimiK2Config, KimiK2ForCausalLM, exist_ok=True)
# Without this mapping, transformers would leave its stacked experts random.
register_checkpoint_conversion_mapping(
    KimiK2Config.model_type,
    get_checkpoint_conversion_mapping(DeepseekV3Config.model_type),
    overwrite=True,
)
ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, experts_forward)


def from_pretrained(
    path: str | os.PathLike[str],
    *,
    model_class: Any = AutoModelForCausalLM,
    options: cpumoe.ExpertsOptions | None = None,
    dtype: torch.dtype | str = torch.bfloat16,
    **kwargs: Any,
) -> Any:
    """Loads a transformers model whose routed experts cpumoe computes. It patches nothing.

    Experts are packed from the checkpoint's mapped files, in the checkpoint's low-precision format.
    Memory for dense experts is never allocated. Dense layers of which the model uses nothing but
    the product become `cpumoe.Linear`, as `ExpertsOptions.dense` says. Those that the checkpoint
    stores quantized are packed from its files, too. transformers loads everything else in `dtype`.
    RMS norms become one operation each. `ExpertsOptions.attention` says who computes attention:
    transformers, unless it is "native".

    Args:
        path: a checkpoint folder, or a name on the hub.
        model_class: the class whose `from_pretrained` to call.
        options: options for the experts and the whole model; default: `ExpertsOptions()`. Those
            for a layer, `cpumoe.ExpertsOptions`, do as well.
        dtype: dtype of hidden states and of the weights that transformers loads: bfloat16, float32,
            or "auto". "auto" is bfloat16 for a checkpoint in bfloat16, else float32, so that
            nothing is rounded.
        **kwargs: further arguments for `from_pretrained` of the class.

    Returns:
        The model, in evaluation mode. Its experts and cpumoe's dense layers record no gradients,
        and it cannot be saved.

    Raises:
        FileNotFoundError, NotADirectoryError: `path` does not exist, or is a file.
        OSError: the hub does not have the name.
        CheckpointError: the checkpoint is damaged, or the model is no MoE model.
        UnsupportedFormatError: cpumoe does not support the experts' format.
        ValueError: the model has no experts, or cpumoe does not support their activation; the
            options have a `weight_format`.
    """
    check_dtype(dtype, kwargs)
    options = whole_options(options)
    if options.weight_format is not None:
        raise ValueError(
            f"weight_format: expected None, because experts that are read from a checkpoint keep "
            f"its format, got {options.weight_format!r}; to round weights, load the model with "
            f"transformers and call set_experts_implementation after enable(options)"
        )
    check_model_files(path, kwargs, experts=True)
    return load_checked(path, kwargs, options, dtype, model_class)


def from_pretrained_by_host(
    path: str | os.PathLike[str],
    *,
    fp32_router: bool = True,
    dtype: torch.dtype | str = torch.bfloat16,
    **kwargs: Any,
) -> Any:
    """Loads a causal language model that transformers alone computes, for comparison.

    Its experts are dequantized.

    Args:
        path: a checkpoint folder, or a name on the hub.
        fp32_router: see `ExpertsOptions`.
        dtype: see `from_pretrained`.
        **kwargs: further arguments for transformers.
    """
    check_model_files(path, kwargs, experts=False)
    return load_checked_by_host(path, kwargs, fp32_router, dtype)


def check_dtype(dtype: torch.dtype | str, kwargs: Mapping[str, Any]) -> None:
    """Refuses a dtype that `from_pretrained` does not take, and the argument's old name.

    Raises:
        ValueError: see above.
    """
    if "torch_dtype" in kwargs:  # transformers would silently ignore it
        raise ValueError("torch_dtype: this argument is called dtype")
    if dtype not in (*_DTYPES, _AUTO):
        raise ValueError(
            f"dtype: expected torch.bfloat16 or torch.float32 or {_AUTO!r}, got {dtype}"
        )


def load_checked(
    path: str | os.PathLike[str],
    kwargs: Mapping[str, Any],
    options: ExpertsOptions,
    dtype: torch.dtype | str,
    model_class: Any = AutoModelForCausalLM,
) -> Any:
    """Does what `from_pretrained` does after the checks of dtype and files."""
    config = _config(path, kwargs)
    _use_our_quantizer(config, path)
    with loading_with(options):
        loaded = _load(model_class, path, config, dtype, kwargs)
    model = loaded[0] if isinstance(loaded, tuple) else loaded
    model.hf_quantizer.swap_dense(model)
    model.hf_quantizer.swap_attention(model)
    return loaded


def load_checked_by_host(
    path: str | os.PathLike[str],
    kwargs: Mapping[str, Any],
    fp32_router: bool,
    dtype: torch.dtype | str,
) -> Any:
    """Does what `from_pretrained_by_host` does after the check of files."""
    config = _config(path, kwargs)
    owner, quantization = _quantization(config)
    if quantization is not None:
        # Without this, transformers keeps compressed-tensors compressed, and may compute in MXFP4.
        owner.quantization_config = {**quantization, "dequantize": True}
    loaded = _load(AutoModelForCausalLM, path, config, dtype, kwargs)
    if fp32_router:
        use_fp32_routers(loaded[0] if isinstance(loaded, tuple) else loaded)
    return loaded


def checkpoint_dtype(path: str | os.PathLike[str], **kwargs: Any) -> torch.dtype:
    """Returns the dtype that "auto" stands for in `from_pretrained`: bfloat16 or float32.

    Args:
        path: a checkpoint folder, or a name on the hub.
        **kwargs: further arguments for transformers, such as ``revision``.

    Raises:
        FileNotFoundError, NotADirectoryError, OSError, CheckpointError: see `from_pretrained`.
    """
    check_path(path)
    if Path(path).exists():
        return exact_dtype(read_config(Path(path, kwargs.get("subfolder") or "")))
    return exact_dtype(_config(path, kwargs).to_dict())


def enable(options: cpumoe.ExpertsOptions | None = None) -> None:
    """Makes transformers' own `from_pretrained` give routed experts to cpumoe.

    After this call, checkpoints with quantization method fp8, mxfp4 or compressed-tensors load in
    this process as with cpumoe's `from_pretrained`. A checkpoint whose routed experts have an
    unsupported format is refused. Models without routed experts, and checkpoints that are not
    quantized, load as before. Another call of `enable` changes the options.

    Dense layers and attention stay transformers', unless the options name another choice.
    Independently of this, importing the package registers ``experts_implementation="cpumoe"`` and
    ``attn_implementation="cpumoe"``.

    Args:
        options: options for the experts and the whole model; default: `ExpertsOptions()`.
    """
    set_default_options(whole_options(options))
    AUTO_QUANTIZER_MAPPING.update(QUANTIZERS)


def disable() -> None:
    """Undoes `enable`. Models that were loaded stay as they are."""
    set_default_options(None)
    AUTO_QUANTIZER_MAPPING.update(HOST_QUANTIZERS)


def origin(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the arguments of `from_pretrained` that locate the checkpoint."""
    return {name: kwargs[name] for name in _ORIGIN if name in kwargs}


def _config(path: str | os.PathLike[str], kwargs: Mapping[str, Any]) -> Any:
    """Returns a copy of the config in the arguments, or loads the config."""
    config = kwargs.get("config")
    if config is None:
        with host_reads(f"{path}: {CONFIG_NAME}", kwargs):
            return AutoConfig.from_pretrained(path, **origin(kwargs))
    return copy.deepcopy(config)


def _quantization(config: Any) -> tuple[Any, dict[str, Any] | None]:
    """Returns the config that describes the quantization, and the description."""
    owner = config
    if getattr(owner, "quantization_config", None) is None:
        owner = config.get_text_config(decoder=True)
    quantization = getattr(owner, "quantization_config", None)
    return owner, quantization if isinstance(quantization, dict) else None


def _use_our_quantizer(config: Any, path: str | os.PathLike[str]) -> None:
    owner, quantization = _quantization(config)
    if quantization is None and getattr(owner, "quantization_config", None) is None:
        config.quantization_config = {"quant_method": UNQUANTIZED}
        return
    method = None if quantization is None else quantization.get("quant_method")
    if quantization is None or method not in QUANTIZERS:
        raise UnsupportedFormatError(
            f"{path}: quantization method {method!r} is not supported; supported: "
            f"{', '.join(QUANTIZERS)}"
        )
    owner.quantization_config = {**quantization, "quant_method": our_method(method)}


def _load(
    model_class: Any,
    path: str | os.PathLike[str],
    config: Any,
    dtype: torch.dtype | str,
    kwargs: Mapping[str, Any],
) -> Any:
    """Calls transformers' loader, and refuses a model whose tensors differ from the files'.

    Returns:
        The model, or model and report if the caller requests both.
    """
    if dtype == _AUTO:
        dtype = exact_dtype(config.to_dict())
    arguments = {
        **kwargs,
        "config": config,
        "dtype": dtype,
        # Without these, transformers raises without the names, which it only logs.
        "output_loading_info": True,
        "ignore_mismatched_sizes": True,
    }
    load = model_class.from_pretrained
    with host_reads(str(path), kwargs), host_report_held_back(path):
        model, report = load(path, **arguments)
        check_complete(
            model, report, path, mismatched_allowed=bool(kwargs.get("ignore_mismatched_sizes"))
        )
    # transformers' loader keeps some of the checkpoint's tensors in bf16 for any dtype. There is no
    # conversion to bf16, which would round tensors that stay fp32, such as rotary frequencies.
    if dtype == torch.float32:
        model.to(dtype)
    return (model, report) if kwargs.get("output_loading_info") else model
