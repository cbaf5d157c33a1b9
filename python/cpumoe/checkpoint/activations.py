"""The activation of a model's experts, as its ``model_type`` and config.json say.

A model that is not listed may clamp, shift or leave out the gate. A reader must not guess, so its
caller has to name the activation. The integration for transformers finds it by running the model's
own code. Source: transformers 5.23's modeling files.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from cpumoe.checkpoint.config import (
    PLAIN_SWIGLU_MODEL_TYPES,
    MoeConfig,
    limit,
    positive_number,
)
from cpumoe.numerics.glu import GLU, SwiGLU

# Published configs may leave these out. The defaults are those of transformers' configs.
_ALPHA, _SHIFTED_LIMIT, _LIMIT = 1.702, 7.0, 10.0
_GATE_CAP, _UP_CAP = 4.0, 25.0
# Names of transformers for functions that `GLU` has.
_FUNCTIONS = {"gelu_pytorch_tanh": "gelu_tanh", "silu": "silu", "relu": "relu", "relu2": "relu2"}


def shifted_swiglu(text: Mapping[str, Any]) -> SwiGLU:
    """Returns gpt-oss' activation, whose up projection is shifted by 1."""
    return SwiGLU(
        alpha=positive_number(text, "swiglu_alpha", _ALPHA),
        limit=limit(text, "swiglu_limit", _SHIFTED_LIMIT),
        up_offset=1.0,
    )


def limited_swiglu(text: Mapping[str, Any]) -> SwiGLU:
    """Returns DeepSeek-V4's activation, a SwiGLU with a limit."""
    return SwiGLU(limit=limit(text, "swiglu_limit", _LIMIT))


def _gemma_glu(text: Mapping[str, Any]) -> GLU | None:
    name = text.get("hidden_activation", "gelu_pytorch_tanh")
    function = _FUNCTIONS.get(name) if isinstance(name, str) else None
    return None if function is None else GLU(function)


def _softcapped_glu(text: Mapping[str, Any]) -> GLU:
    return GLU(
        "softcapped_silu",
        gate_cap=positive_number(text, "mlp_gate_softcap", _GATE_CAP),
        up_cap=positive_number(text, "mlp_up_softcap", _UP_CAP),
    )


def _nemotron_glu(text: Mapping[str, Any]) -> GLU | None:
    # relu2(up) is relu(gate) * up, where the gate is the up projection.
    return GLU("relu") if text.get("mlp_hidden_act", "relu2") == "relu2" else None


_OTHERS: dict[str, Callable[[Mapping[str, Any]], GLU | None]] = {
    "deepseek_v4": limited_swiglu,
    "diffusion_gemma": _gemma_glu,
    "gemma4": _gemma_glu,
    "glm5_next": limited_swiglu,
    "gpt_oss": shifted_swiglu,
    "hy_v4": limited_swiglu,
    "inkling2": _softcapped_glu,
    "minimax_m3_vl": shifted_swiglu,
    "nemotron_h": _nemotron_glu,
    "openai_privacy_filter": shifted_swiglu,
}


def known_activation(config: MoeConfig) -> GLU | None:
    """Returns the activation of the model's experts; None: the model is not known.

    Raises:
        CheckpointError: config.json has a limit or an alpha that is no positive number.
    """
    if config.model_type in PLAIN_SWIGLU_MODEL_TYPES:
        return SwiGLU()
    other = _OTHERS.get(config.model_type.removesuffix("_text"))
    return None if other is None else other(config.text)
