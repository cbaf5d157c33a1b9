"""Turns the sampling of a request into transformers' logits processors."""

from __future__ import annotations

from typing import Any

import torch
from transformers import (
    LogitsProcessorList,
    MinNewTokensLengthLogitsProcessor,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from cpumoe.integrations.transformers.generation_settings import GenerationSettings
from cpumoe.integrations.transformers.host_processors import Request
from cpumoe.text.generation import LEAST_TEMPERATURE, ModelError, Sampling


def is_sampled(sampling: Sampling, settings: GenerationSettings) -> bool:
    """Whether tokens are drawn; False: the most probable one is taken."""
    if sampling.temperature is None:
        return settings.sample
    return sampling.temperature >= LEAST_TEMPERATURE


def min_new_tokens(sampling: Sampling, settings: GenerationSettings, prompt_length: int) -> int:
    """Returns the number of new tokens before which nothing ends the text."""
    return max(sampling.min_tokens, settings.min_new_tokens, settings.min_length - prompt_length, 0)


def logits_processors(
    sampling: Sampling,
    settings: GenerationSettings,
    request: Request,
    *,
    recorder: Any | None = None,
    grammar: Any | None = None,
) -> LogitsProcessorList:
    """Returns the logits processors of a request, in transformers' order.

    Args:
        sampling: the sampling of the request.
        settings: the checkpoint's defaults, for values that the request leaves open.
        request: the request's prompt length, limit and end tokens.
        recorder: the processor that sees the model's own logits.
        grammar: the processor that only admits tokens that fit a grammar. It comes after all
            processors that forbid or force tokens, so that it has the last word.
    """
    penalty = _first(sampling.repetition_penalty, settings.repetition_penalty)
    least = min_new_tokens(sampling, settings, request.prompt_length)
    made = [(p, p.make(value, request)) for p, value in settings.processors]
    processors: list[Any] = [check_logits]
    if recorder is not None:
        processors.append(recorder)
    if penalty != 1:
        processors.append(RepetitionPenaltyLogitsProcessor(float(penalty)))
    processors += [processor for p, processor in made if not p.narrows]
    if least > 0 and request.ends:
        ends = torch.tensor(request.ends, device="cpu")
        processors.append(MinNewTokensLengthLogitsProcessor(request.prompt_length, least, ends))
    if grammar is not None:
        processors.append(grammar)
    if is_sampled(sampling, settings):
        processors += _narrowing(sampling, settings)
        processors += [processor for p, processor in made if p.narrows]
    return LogitsProcessorList(processors)


def check_logits(_ids: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    """Returns the logits unchanged if they are numbers.

    Raises:
        ModelError: logits are NaN, so that any chosen token would be arbitrary.
    """
    if logits.max().isnan():
        raise ModelError(
            "the model computes NaN instead of probabilities; a weight file may be damaged, or "
            "values may exceed the range of the dtype"
        )
    return logits


def _narrowing(sampling: Sampling, settings: GenerationSettings) -> list[Any]:
    temperature = _first(sampling.temperature, settings.temperature)
    top_k = _first(sampling.top_k, settings.top_k)
    top_p = _first(sampling.top_p, settings.top_p)
    min_p = _first(sampling.min_p, settings.min_p)
    processors: list[Any] = []
    if temperature != 1:
        processors.append(TemperatureLogitsWarper(float(temperature)))
    if top_k > 0:
        processors.append(TopKLogitsWarper(int(top_k)))
    if top_p < 1:
        processors.append(TopPLogitsWarper(float(top_p)))
    if min_p > 0:
        processors.append(MinPLogitsWarper(float(min_p)))
    return processors


def _first(asked: float | None, configured: float) -> float:
    return configured if asked is None else asked
