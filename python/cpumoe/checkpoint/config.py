"""Reads the values of config.json that the checkpoint readers need."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from cpumoe.checkpoint.files import CheckpointError, shown, shown_value

_NUM_EXPERTS_KEYS = ("n_routed_experts", "num_local_experts", "num_experts", "moe_num_experts")
# Nemotron and Muse Spark project hidden states to this width before the experts, and back after.
_LATENT_KEYS = ("moe_latent_size", "moe_hidden_size")
_INNER_KEYS = ("moe_intermediate_size", "intermediate_size")
# Families that have a second list of experts in each layer, for the tokens of images.
_WITH_VISION_EXPERTS = ("ernie4_5_vl_moe", "ernie4_5_vl_moe_text")
_NUM_LAYERS_KEY = "num_hidden_layers"
# Some hybrid models list the kinds of their layers instead.
_LAYER_KINDS_KEY = "layers_block_type"
_TOP_K_KEYS = (
    "num_experts_per_tok",
    "num_experts_per_token",
    "experts_per_token",
    "moe_topk",
    "moe_k",
    "top_k_experts",
)

_DTYPE_KEYS = ("dtype", "torch_dtype")


@dataclass(frozen=True)
class MoeConfig:
    """The sizes of a model's routed experts, and where its quantization is described.

    Attributes:
        model_type: ``model_type`` of the top level.
        text: the part of config.json for the language model (``text_config`` if there is one).
        quantization: ``quantization_config``, from either level; empty if nothing is quantized.
        num_hidden_layers: number of decoder layers.
        num_experts: number of routed experts per layer.
        top_k: number of routed experts per token.
        hidden_size: width of an expert's input and output, which is that of the residual stream or
            of a latent space.
        intermediate_size: inner width of one routed expert.
        vision_intermediate_size: that of the experts for tokens of images, which follow the others
            in each layer; None: there are none.
    """

    model_type: str
    text: Mapping[str, Any]
    quantization: Mapping[str, Any]
    num_hidden_layers: int
    num_experts: int
    top_k: int
    hidden_size: int
    intermediate_size: int
    vision_intermediate_size: int | None = None


def parse_config(config: Mapping[str, Any]) -> MoeConfig:
    """Returns the MoE sizes of a parsed config.json.

    Raises:
        CheckpointError: the model is no MoE model, or a size is missing or not a positive integer.
    """
    text = _section(config, "text_config") or config
    _check_optional(config, "architectures", list, str)
    _check_optional(text, "num_nextn_predict_layers", int)
    if not any(key in text for key in _NUM_EXPERTS_KEYS):
        raise CheckpointError(
            f"config.json: not a Mixture-of-Experts model: expected one of "
            f"{', '.join(_NUM_EXPERTS_KEYS)}, got none; model_type is "
            f"{shown_value(config.get('model_type'))}"
        )
    quantization = (
        _section(text, "quantization_config")
        or _section(config, "quantization_config")
        or _section(config, "compression_config")
    )
    model_type = shown(str(config.get("model_type", "")))
    inner, *vision = _inner_sizes(text, model_type)
    latent = next((key for key in _LATENT_KEYS if text.get(key) is not None), "hidden_size")
    return MoeConfig(
        model_type=model_type,
        text=text,
        quantization=quantization,
        num_hidden_layers=_num_layers(text),
        num_experts=_size(text, *_NUM_EXPERTS_KEYS),
        top_k=_size(text, *_TOP_K_KEYS),
        hidden_size=_size(text, latent),
        intermediate_size=inner,
        vision_intermediate_size=vision[0] if vision else None,
    )


def exact_dtype(config: Mapping[str, Any]) -> torch.dtype:
    """Returns the dtype that rounds no unquantized weight: bfloat16 or float32.

    Args:
        config: the content of config.json, or transformers' config as a dict.

    Raises:
        CheckpointError: ``text_config`` is no object.
    """
    parts = (_section(config, "text_config"), config)
    own = next(filter(None, (part.get(key) for part in parts for key in _DTYPE_KEYS)), "bfloat16")
    is_bf16 = str(own).removeprefix("torch.") == "bfloat16"
    return torch.bfloat16 if is_bf16 else torch.float32


def positive_number(config: Mapping[str, Any], key: str, default: float) -> float:
    """Returns a positive, finite float of the config, or `default` if the key is absent.

    Raises:
        CheckpointError: the value is something else.
    """
    value = config.get(key, default)
    if not isinstance(value, bool) and isinstance(value, (int, float)):
        try:
            result = float(value)
        except OverflowError:  # an integer beyond the range of floats
            result = math.inf
        if math.isfinite(result) and result > 0:
            return result
    raise CheckpointError(
        f"config.json: {key}: expected a positive number, got {shown_value(value)}"
    )


def limit(config: Mapping[str, Any], key: str, default: float) -> float | None:
    """Returns a clamp of the config, like `positive_number`. null is None, which means no clamp."""
    return None if config.get(key, default) is None else positive_number(config, key, default)


def _section(config: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    value = config.get(key)
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise CheckpointError(f"config.json: {key}: expected an object, got {shown_value(value)}")
    return value


def _check_optional(
    config: Mapping[str, Any], key: str, kind: type, item_kind: type | None = None
) -> None:
    """Checks a value that the readers do not need, but that transformers uses without a check."""
    value = config.get(key)
    items = value if item_kind is not None and isinstance(value, list) else ()
    if value is not None and not (
        isinstance(value, kind) and all(isinstance(item, item_kind or object) for item in items)
    ):
        of = "" if item_kind is None else f" of {item_kind.__name__}"
        raise CheckpointError(
            f"config.json: {key}: expected {kind.__name__}{of}, got {shown_value(value)}"
        )


def _num_layers(text: Mapping[str, Any]) -> int:
    kinds = text.get(_LAYER_KINDS_KEY)
    if text.get(_NUM_LAYERS_KEY) is None and isinstance(kinds, list) and kinds:
        return len(kinds)
    return _size(text, _NUM_LAYERS_KEY)


def _inner_sizes(text: Mapping[str, Any], model_type: str) -> list[int]:
    """Returns the inner width of experts, and of those for tokens of images if there are any."""
    key = _INNER_KEYS[0]
    sizes = text.get(key)
    if model_type not in _WITH_VISION_EXPERTS or not isinstance(sizes, list) or len(sizes) != 2:
        return [_size(text, *_INNER_KEYS)]
    return [_size({key: size}, key) for size in sizes]


def _size(config: Mapping[str, Any], *keys: str) -> int:
    key = next((key for key in keys if config.get(key) is not None), keys[0])
    value = config.get(key)
    if isinstance(value, bool) or not isinstance(value, int) or value <= 0:
        raise CheckpointError(
            f"config.json: {key}: expected a positive integer, got {shown_value(value)}"
        )
    return value
