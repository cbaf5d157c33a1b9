"""The model's operators for training on a CPU: the same results as transformers', in less time.

transformers' DeepSeek-V4 runs eagerly and is written for GPUs. What costs most on a CPU is replaced
here: attention outside the window is not computed, experts' gradients are not accumulated through
copies of the whole stack, and rotary embeddings are complex products.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, eager_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.deepseek_v4 import modeling_deepseek_v4 as v4

NAME = "cpu_training"


def experts_forward(
    module: Any,
    hidden_states: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
) -> torch.Tensor:
    """Routed experts: tokens sorted by expert, one pair of products per expert."""
    tokens, top_k = top_k_index.shape
    order = top_k_index.flatten().argsort(stable=True)
    counts = torch.bincount(top_k_index.flatten(), minlength=module.num_experts).tolist()
    inputs = hidden_states.index_select(0, order // top_k).split(counts)
    outputs = [
        F.linear(module._apply_gate(F.linear(x, gate_up)), down)
        for x, gate_up, down in zip(
            inputs, module.gate_up_proj.unbind(0), module.down_proj.unbind(0), strict=True
        )
    ]
    sorted_outputs = torch.cat(outputs)
    by_token = sorted_outputs.index_select(0, order.argsort()).view(tokens, top_k, -1)
    return torch.bmm(top_k_weights.unsqueeze(1), by_token).squeeze(1)


def attention_forward(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor,
    scaling: float,
    **options: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Attention in blocks as long as the window: a block sees itself and the one before it.

    Args:
        module: has `sinks` and `sliding_window`.
        query: ``[B, heads, S, D]``; unless S is a multiple of the window, transformers computes.
        key: ``[B, 1, S + C, D]``: S tokens, then C compressed entries; also the values.
        value: the same tensor.
        attention_mask: additive; only its last C columns are read, the window is known.
        scaling: of the scores.
        options: others of transformers', not needed here.
    """
    batch, heads, length, dim = query.shape
    window = module.sliding_window
    if length % window:
        result: tuple[torch.Tensor, torch.Tensor] = v4.eager_attention_forward(
            module, query, key, value, attention_mask, scaling, **options
        )
        return result
    blocks = length // window
    kv = key.squeeze(1)
    local, compressed = kv[:, :length], kv[:, length:]
    local = F.pad(local, (0, 0, window, 0)).unfold(1, 2 * window, window)  # [B, blocks, D, 2W]
    query = (query * scaling).view(batch, heads, blocks, window, dim).transpose(1, 2)
    query = query.reshape(batch, blocks, heads * window, dim)
    scores = torch.matmul(query, local).view(batch, blocks, heads, window, 2 * window)
    pieces = [scores + _window_mask(blocks, window)]
    entries = compressed.shape[1]
    if entries:
        distant = query.reshape(batch, -1, dim) @ compressed.transpose(1, 2)
        mask = attention_mask[..., length:].reshape(-1, blocks, 1, window, entries)
        pieces.append(distant.view(batch, blocks, heads, window, entries) + mask)
    pieces.append(module.sinks.view(1, 1, -1, 1, 1).expand(batch, blocks, -1, window, 1))
    # Splitting has a cheap gradient; every slice's would be a tensor full of zeros.
    near, far, _ = torch.cat(pieces, -1).softmax(-1).split((2 * window, entries, 1), -1)
    near = near.reshape(batch, blocks, heads * window, 2 * window)
    output = torch.matmul(near, local.transpose(2, 3))
    if entries:
        output = output + (far.reshape(batch, -1, entries) @ compressed).view_as(output)
    output = output.view(batch, blocks, heads, window, dim).transpose(2, 3)
    return output.reshape(batch, length, heads, dim), None


def _window_mask(blocks: int, window: int) -> torch.Tensor:
    """``[blocks, 1, window, 2 * window]``: 0 or -inf; the first block has none before it."""
    distance = torch.arange(window).unsqueeze(1) + window - torch.arange(2 * window)
    seen = (distance >= 0) & (distance < window)
    masks = seen.expand(blocks, 1, -1, -1).clone()
    masks[0, ..., :window] = False
    return torch.zeros(masks.shape).masked_fill_(~masks, float("-inf"))


def rotary(
    x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, unsqueeze_dim: int = 1
) -> torch.Tensor:
    """Interleaved rotary embedding of the last ``2 * cos.shape[-1]`` channels."""
    dim = 2 * cos.shape[-1]
    turn = torch.complex(cos, sin).unsqueeze(unsqueeze_dim)
    pairs = x[..., -dim:].unflatten(-1, (-1, 2)).contiguous()
    turned = torch.view_as_real(torch.view_as_complex(pairs) * turn).flatten(-2)
    return torch.cat([x[..., :-dim], turned], dim=-1)


def install(model: Any) -> None:
    """Makes `model` use these operators; rotary embeddings change for all float32 models."""
    ALL_EXPERTS_FUNCTIONS.register(NAME, experts_forward)
    ALL_ATTENTION_FUNCTIONS.register(NAME, attention_forward)
    ALL_MASK_ATTENTION_FUNCTIONS.register(NAME, eager_mask)
    v4.apply_rotary_pos_emb = rotary
    model.set_experts_implementation(NAME)
    model.config._attn_implementation = NAME
