"""Runs transformers' generation loop with cpumoe's sampling instead of the checkpoint's."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from transformers import GenerationConfig, StoppingCriteriaList

from cpumoe.integrations.transformers.continuation import Continuation
from cpumoe.integrations.transformers.growing_text import StopWhen
from cpumoe.integrations.transformers.kv_cache import CACHE, growing_cache


def decode(
    model: Any,
    tokens: Sequence[int],
    continuation: Continuation,
    limit: int,
    cache: Any | None,
    cancelled: Callable[[], bool] | None,
) -> None:
    """Generates tokens until the text ends.

    Args:
        model: the transformers model.
        tokens: the prompt.
        continuation: chooses the tokens and takes them.
        limit: the most tokens to generate.
        cache: the cache, if the beginning of the prompt was read; None: transformers reads all.
        cancelled: called after each token.
    """
    ids = torch.tensor([tokens], device="cpu")
    # Without top_k, transformers would sample from the 50 most probable tokens.
    choice = {"do_sample": True, "top_k": 0} if continuation.sampled else {"do_sample": False}
    if cache is None and model._supports_default_dynamic_cache():
        cache = growing_cache(model)
    begun = {} if cache is None else {CACHE: cache}
    with _without_generation_config(model):
        model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            generation_config=GenerationConfig(max_new_tokens=limit, **choice),
            logits_processor=continuation.processors,
            stopping_criteria=StoppingCriteriaList([StopWhen(continuation.text, cancelled)]),
            **begun,
        )


@contextmanager
def _without_generation_config(model: Any) -> Iterator[None]:
    """Keeps transformers from adding the checkpoint's settings, which the continuation has."""
    own, model.generation_config = model.generation_config, GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = own
