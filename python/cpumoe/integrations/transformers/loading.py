"""Loading a model whose experts cpumoe computes."""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping
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

from cpumoe.checkpoint import UnsupportedFormatError
from cpumoe.checkpoint.config import exact_dtype
from cpumoe.checkpoint.weight_files import CONFIG_NAME
from cpumoe.integrations.transformers.completeness import check_complete, host_report_held_back
from cpumoe.integrations.transformers.host_files import check_model_files, host_reads
from cpumoe.integrations.transformers.in_memory import experts_forward
from cpumoe.integrations.transformers.options import (
    ExpertsOptions,
    loading_with,
    set_default_options,
)
from cpumoe.integrations.transformers.quantizers import HOST_QUANTIZERS, QUANTIZERS, our_method
from cpumoe.integrations.transformers.routers import use_fp32_routers

IMPLEMENTATION = "cpumoe"
_DTYPES = (torch.bfloat16, torch.float32)
_AUTO = "auto"
# Arguments that say where a checkpoint is: config and tokenizer must come from there as well.
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
    """Kimi-K2 is DeepSeek-V3's architecture under another name, which transformers lacks."""

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
# How the host makes its stacked experts of a checkpoint's: without it they would stay random.
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
    options: ExpertsOptions | None = None,
    dtype: torch.dtype | str = torch.bfloat16,
    **kwargs: Any,
) -> Any:
    """Loads a transformers model whose routed experts cpumoe computes; patches nothing.

    Experts are packed from the checkpoint's mapped files, in its own low-precision format: memory
    for dense ones is never allocated. Everything else is the host's, dense, in `dtype`.

    Args:
        path: a checkpoint folder, or a name on the hub.
        model_class: the class whose `from_pretrained` to call.
        options: how experts are made; default: `ExpertsOptions()`.
        dtype: of everything but the experts: bfloat16, float32, or "auto": bfloat16 where the
            checkpoint has bfloat16, else float32, which rounds nothing.
        **kwargs: for the class's `from_pretrained`.

    Returns:
        The model, in evaluation mode. Its experts record no gradients, and it cannot be saved.

    Raises:
        FileNotFoundError, NotADirectoryError: no such folder, or a file.
        OSError: a name that the hub does not have.
        CheckpointError: a damaged checkpoint, or not an MoE model.
        UnsupportedFormatError: experts in a format that cpumoe does not know.
        ValueError: experts that compute something else than cpumoe does, or none in the model.
    """
    if "torch_dtype" in kwargs:  # the host would let our dtype win, without a word
        raise ValueError("torch_dtype: this argument is called dtype")
    if dtype not in (*_DTYPES, _AUTO):
        raise ValueError(
            f"dtype: expected torch.bfloat16 or torch.float32 or {_AUTO!r}, got {dtype}"
        )
    check_model_files(path, kwargs, experts=True)
    config = _config(path, kwargs)
    _use_our_quantizer(config, path)
    with loading_with(options or ExpertsOptions()):
        return _load(model_class, path, config, dtype, kwargs)


def from_pretrained_by_host(
    path: str | os.PathLike[str],
    *,
    fp32_router: bool = True,
    dtype: torch.dtype | str = torch.bfloat16,
    **kwargs: Any,
) -> Any:
    """Loads a causal language model that the host dequantizes and computes whole, to compare with.

    Args:
        path: a checkpoint folder, or a name on the hub.
        fp32_router: see `ExpertsOptions`.
        dtype: as in `from_pretrained`.
        **kwargs: for the host.
    """
    check_model_files(path, kwargs, experts=False)
    config = _config(path, kwargs)
    owner, quantization = _quantization(config)
    if quantization is not None:
        # Else the host keeps compressed-tensors compressed, and computes MXFP4 where it can.
        owner.quantization_config = {**quantization, "dequantize": True}
    loaded = _load(AutoModelForCausalLM, path, config, dtype, kwargs)
    if fp32_router:
        use_fp32_routers(loaded[0] if isinstance(loaded, tuple) else loaded)
    return loaded


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
    set_default_options(None)
    AUTO_QUANTIZER_MAPPING.update(HOST_QUANTIZERS)


def origin(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Returns those of `from_pretrained`'s arguments that say where the checkpoint is."""
    return {name: kwargs[name] for name in _ORIGIN if name in kwargs}


def _config(path: str | os.PathLike[str], kwargs: dict[str, Any]) -> Any:
    """Takes the config out of the arguments, as a copy that may be changed, or loads it."""
    config = kwargs.pop("config", None)
    if config is None:
        with host_reads(f"{path}: {CONFIG_NAME}"):
            return AutoConfig.from_pretrained(path, **origin(kwargs))
    return copy.deepcopy(config)


def _quantization(config: Any) -> tuple[Any, dict[str, Any] | None]:
    """Returns what checkpoints say of their quantization, after the config that says it."""
    owner = config
    if getattr(owner, "quantization_config", None) is None:
        owner = config.get_text_config(decoder=True)
    quantization = getattr(owner, "quantization_config", None)
    return owner, quantization if isinstance(quantization, dict) else None


def _use_our_quantizer(config: Any, path: str | os.PathLike[str]) -> None:
    owner, quantization = _quantization(config)
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
    """Calls the host's loader, and refuses a model that is not wholly what the files hold.

    Returns:
        The model, or model and report where the caller wants both.
    """
    if dtype == _AUTO:
        dtype = exact_dtype(config.to_dict())
    with host_reads(str(path)), host_report_held_back(path):
        model, report = model_class.from_pretrained(
            path,
            config=config,
            dtype=dtype,
            # Else the host raises without the names, which it logs.
            **{**kwargs, "output_loading_info": True, "ignore_mismatched_sizes": True},
        )
        check_complete(
            model, report, path, mismatched_allowed=bool(kwargs.get("ignore_mismatched_sizes"))
        )
    # The host's loader keeps some of the checkpoint's tensors in bf16 whatever it is asked for.
    # Only that way: the other would round what the host keeps in fp32, rotary frequencies first.
    if dtype == torch.float32:
        model.to(dtype)
    return (model, report) if kwargs.get("output_loading_info") else model
