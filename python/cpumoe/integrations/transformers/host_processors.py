"""transformers' logits processors that only a checkpoint's generation config can request."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import (
    EpsilonLogitsWarper,
    EtaLogitsWarper,
    ExponentialDecayLengthPenalty,
    ForcedBOSTokenLogitsProcessor,
    ForcedEOSTokenLogitsProcessor,
    NoBadWordsLogitsProcessor,
    NoRepeatNGramLogitsProcessor,
    SequenceBiasLogitsProcessor,
    SuppressTokensAtBeginLogitsProcessor,
    SuppressTokensLogitsProcessor,
    TopHLogitsWarper,
    TypicalLogitsWarper,
)


@dataclass(frozen=True)
class Request:
    """The parameters of a request that processors need.

    Attributes:
        prompt_length: number of tokens of the prompt.
        limit: number of tokens of the prompt and of the longest text that may follow.
        ends: tokens that end the text.
    """

    prompt_length: int
    limit: int
    ends: tuple[int, ...]


@dataclass(frozen=True)
class Processor:
    """A setting, and transformers' class for it.

    Attributes:
        name: name of the setting in generation_config.json.
        make: returns the processor for a value.
        neutral: values without effect.
        narrows: whether it only narrows the choice of tokens, so that it follows the temperature.
    """

    name: str
    make: Callable[[Any, Request], Any]
    neutral: Sequence[Any] = ()
    narrows: bool = False


def _ends(request: Request) -> torch.Tensor:
    return torch.tensor(request.ends, dtype=torch.long, device="cpu")


# In transformers' order.
PROCESSORS = (
    Processor("sequence_bias", lambda value, _: SequenceBiasLogitsProcessor(value), ([], {})),
    Processor("no_repeat_ngram_size", lambda value, _: NoRepeatNGramLogitsProcessor(value), (0,)),
    Processor(
        "bad_words_ids",
        lambda value, request: NoBadWordsLogitsProcessor(value, _ends(request)),
        ([],),
    ),
    Processor("forced_bos_token_id", lambda value, _: ForcedBOSTokenLogitsProcessor(value)),
    Processor(
        "forced_eos_token_id",
        lambda value, request: ForcedEOSTokenLogitsProcessor(request.limit, value, device="cpu"),
    ),
    Processor(
        "exponential_decay_length_penalty",
        lambda value, request: ExponentialDecayLengthPenalty(
            tuple(value), _ends(request), request.prompt_length
        ),
    ),
    Processor(
        "suppress_tokens",
        lambda value, _: SuppressTokensLogitsProcessor(value, device="cpu"),
        ([],),
    ),
    Processor(
        "begin_suppress_tokens",
        lambda value, request: SuppressTokensAtBeginLogitsProcessor(
            value, request.prompt_length, device="cpu"
        ),
        ([],),
    ),
    Processor("top_h", lambda value, _: TopHLogitsWarper(value), narrows=True),
    Processor("typical_p", lambda value, _: TypicalLogitsWarper(value), (1,), narrows=True),
    Processor("epsilon_cutoff", lambda value, _: EpsilonLogitsWarper(value), (0,), narrows=True),
    Processor(
        "eta_cutoff", lambda value, _: EtaLogitsWarper(value, device="cpu"), (0,), narrows=True
    ),
)


def leaves_a_choice(processor: Any, vocabulary: int) -> bool:
    """Whether a processor leaves a token to choose, tried at several positions of a text."""
    for length in (1, 3, 4, 7):
        # Falling logits and a text without repetition make all tokens different.
        scores = torch.linspace(1, 0, vocabulary, dtype=torch.float32, device="cpu")[None]
        ids = torch.arange(length, device="cpu")[None] % vocabulary
        scores = processor(ids, scores)
        if scores.shape != (1, vocabulary) or not scores.max().isfinite():
            return False
    return True
