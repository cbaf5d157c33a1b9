"""Tiny random models of every MoE family of transformers, found in its modeling files."""

import dataclasses
import functools
import importlib
import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

EXPERTS, TOP_K, LAYERS, HIDDEN, INNER, VOCABULARY = 8, 2, 3, 64, 96, 288
_MARK = re.compile(r"^@use_experts_implementation", re.MULTILINE)
# A family's config has those of these settings that it knows.
_SIZES = {
    "vocab_size": VOCABULARY,
    "unpadded_vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    **dict.fromkeys(
        ("intermediate_size", "moe_intermediate_size", "shared_expert_intermediate_size"), INNER
    ),
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "sliding_window": 16,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    **dict.fromkeys(
        ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), EXPERTS
    ),
    **dict.fromkeys(("num_experts_per_tok", "num_experts_per_token", "moe_k", "moe_topk"), TOP_K),
    **dict.fromkeys(("n_group", "topk_group", "n_shared_experts", "first_k_dense_replace"), 1),
    **{"q_lora_rank": 48, "kv_lora_rank": 32},
    **dict.fromkeys(("qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim"), 16),
    **dict.fromkeys(("mamba_n_heads", "mamba_num_heads"), 8),
    **{"mamba_d_head": 16, "mamba_head_dim": 16},
    **{"linear_num_heads": 4, "linear_head_dim": 16},
    **{"linear_num_key_heads": 2, "linear_num_value_heads": 4},
    **{"linear_key_head_dim": 16, "linear_value_head_dim": 16},
}
_LATENT = {"num_key_value_heads": 4}  # each head has its own key and value
_SPARSE = {"mlp_layer_types": ["dense", "sparse", "sparse"]}
_MORE = {
    **dict.fromkeys(
        ("axk1", "axk2", "deepseek_v2", "deepseek_v3", "deepseek_v32", "glm4_moe_lite"), _LATENT
    ),
    **dict.fromkeys(("glm_moe_dsa", "mistral4", "mistral_large4"), _LATENT),
    **dict.fromkeys(("beam", "deepseek_ocr2"), _SPARSE),
    "diffusion_gemma": {"per_layer_config": {}, "top_k_experts": TOP_K},
    "dots3_note": {
        **_LATENT,
        **{"swa_num_attention_heads": 4, "swa_num_key_value_heads": 4, "swa_head_dim": 32},
        **{"swa_q_lora_rank": 48, "swa_kv_lora_rank": 32},
        **{"swa_qk_nope_head_dim": 16, "swa_v_head_dim": 16, "head_dim": 32},
    },
    "ernie4_5_vl_moe": {
        "moe_intermediate_size": [INNER, 64],
        "rope_parameters": {
            **{"rope_type": "default", "rope_theta": 1e4},
            "mrope_section": [3, 3, 2],
        },
    },
    "flint": {"mlp_only_layers": [0]},
    "gemma4": {
        **{"enable_moe_block": True, "top_k_experts": TOP_K, "per_layer_config": {}},
        **{"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": VOCABULARY},
    },
    "glm5_next": {**_LATENT, **_SPARSE, "qk_rope_head_dim": 0},
    "glm4v_moe": {
        "rope_parameters": {
            **{"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5},
            "mrope_section": [1, 1, 2],
        }
    },
    "hy_v4_vl": {
        "rope_parameters": {
            **{"rope_type": "default", "rope_theta": 1e4},
            "mrope_section": [3, 3, 2],
        }
    },
    "lfm2_moe": {
        "layer_types": ["conv", "full_attention", "full_attention"],
        "num_dense_layers": 1,
    },
    "nemotron_h": {"moe_latent_size": 32},
    "zaya": {"num_experts_per_tok": 1},
}


@functools.cache
def families() -> list[str]:
    """The families that have experts modules for other implementations, by their folders."""
    files = sorted((Path(transformers.__file__).parent / "models").glob("*/modeling_*.py"))
    return [file.parent.name for file in files if _MARK.search(file.read_text())]


def tiny_model(family: str) -> PreTrainedModel:
    """A random model in fp32 whose weights are bf16 numbers, in evaluation mode.

    Where a family has no language model of its own, it is the language part of a larger model.
    """
    model_class = language_model(family)
    config_class = model_class.config_class
    known = {field.name for field in dataclasses.fields(config_class)} | {
        *config_class.attribute_map
    }
    sizes = {name: value for name, value in _SIZES.items() if name in known}
    config = config_class(**{**sizes, **_MORE.get(family, {})})
    # Small random weights give logits near zero, whose order is decided by rounding.
    config.initializer_range = 0.2
    torch.manual_seed(3)
    model = model_class(config).eval()
    with torch.no_grad():
        for tensor in model.state_dict().values():
            if tensor.is_floating_point():
                tensor.copy_(tensor.bfloat16())
    return model


def logits(model: PreTrainedModel, tokens: torch.Tensor) -> torch.Tensor:
    """``[1, tokens, vocabulary]``; a model without a head gets the embeddings as one."""
    output = model(input_ids=tokens, use_cache=False)
    own = getattr(output, "logits", None)
    if own is not None:
        return own
    return output.last_hidden_state @ model.get_input_embeddings().weight.T


def language_model(family: str) -> type[PreTrainedModel]:
    """The class of a family's language model."""
    module = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
    classes = [
        value
        for _, value in inspect.getmembers(module, inspect.isclass)
        if value.__module__ == module.__name__ and issubclass(value, PreTrainedModel)
    ]
    for ending in ("ForCausalLM", "TextModel", "Model"):
        for model_class in classes:
            if model_class.__name__.endswith(ending):
                return model_class
    raise LookupError(family)


def experts_modules(model: PreTrainedModel) -> Iterator[tuple[int, Any]]:
    """The experts modules, each with the number of its layer."""
    for name, module in model.named_modules():
        if hasattr(module, "has_gate") and hasattr(module, "is_concatenated"):
            yield int(re.search(r"layers\.(\d+)\.", name)[1]), module


def expert_weights(module: Any, index: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gate, up and down of an expert of a module, ``[N, K]`` in fp32; without a gate, up twice."""
    first = module.gate_up_proj if module.has_gate else module.up_proj
    gate_up, down = (
        (stack[index].T if module.is_transposed else stack[index]).float()
        for stack in (first.data, module.down_proj.data)
    )
    if not module.has_gate:
        return gate_up, gate_up, down
    return (*halves(module, gate_up), down)


def halves(module: Any, gate_up: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The rows of gate, and those of up."""
    if module.is_concatenated:
        gate, up = gate_up.chunk(2)
        return gate, up
    return gate_up[0::2], gate_up[1::2]
