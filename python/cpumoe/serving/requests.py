"""A request's fields, and what of them cannot be honoured."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from typing import Annotated, Any

from pydantic import BeforeValidator

from cpumoe.generation import Sampling
from cpumoe.serving.errors import invalid

_MOST_STOPS = 4
# No vocabulary has as many; which tokens there are is the model's to say.
_TOKENS = 2**31


def refuse_unsupported(
    extra: Mapping[str, Any] | None,
    neutral: Mapping[str, Collection[Any]],
    ignored: Collection[str],
) -> None:
    """Refuses fields that ask for what we do not do.

    Args:
        extra: the request's fields that are not read.
        neutral: fields that we know but cannot honour, and their values that ask for nothing.
        ignored: fields that may say anything, because they do not change the answer.

    Raises:
        ApiError: names the field.
    """
    for name, value in (extra or {}).items():
        if value is None or name in ignored:
            continue
        if name not in neutral:
            raise invalid(f"unknown parameter: {name!r}", name, "unknown_parameter")
        accepted = neutral[name]
        if not any(_same(value, harmless) for harmless in accepted):
            only = " or ".join(json.dumps(neutral_value) for neutral_value in accepted)
            problem = f"this server supports only {only}" if only else "not supported"
            raise invalid(f"{name}: {problem}; leave it out", name, "unsupported_parameter")


def _same(value: Any, other: Any) -> bool:
    # Python's 0 is False; as a number of log probabilities it asks for the chosen token's own.
    return value == other and isinstance(value, bool) == isinstance(other, bool)


def make_sampling(
    max_new_tokens: int | None,
    temperature: float | None,
    top_p: float | None,
    stop: tuple[str, ...] | None,
    seed: int | None,
) -> Sampling:
    """Returns the sampling that a request asks for.

    Raises:
        ApiError: a value out of its range.
    """
    try:
        return Sampling(max_new_tokens, temperature, top_p, stop or (), seed)
    except ValueError as error:
        raise invalid(str(error), str(error).split(":")[0]) from None


def _stop_strings(value: Any) -> Any:
    stops = [value] if isinstance(value, str) else value
    if stops is None:
        return None
    if not isinstance(stops, list) or not all(isinstance(stop, str) for stop in stops):
        raise ValueError("expected a string or a list of strings")
    if len(stops) > _MOST_STOPS:
        raise ValueError(f"expected at most {_MOST_STOPS} strings, got {len(stops)}")
    return tuple(stops)


def _prompt(value: Any) -> Any:
    # One prompt in a list is common, and is one prompt.
    if isinstance(value, list) and len(value) == 1 and isinstance(value[0], (str, list)):
        value = value[0]
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise ValueError("expected a string or a list of token ids")
    kinds = set(map(type, value))
    if kinds & {str, list}:
        raise ValueError("several prompts in one request are not supported: send one each")
    if kinds - {int} or min(value, default=0) < 0 or max(value, default=0) >= _TOKENS:
        raise ValueError("expected a string or a list of token ids, integers of 0 or more")
    return value


def _optional_prompt(value: Any) -> Any:
    return None if value is None else _prompt(value)


def _message_text(value: Any) -> Any:
    """A message's content; the texts of its parts are joined by line ends."""
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise ValueError("expected a string or a list of text parts")
    texts = []
    for index, part in enumerate(value):
        kind = part.get("type") if isinstance(part, dict) else part
        if kind != "text":
            raise ValueError(f"part {index}: only parts of type 'text' are supported, got {kind!r}")
        text = part.get("text")
        if not isinstance(text, str):
            raise ValueError(f"part {index}: text: expected a string")
        texts.append(text)
    return "\n".join(texts)


StopStringsField = Annotated[Any, BeforeValidator(_stop_strings)]
Prompt = str | list[int]
PromptField = Annotated[Any, BeforeValidator(_prompt)]
OptionalPromptField = Annotated[Any, BeforeValidator(_optional_prompt)]
MessageText = Annotated[str, BeforeValidator(_message_text)]
