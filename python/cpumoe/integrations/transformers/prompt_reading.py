"""Reads a prompt with the model, in parts."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch

from cpumoe.integrations.transformers.kv_cache import CACHE, growing_cache

# About as many tokens as experts compute in one round. More tokens would not be faster there, and
# would slow down attention, whose matrices grow with a part.
PART_TOKENS = 2048
# The most logits at a time if all are requested (256 MiB in fp32).
_MOST_LOGITS = 1 << 26


class CancelledError(Exception):
    """The generation was cancelled."""


def read_prompt(
    model: Any,
    tokens: Sequence[int],
    *,
    cancelled: Callable[[], bool] | None = None,
    on_logits: Callable[[int, torch.Tensor], None] | None = None,
) -> Any | None:
    """Lets a model read a prompt except its end, which transformers' generation loop reads.

    Args:
        model: the transformers model.
        tokens: tokens of the prompt.
        cancelled: called between parts. If it returns True, the reading ends.
        on_logits: called with the index of a token and the logits ``[rows, vocabulary]`` that
            predict the tokens after it. If it is given, the whole prompt except its last token is
            read.

    Returns:
        The cache for transformers' `generate`; None: the prompt is one part, and was not read.

    Raises:
        CancelledError: `cancelled` returned True.
    """
    end = len(tokens) - 1
    part_tokens = PART_TOKENS
    if on_logits is not None:
        part_tokens = max(1, min(part_tokens, _MOST_LOGITS // num_logits(model)))
    elif len(tokens) <= part_tokens or not model._supports_default_dynamic_cache():
        return None
    else:
        # Whole parts are read here. transformers reads the rest, which has at least one token.
        end = end // part_tokens * part_tokens
    cache = growing_cache(model)
    keeps = "logits_to_keep" in inspect.signature(model.forward).parameters
    kept = {"logits_to_keep": 0 if on_logits is not None else 1} if keeps else {}
    for start in range(0, end, part_tokens):
        if start and cancelled is not None and cancelled():
            raise CancelledError
        ids = torch.tensor([tokens[start : min(start + part_tokens, end)]], device="cpu")
        outputs = model(input_ids=ids, use_cache=True, **{CACHE: cache}, **kept)
        if on_logits is not None:
            on_logits(start, outputs.logits[0])
    if end > 0 and cancelled is not None and cancelled():
        raise CancelledError
    return cache if end > 0 else None


def num_logits(model: Any) -> int:
    """Returns how many logits a model has for a token."""
    head = model.get_output_embeddings()
    features = getattr(head, "out_features", None)
    return int(head.weight.shape[0] if features is None else features)
