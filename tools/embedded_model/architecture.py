"""The model: DeepSeek-V4 as published, with small sizes."""

from __future__ import annotations

from typing import Any

import torch
from transformers import DeepseekV4Config, DeepseekV4ForCausalLM

# config.json with the published checkpoint's keys. Layers alternate between its kinds of attention
# (0: window, 4: compressed sparse, 128: heavily compressed); the first one routes by token.
ARCHITECTURE: dict[str, Any] = {
    "architectures": ["DeepseekV4ForCausalLM"],
    "model_type": "deepseek_v4",
    "vocab_size": 2048,
    "hidden_size": 256,
    "moe_intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_hash_layers": 1,
    "compress_ratios": [0, 4, 128, 4],
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "head_dim": 64,
    "qk_rope_head_dim": 32,
    "q_lora_rank": 128,
    "o_groups": 2,
    "o_lora_rank": 64,
    "sliding_window": 128,
    "index_n_heads": 4,
    "index_head_dim": 32,
    "index_topk": 256,
    "n_routed_experts": 16,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "norm_topk_prob": True,
    "scoring_func": "sqrtsoftplus",
    "topk_method": "noaux_tc",
    "routed_scaling_factor": 1.5,
    "swiglu_limit": 10.0,
    "hidden_act": "silu",
    "hc_mult": 2,
    "hc_sinkhorn_iters": 4,
    "hc_eps": 1e-6,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000,
    "compress_rope_theta": 160000,
    "max_position_embeddings": 1024,
    "num_nextn_predict_layers": 0,
    "initializer_range": 0.03,
    "attention_bias": False,
    "attention_dropout": 0.0,
    "tie_word_embeddings": False,
    "use_cache": True,
    "torch_dtype": "bfloat16",
    "expert_dtype": "fp4",
}
# Only in the exported config.json: transformers takes it for a quantized model.
QUANTIZATION = {
    "activation_scheme": "dynamic",
    "fmt": "e4m3",
    "quant_method": "fp8",
    "scale_fmt": "ue8m0",
    "weight_block_size": [128, 128],
}


def build(architecture: dict[str, Any], seed: int) -> DeepseekV4ForCausalLM:
    """Returns an untrained float32 model whose hash layers route tokens evenly."""
    torch.manual_seed(seed)
    values = {k: v for k, v in architecture.items() if k not in ("architectures", "torch_dtype")}
    model = DeepseekV4ForCausalLM(DeepseekV4Config(**values))
    generator = torch.Generator().manual_seed(seed)
    for layer in model.model.layers:
        if layer.mlp.is_hash:
            layer.mlp.gate.tid2eid.copy_(_balanced(model.config, generator))
    return model


def _balanced(config: DeepseekV4Config, generator: torch.Generator) -> torch.Tensor:
    """``[vocab, top_k]``: distinct experts per token, every expert for as many tokens."""
    vocab, top_k, experts = config.vocab_size, config.num_experts_per_tok, config.n_routed_experts
    first = torch.arange(vocab) % experts
    step = 1 + torch.arange(vocab) // experts % max(1, experts // top_k)
    table = (first.unsqueeze(1) + step.unsqueeze(1) * torch.arange(top_k)) % experts
    return table[torch.randperm(vocab, generator=generator)]
