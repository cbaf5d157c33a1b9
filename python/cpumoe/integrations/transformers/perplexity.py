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
    """What `perplexity` found.

    Attributes:
        perplexity: ``exp`` of the mean negative log-likelihood.
        nats_per_token: that mean.
        scored_tokens: tokens that were predicted.
        seconds: wall time.
        tokens_per_second: tokens computed, context that is not scored included, by `seconds`.
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
    """Returns a causal model's perplexity of a text.

    The text is cut into windows; each token is scored once, given those before it in its window.

    Args:
        model: called as ``model(input_ids).logits``.
        tokens: the text, at least two tokens.
        window: tokens per forward pass, at least 2.
        stride: new tokens per window, 1 to `window`; the rest repeats the window before as context.
            Default: `window`, the fastest.
        progress: called with (tokens scored, tokens to score).

    Raises:
        ValueError: too short a text, or a window or stride out of range.
    """
    stride = window if stride is None else stride
    if len(tokens) < 2:
        raise ValueError(f"text: expected at least 2 tokens, got {len(tokens)}")
    if window < 2:
        raise ValueError(f"window: expected 2 or more, got {window}")
    if not 1 <= stride <= window:
        raise ValueError(f"stride: expected 1 to the window's {window}, got {stride}")
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
    """First token of each window, and how many of its last tokens it scores."""
    windows, done = [], 1  # nothing comes before the first token
    begin = 0
    while done < length:
        end = min(begin + window, length)
        windows.append((begin, end - done))
        done = end
        # One token of context at least: the first of a window cannot be scored.
        begin = min(begin + stride, done - 1)
    return windows
