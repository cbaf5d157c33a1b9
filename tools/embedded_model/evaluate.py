"""Perplexity of a model on chapters."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from tokenizers import Tokenizer
from torch import nn


@torch.no_grad()
def perplexity(
    model: nn.Module, tokenizer: Tokenizer, texts: Iterable[str], context: int
) -> tuple[float, float]:
    """Returns perplexity per token and bits per byte; each text stands alone, cut to `context`."""
    loss = tokens = nbytes = 0.0
    for text in texts:
        ids = tokenizer.encode(text).ids[:context]
        logits = model(torch.tensor([ids]), use_cache=False).logits[0, :-1].float()
        loss += float(nn.functional.cross_entropy(logits, torch.tensor(ids[1:]), reduction="sum"))
        tokens += len(ids) - 1
        nbytes += len(tokenizer.decode(ids[1:]).encode())
    return math.exp(loss / tokens), loss / nbytes / math.log(2)
