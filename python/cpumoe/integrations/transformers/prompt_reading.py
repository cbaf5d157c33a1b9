"""A prompt's way through the model, in parts."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import DynamicCache

# As many tokens as experts compute in one round, about: more at once is no faster there, and slower
# in attention, whose matrices grow with a part.
PART_TOKENS = 2048
# Where all logits are wanted, at most so many at a time (in fp32: 256 MiB).
_MOST_LOGITS = 1 << 26


class CancelledError(Exception):
    """Nobody waits for the answer any more."""


def read_prompt(
    model: Any,
    tokens: Sequence[int],
    *,
    cancelled: Callable[[], bool] | None = None,
    on_logits: Callable[[int, torch.Tensor], None] | None = None,
) -> Any | None:
    """Lets a model read a prompt but its end, which the host's generation loop reads.

    Args:
        model: the host's causal language model.
        tokens: of the prompt.
        cancelled: asked between parts; True ends the reading.
        on_logits: called with the number of tokens before the next one and the logits
            ``[rows, vocabulary]`` that predict it and those that follow; the whole prompt but its
            last token is read then.

    Returns:
        The host's cache, for its `generate`; None: nothing was read, the prompt is one part.

    Raises:
        CancelledError: `cancelled` said so.
    """
    end = len(tokens) - 1
    part_tokens = PART_TOKENS
    if on_logits is not None:
        part_tokens = max(1, min(part_tokens, _MOST_LOGITS // _vocabulary(model)))
    elif len(tokens) <= part_tokens or not model._supports_default_dynamic_cache():
        return None
    else:
        # Whole parts, and what is left over is the host's, as long as that is a token at least.
        end = end // part_tokens * part_tokens
    cache = DynamicCache(config=model.config.get_text_config(decoder=True))
    keeps = "logits_to_keep" in inspect.signature(model.forward).parameters
    kept = {"logits_to_keep": 0 if on_logits is not None else 1} if keeps else {}
    for start in range(0, end, part_tokens):
        if start and cancelled is not None and cancelled():
            raise CancelledError
        ids = torch.tensor([tokens[start : min(start + part_tokens, end)]], device="cpu")
        outputs = model(input_ids=ids, past_key_values=cache, use_cache=True, **kept)
        if on_logits is not None:
            on_logits(start, outputs.logits[0])
    if end > 0 and cancelled is not None and cancelled():
        raise CancelledError
    return cache if end > 0 else None


def _vocabulary(model: Any) -> int:
    return int(model.get_output_embeddings().weight.shape[0])
