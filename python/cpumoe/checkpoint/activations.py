"""The activation of a model's experts, as its ``model_type`` and config.json say.

A model that is not listed may clamp, shift or leave out the gate. A reader must not guess, so its
caller has to name the activation. The integration for transformers finds it by running the model's
own code. Source: transformers 5.23's modeling files.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from cpumoe.checkpoint.config import MoeConfig, limit, positive_number
from cpumoe.checkpoint.files import shown_value
from cpumoe.numerics.glu import GLU, SwiGLU

# Published configs may leave these out. The defaults are those of transformers' configs.
_ALPHA, _SHIFTED_LIMIT, _LIMIT = 1.702, 7.0, 10.0
_GATE_CAP, _UP_CAP = 4.0, 25.0
# `GLU`'s functions by their names in config.json.
_SILU = {"silu": "silu", "swish": "silu"}
_GELU = {"gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh"}
_FUNCTIONS = {**_SILU, **_GELU, "relu": "relu", "relu2": "relu2"}
_SHIFTED_SILU = {**_SILU, "swigluoai": "silu"}

# Model types whose experts compute f(gate) * up, where ``hidden_act`` names f.
PLAIN_MODEL_TYPES = frozenset(
    {
        "afmoe",
        "axk1",
        "axk2",
        "bailing_hybrid",
        "beam",
        "cohere2_moe",
        "deepseek_ocr2",
        "deepseek_ocr2_text",
        "deepseek_v2",
        "deepseek_v3",
        "deepseek_v32",
        "dots1",
        "dots3_note",
        "dots3_note_text",
        "ernie4_5_moe",
        "ernie4_5_vl_moe",
        "ernie4_5_vl_moe_text",
        "exaone_moe",
        "flex_olmo",
        "flint",
        "glm4_moe",
        "glm4_moe_lite",
        "glm4v_moe",
        "glm4v_moe_text",
        "glm_moe_dsa",
        "granitemoe",
        "granitemoe_swa",
        "granitemoehybrid",
        "granitemoeshared",
        "hunyuan_v1_moe",
        "hy_v3",
        "inkling_mm_model",
        "inkling_text",
        "jamba",
        "kimi_k2",
        "kimi_k25",
        "kimi_linear",
        "kolibri1",
        "laguna",
        "mellum",
        "mimo_v2_flash",
        "minimax",
        "minimax_m2",
        "mistral4",
        "mistral_large4",
        "mistral_large4_text",
        "mixtral",
        "olmoe",
        "phimoe",
        "qwen2_moe",
        "qwen3_5_moe",
        "qwen3_5_moe_text",
        "qwen3_moe",
        "qwen3_next",
        "qwen3_omni_moe_text",
        "qwen3_omni_moe_thinker",
        "qwen3_vl_moe",
        "qwen3_vl_moe_text",
        "qwen4_exp",
        "qwen4_exp_text",
        "solar_open",
        "unlimited_ocr",
        "unlimited_ocr_text",
        "zaya",
    }
)


class Activation(NamedTuple):
    """What config.json says of the experts' activation.

    Attributes:
        glu: the activation; None: config.json does not specify it, or cpumoe does not have it.
        unsupported: the reason why cpumoe does not have it, or nothing.
    """

    glu: GLU | None
    unsupported: tuple[str, ...] = ()


class _Family(NamedTuple):
    """How a family computes its activation.

    Attributes:
        glu: makes the activation from the config's part for the language model, and a function.
        functions: the functions that config.json may name, as `GLU` calls them.
        key: where config.json names the function.
        default: the name, if config.json has none.
    """

    glu: Callable[[Mapping[str, Any], str], GLU]
    functions: Mapping[str, str] = _SILU
    key: str = "hidden_act"
    default: str = "silu"


def _plain(text: Mapping[str, Any], function: str) -> GLU:
    return SwiGLU() if function == "silu" else GLU(function)


def _without_gate(text: Mapping[str, Any], function: str) -> GLU:
    return GLU(function, gated=False)


def _shifted(text: Mapping[str, Any], function: str) -> GLU:
    return SwiGLU(
        alpha=positive_number(text, "swiglu_alpha", _ALPHA),
        limit=limit(text, "swiglu_limit", _SHIFTED_LIMIT),
        up_offset=1.0,
    )


def _limited(text: Mapping[str, Any], function: str) -> GLU:
    return SwiGLU(limit=limit(text, "swiglu_limit", _LIMIT))


def _softcapped(text: Mapping[str, Any], function: str) -> GLU:
    return GLU(
        "softcapped_silu",
        gate_cap=positive_number(text, "mlp_gate_softcap", _GATE_CAP),
        up_cap=positive_number(text, "mlp_up_softcap", _UP_CAP),
    )


_PLAIN = _Family(_plain, _FUNCTIONS)
_GEMMA = _Family(_plain, _FUNCTIONS, "hidden_activation", "gelu_pytorch_tanh")
_SHIFTED = _Family(_shifted, _SHIFTED_SILU)
# A model that is not listed may do more than call the function that its config names.
_UNKNOWN = _Family(_plain, {**_FUNCTIONS, **_SHIFTED_SILU})
_OTHERS = {
    "aria": _Family(_plain),
    "deepseek_v4": _Family(_limited),
    "diffusion_gemma": _GEMMA,
    "gemma4": _GEMMA,
    "glm5_next": _Family(_limited),
    "gpt_oss": _SHIFTED,
    "hy_v4": _Family(_limited),
    "inkling2": _Family(_softcapped),
    "lfm2_moe": _Family(_plain),
    "minimax_m3_vl": _SHIFTED,
    "nemotron_h": _Family(_without_gate, _FUNCTIONS, "mlp_hidden_act", "relu2"),
    "openai_privacy_filter": _SHIFTED,
}


def activation_of(config: MoeConfig) -> Activation:
    """Returns the activation of a model's experts.

    Raises:
        CheckpointError: config.json has a limit or an alpha that is no positive number.
    """
    listed = config.model_type in PLAIN_MODEL_TYPES
    other = _OTHERS.get(config.model_type.removesuffix("_text"))
    family = _PLAIN if listed else other or _UNKNOWN
    name = config.text.get(family.key)
    name = family.default if name is None else name
    function = family.functions.get(name) if isinstance(name, str) else None
    if function is None:
        known = ", ".join(map(repr, family.functions))
        reason = f"{family.key} {shown_value(name)} is not supported, only {known}"
        return Activation(None, (reason,))
    return Activation(None if family is _UNKNOWN else family.glu(config.text, function))
