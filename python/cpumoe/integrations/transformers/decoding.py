"""The host's generation loop, with our own sampling in the place of a checkpoint's."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from transformers import GenerationConfig, StoppingCriteriaList

from cpumoe.integrations.transformers.continuation import Continuation
from cpumoe.integrations.transformers.growing_text import StopWhen


def decode(
    model: Any,
    tokens: Sequence[int],
    continuation: Continuation,
    limit: int,
    cache: Any | None,
    cancelled: Callable[[], bool] | None,
) -> None:
    """Generates tokens until the text is at its end.

    Args:
        model: the host's causal language model.
        tokens: the prompt.
        continuation: chooses the tokens and takes them.
        limit: at most so many.
        cache: of a prompt whose beginning was read; None: the host reads all of it.
        cancelled: asked after each token.
    """
    ids = torch.tensor([tokens], device="cpu")
    # Left out, the host would choose from the 50 best tokens.
    choice = {"do_sample": True, "top_k": 0} if continuation.sampled else {"do_sample": False}
    begun = {} if cache is None else {"past_key_values": cache}
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
    """Keeps the host from filling in the checkpoint's settings: ours have read them already."""
    own, model.generation_config = model.generation_config, GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = own
