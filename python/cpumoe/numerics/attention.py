"""Attention in PyTorch, independent of the C++, and the greatest error of a correct kernel.

With u = 2^-24 and n keys, a kernel in fp32 has these errors:
  1. A score s = scale q k is off by at most ds = u ((head_size + 1) scale |q| |k| + 3 |s|), plus
     u |mask|. A soft cap has a derivative of at most 1, and adds 8 u |s|.
  2. A weight exp(s - m) is off by a factor of at most exp(2 ds + 8 u): the error of s, that of m,
     the rounding of s - m where the weight counts (x exp(-x) < 1), and that of exp.
  3. Sums of weights and of weighted values add at most (n + blocks + 4) u of the sums of sizes,
     where rescaling adds a rounding per block of 32 keys or more.
The result is a weighted mean of v. It is therefore off by at most the weighted mean of |v| times
2 (2 ds + 8 u) + 2 (n + n / 32 + 8) u, plus the rounding to the output's dtype. Here ds is the
greatest one of the row.
"""

from __future__ import annotations

import torch

_UNIT = 2.0**-24
_ROUNDOFF = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float32: 0.0}


def visible_keys(queries: int, keys: int, window: int = 0) -> torch.Tensor:
    """Returns which keys a query of causal attention sees, bool ``[queries, keys]``.

    Args:
        queries: number of queries; the last one sees the last key.
        keys: number of keys.
        window: how many keys a query sees at most; 0: all before it.
    """
    query = torch.arange(queries, device="cpu")[:, None] + keys - queries
    key = torch.arange(keys, device="cpu")
    seen = key <= query
    return seen & (key > query - window) if window else seen


def reference_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    scale: float | None = None,
    causal: bool = False,
    window: int = 0,
    softcap: float = 0.0,
    mask: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Computes `cpumoe.attention` in fp64, with a matrix of scores.

    Returns:
        The result in fp64, and the greatest error that `cpumoe.attention` may have, both
        ``[batch, heads, queries, value_size]``.
    """
    dtype, (queries, head_size), keys = q.dtype, q.shape[2:], k.shape[2]
    group = q.shape[1] // k.shape[1]
    q, k, v = q.double(), *(t.double().repeat_interleave(group, 1) for t in (k, v))
    scale = head_size**-0.5 if scale is None else scale
    scores = scale * q @ k.mT
    sizes = abs(scale) * q.abs() @ k.abs().mT
    error = _UNIT * ((head_size + 1) * sizes + 3 * scores.abs())
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
        error += 8 * _UNIT * scores.abs()
    seen = torch.ones(queries, keys, dtype=torch.bool, device="cpu")
    if causal:
        seen = visible_keys(queries, keys, window)
    if mask is not None and mask.dtype == torch.bool:
        seen = seen & mask
    elif mask is not None:
        scores = scores + mask.double()
        error += _UNIT * (mask.double().abs() + scores.abs()).nan_to_num(posinf=0.0)
    scores = scores.masked_fill(~seen, float("-inf"))
    error = error.masked_fill(scores == float("-inf"), 0.0)
    rows = scores
    if sinks is not None:
        sink = sinks.double().reshape(1, -1, 1, 1).expand(*scores.shape[:3], 1)
        rows = torch.cat((scores, sink), -1)
    # A row that sees nothing is zero, not NaN.
    weights = torch.softmax(rows, -1)[..., :keys]
    weights = weights.masked_fill((rows == float("-inf")).all(-1, keepdim=True), 0.0)
    result = weights @ v
    worst = error.amax(-1, keepdim=True) if keys else torch.zeros_like(result[..., :1])
    factor = 2 * (2 * worst + 8 * _UNIT) + 2 * (keys + keys / 32 + 8) * _UNIT
    bound = factor * (weights @ v.abs()) + _ROUNDOFF[dtype] * result.abs()
    # The least steps of the output's dtype and of fp32 sums.
    return result, bound + (2.0**-24 if dtype == torch.float16 else 2.0**-120)
