"""Whether cpumoe computes a layer's experts, and how."""

from __future__ import annotations

from typing import Any, NamedTuple

from vllm.config import get_current_vllm_config
from vllm.logger import init_logger

from cpumoe import __version__
from cpumoe.integrations.vllm.settings import KEY, Settings
from cpumoe.integrations.vllm.stored import Activation, StoredForm, activation_of
from cpumoe.numerics.glu import GLU

logger = init_logger("vllm.plugins.cpumoe")

DISABLED = "the additional config says enabled: false"
WEIGHTED_INPUT = "the router's weights multiply the input"


class Decision(NamedTuple):
    """How cpumoe computes a layer's experts."""

    form: StoredForm
    activation: GLU
    settings: Settings


def settings() -> Settings:
    """Returns the options of vLLM's current configuration.

    Raises:
        TypeError, ValueError: see `Settings`.
    """
    additional = get_current_vllm_config().additional_config
    return Settings(additional.get(KEY) if isinstance(additional, dict) else None)


def decide(moe: Any, form: StoredForm) -> Decision | str:
    """Returns how cpumoe computes a layer's experts, or why vLLM does.

    Args:
        moe: vLLM's configuration of the layer.
        form: how the experts are stored.
    """
    given = Activation(moe.activation.name, moe.swiglu_limit, moe.swiglu_alpha, moe.swiglu_beta)
    activation = activation_of(given, interleaved=form.interleaved)
    if isinstance(activation, str):
        return activation
    if moe.is_lora_enabled:
        return "LoRA adapters may change them"
    if moe.moe_parallel_config.enable_eplb:
        return "they are moved between ranks (EPLB)"
    ranks = moe.moe_parallel_config.tp_size
    reason = form.why_not(moe.hidden_dim, moe.intermediate_size_per_partition, ranks)
    if reason is not None:
        return reason
    return Decision(form, activation, settings())


def leave(reason: str) -> None:
    """Tells the user why vLLM computes a layer's experts."""
    logger.info_once("cpumoe leaves routed experts to vLLM: %s", reason)


def take(form: StoredForm) -> None:
    """Tells the user and vLLM that cpumoe computes a layer's experts."""
    additional = get_current_vllm_config().additional_config
    if isinstance(additional, dict):
        # The additional config is a part of the key under which vLLM keeps compiled code. A vLLM
        # without cpumoe must not find ours.
        additional[KEY] = {**(additional.get(KEY) or {}), "version": __version__}
    logger.info_once("cpumoe computes routed experts in %s", form.format)
