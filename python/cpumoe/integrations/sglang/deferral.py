"""Which of a batch's experts run now, and which run while the GPU goes on to the next layer."""

from __future__ import annotations

import torch


def split(
    ids: torch.Tensor, weights: torch.Tensor, kept: int, num_experts: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Divides the (token, expert) pairs of a call.

    An expert runs now, for all tokens of the batch, if any token has it among its `kept` greatest
    weights. Its weights are then read from memory once. Among equal weights, the first count as
    the greater ones.

    Args:
        ids: ``[tokens, top_k]`` int32 or int64, from -1 to `num_experts`. These two ids name no
            expert.
        weights: ``[tokens, top_k]``.
        kept: experts of a token that run now, at least.
        num_experts: number of experts of the layer.

    Returns:
        The ids of the pairs that run now and of those that run later. Both are like `ids`, with -1
        for the pairs of the other.
    """
    if kept <= 0:
        return torch.full_like(ids, -1), ids
    greatest = weights.argsort(dim=-1, descending=True, stable=True)[:, :kept]
    runs_now = torch.zeros(num_experts + 1, dtype=torch.bool, device="cpu")
    runs_now[ids.gather(1, greatest).long()] = True  # -1 is the last one, like num_experts
    now = runs_now[ids.long()]
    return ids.masked_fill(~now, -1), ids.masked_fill(now, -1)
