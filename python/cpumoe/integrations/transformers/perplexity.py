"""Perplexity: how well a model predicts a text."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional


@dataclass(frozen=True)
class Perplexity:
    """The result of `perplexity`.

    Attributes:
        perplexity: ``exp`` of the mean negative log-likelihood.
        nats_per_token: mean negative log-likelihood.
        scored_tokens: number of tokens that were predicted.
        seconds: wall time.
        tokens_per_second: all computed tokens, including context that is not scored, by `seconds`.
    """

    perplexity: float
    nats_per_token: float
    scored_tokens: int
    seconds: float
    tokens_per_second: float


def perplexity(
    model: Any,
    tokens: Sequence[int],
    *,
    window: int,
    stride: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Perplexity:
    """Returns a causal model's perplexity on a text.

    The text is cut into windows. Each token but the first is scored once, given the tokens before
    it in its window.

    Args:
        model: called as ``model(input_ids).logits``.
        tokens: the text, at least two tokens.
        window: tokens per forward pass, at least 2.
        stride: new tokens per window, 1 to `window`. The other tokens of a window repeat the window
            before as context. Default: `window`, which is the fastest.
        progress: called with (tokens scored, tokens to score).

    Raises:
        ValueError: the text is too short, or window or stride is out of range.
    """
    stride = window if stride is None else stride
    if len(tokens) < 2:
        raise ValueError(f"text: expected at least 2 tokens, got {len(tokens)}")
    if window < 2:
        raise ValueError(f"window: expected 2 or more, got {window}")
    if not 1 <= stride <= window:
        raise ValueError(f"stride: expected 1 to {window}, the window, got {stride}")
    total, scored, computed = 0.0, 0, 0
    start = time.perf_counter()
    for begin, new in _windows(len(tokens), window, stride):
        ids = torch.tensor([list(tokens[begin : begin + window])], device="cpu")
        with torch.inference_mode():
            logits = model(ids, use_cache=False).logits[0, -new - 1 : -1]
        total += float(
            functional.cross_entropy(logits.float(), ids[0, -new:], reduction="none").double().sum()
        )
        scored += new
        computed += ids.shape[1]
        if progress is not None:
            progress(scored, len(tokens) - 1)
    seconds = time.perf_counter() - start
    mean = total / scored
    return Perplexity(math.exp(mean), mean, scored, seconds, computed / seconds)


def _windows(length: int, window: int, stride: int) -> list[tuple[int, int]]:
    """Returns the first token of each window, and how many of its last tokens are scored."""
    windows, done = [], 1  # nothing comes before the first token
    begin = 0
    while done < length:
        end = min(begin + window, length)
        windows.append((begin, end - done))
        done = end
        # At least one token of context, because a window's first token cannot be scored.
        begin = min(begin + stride, done - 1)
    return windows
