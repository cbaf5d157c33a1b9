"""Fields of requests: the JSON values that they accept, and their conversion."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, Field

from cpumoe.text.generation import Sampling
from cpumoe.text.serving.body import StrictModel
from cpumoe.text.serving.errors import ApiError, invalid

_MOST_STOPS = 16
_MOST_STOP_TOKENS = 1024
_MOST_PROMPTS = 1024
# No vocabulary has so many tokens. The model checks whether a token exists.
_TOKENS = 2**31
# SGLang's value for all tokens.
_ALL_TOKENS = 2**30
_SEEDS = 2**63


def _integer(value: Any) -> Any:
    """Accepts 16.0 for 16, because JSON has one kind of numbers."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _unless_below(least: int) -> AfterValidator:
    """Treats numbers below `least` as if the field were left out."""
    return AfterValidator(lambda value: None if value is None or value < least else value)


Integer = Annotated[int, BeforeValidator(_integer)]
Count = Annotated[Integer, Field(ge=0)]
# At most as many alternatives to a token as OpenAI's chat offers.
TopLogprobs = Annotated[Integer, Field(ge=0, le=20)] | None
# -1, and in some requests 0, mean as many tokens as there is room for.
TokenLimit = Annotated[Annotated[Integer, Field(ge=-1)] | None, _unless_below(0)]
Seed = Annotated[Annotated[Integer, Field(ge=-1, lt=_SEEDS)] | None, _unless_below(0)]


def _top_k(value: int) -> int:
    return value if 0 <= value < _ALL_TOKENS else 0


TopK = Annotated[Annotated[Integer, Field(ge=-1)], AfterValidator(_top_k)]


def _stop_strings(value: Any) -> Any:
    stops = [value] if isinstance(value, str) else value
    if stops is None:
        return ()
    if not isinstance(stops, list) or not all(isinstance(stop, str) for stop in stops):
        raise ValueError("expected a string or a list of strings")
    if len(stops) > _MOST_STOPS:
        raise ValueError(f"expected at most {_MOST_STOPS} strings, got {len(stops)}")
    return tuple(stop for stop in stops if stop)


StopStrings = Annotated[Any, BeforeValidator(_stop_strings)]


def is_tokens(value: Any) -> bool:
    """Whether a value is a list of possible token ids."""
    return (
        isinstance(value, list)
        and set(map(type, value)) <= {int}
        and min(value, default=0) >= 0
        and max(value, default=0) < _TOKENS
    )


def _tokens(value: Any) -> Any:
    if not is_tokens(value):
        raise ValueError("expected a list of token ids, integers of 0 or more")
    return value


Tokens = Annotated[Any, BeforeValidator(_tokens)]


def _stop_tokens(value: Any) -> Any:
    if value is None:
        return ()
    _tokens(value)
    if len(value) > _MOST_STOP_TOKENS:
        raise ValueError(f"expected at most {_MOST_STOP_TOKENS} tokens, got {len(value)}")
    return tuple(value)


StopTokens = Annotated[Any, BeforeValidator(_stop_tokens)]


class SamplingFields(StrictModel):
    """The fields of sampling that have equal names in all protocols."""

    temperature: float | None = None
    top_p: float | None = None
    top_k: TopK | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    stop: StopStrings = ()
    stop_token_ids: StopTokens = ()
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None

    def sampling(self, names: Mapping[str, str], **others: Any) -> Sampling:
        """Returns the sampling of the request.

        Args:
            names: the request's names of attributes of `Sampling`, where they differ.
            **others: attributes that have no field here.

        Raises:
            ApiError: a value is out of its range. The message has the request's name of it.
        """
        # top_p 0 leaves the most probable token only.
        greedy = self.top_p == 0
        try:
            return Sampling(
                temperature=0.0 if greedy else self.temperature,
                top_p=None if greedy else self.top_p,
                top_k=self.top_k,
                min_p=self.min_p,
                repetition_penalty=self.repetition_penalty,
                stop=self.stop,
                stop_token_ids=self.stop_token_ids,
                ignore_eos=bool(self.ignore_eos),
                skip_special_tokens=self.skip_special_tokens is not False,
                **others,
            )
        except ValueError as error:
            subject, _, problem = str(error).partition(":")
            param = names.get(subject, subject)
            raise invalid(f"{param}:{problem}", param) from error


def choice_seed(seed: int | None, choice: int) -> int | None:
    """Returns the seed of one of several answers to a prompt, so that the answers differ.

    The first answer has the request's seed, as if only one were requested.
    """
    # An odd factor near 2**63 divided by the golden ratio, so that near seeds share no answers.
    return None if seed is None else (seed + choice * 0x4F1BBCDCBFA53E0B) % _SEEDS


def _prompts(value: Any) -> Any:
    """Returns the prompts of a request, each a text or a list of token ids."""
    if isinstance(value, str) or (value and is_tokens(value)):
        return [value]
    if not isinstance(value, list):
        raise ValueError("expected a string, a list of token ids, or a list of these")
    if not 0 < len(value) <= _MOST_PROMPTS:
        raise ValueError(f"expected 1 to {_MOST_PROMPTS} prompts, got {len(value)}")
    if not all(isinstance(prompt, str) for prompt in value) and not all(map(is_tokens, value)):
        raise ValueError("expected strings, or lists of token ids, integers of 0 or more")
    return value


Prompts = Annotated[Any, BeforeValidator(_prompts)]


def check_texts(prompts: int, answers: int, most: int, param: str) -> None:
    """Refuses requests for more texts than the queue can hold.

    Args:
        prompts: number of prompts.
        answers: number of answers to each prompt.
        most: number of texts that may wait and run together.
        param: the request's name of its prompts.

    Raises:
        ApiError: there are more texts. The message names the field.
    """
    if prompts * answers > most:
        name = "n" if answers > 1 else param
        raise ApiError(
            400,
            f"{name}: expected at most {most} texts per request, the size of this server's queue, "
            f"got {prompts * answers}; request fewer at once",
            param=name,
            code="too_many_texts",
        )
