"""The interface for text generation between the command line or server and a model."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from cpumoe._base.seed import check_seed

Message = Mapping[str, Any]
FinishReason = Literal["stop", "length", "cancelled"]
# Below this temperature decoding is greedy, because divided logits might overflow.
LEAST_TEMPERATURE = 1e-5


class ModelError(RuntimeError):
    """The model's files are at fault, not the request. The message names the file."""


@dataclass(frozen=True)
class Sampling:
    """How the next tokens are chosen. None leaves the choice to the model's generation config.

    Attributes:
        max_new_tokens: the most tokens to generate. 0: only read the prompt. None: as many as the
            context has room for.
        temperature: divides the logits. Less than `LEAST_TEMPERATURE` means greedy decoding.
        top_p: sample from the most probable tokens that together have this probability, in (0, 1].
        stop: strings that end the text and are not part of it.
        seed: seed of the sampling. Equal seed, prompt and threads give equal texts.
        top_k: sample from this many most probable tokens; 0: from all.
        min_p: sample from tokens at least this many times as probable as the most probable one,
            0 to 1; 0: from all.
        repetition_penalty: divides positive logits of tokens that are already in the prompt or the
            text, and multiplies negative ones. It is above 0; 1 has no effect.
        min_tokens: before this many tokens, only `max_new_tokens` ends the text.
        ignore_eos: whether the model's end tokens do not end the text.
        stop_token_ids: tokens that end the text and are not part of it.
        skip_special_tokens: whether special tokens are left out of the text.
        logprobs: whether to return each generated token's log probability (not None), and how many
            most probable alternatives beside it. Probabilities are the model's own, before
            temperature and penalties.
        prompt_logprobs: like `logprobs`, for the prompt's tokens except the first, which nothing
            predicts.
        json_schema: JSON text of a schema. The text is then a JSON document that it admits.

    Raises:
        ValueError: a value is outside these ranges. The message begins with the attribute's name.
    """

    max_new_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    stop: tuple[str, ...] = ()
    seed: int | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    min_tokens: int = 0
    ignore_eos: bool = False
    stop_token_ids: tuple[int, ...] = ()
    skip_special_tokens: bool = True
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    json_schema: str | None = None

    def __post_init__(self) -> None:
        """Checks the values."""
        for name in ("max_new_tokens", "top_k", "min_tokens", "logprobs", "prompt_logprobs"):
            count = getattr(self, name)
            if count is not None and count < 0:
                raise ValueError(f"{name}: expected 0 or more, got {count}")
        # These comparisons refuse NaN as well.
        if self.temperature is not None and not 0 <= self.temperature <= 100:
            raise ValueError(f"temperature: expected 0 to 100, got {self.temperature}")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p: expected above 0 and at most 1, got {self.top_p}")
        if self.min_p is not None and not 0 <= self.min_p <= 1:
            raise ValueError(f"min_p: expected 0 to 1, got {self.min_p}")
        if self.repetition_penalty is not None and not 0 < self.repetition_penalty <= 100:
            raise ValueError(
                f"repetition_penalty: expected above 0 and at most 100, "
                f"got {self.repetition_penalty}"
            )
        if "" in self.stop:
            raise ValueError("stop: expected strings of at least one character, got an empty one")
        if self.seed is not None:
            check_seed(self.seed)
        if self.json_schema is not None:
            _check_schema(self.json_schema)


def _check_schema(text: str) -> None:
    try:
        schema = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"json_schema: expected JSON: {error}") from None
    if not isinstance(schema, (dict, bool)):
        raise ValueError(f"json_schema: expected a JSON object, got {type(schema).__name__}")


@dataclass(frozen=True)
class ToolCall:
    """A function call that the model asks for.

    Attributes:
        name: name of the function.
        arguments: the arguments as JSON text, which is an object unless the model made a mistake.
    """

    name: str
    arguments: str


@dataclass(frozen=True)
class TokenLogprob:
    """How probable a token was.

    Attributes:
        token_id: the token's id.
        text: the token's text; replacement characters if its bytes are part of a character.
        raw: the token's bytes.
        logprob: natural logarithm of the probability; None for a prompt's first token, which
            nothing predicts.
        top: the most probable tokens at this position, the most probable one first.
    """

    token_id: int
    text: str
    raw: bytes
    logprob: float | None
    top: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True)
class Piece:
    """The part of a growing reply that has become certain since the last piece.

    Attributes:
        text: text of the answer.
        reasoning: what the model writes before its answer.
        tool_calls: complete tool calls.
        logprobs: log probabilities of the tokens generated since the last piece.
        tokens: number of tokens generated since the last piece.
    """

    text: str = ""
    reasoning: str = ""
    tool_calls: tuple[ToolCall, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()
    tokens: int = 0

    def __bool__(self) -> bool:
        """Whether the piece has any content."""
        return bool(self.text or self.reasoning or self.tool_calls or self.logprobs)


class ReplyParser(Protocol):
    """Splits one growing reply into reasoning, answer and tool calls."""

    @property
    def answering(self) -> bool:
        """Whether the next text belongs to the answer, unless it is one of `openers`."""

    @property
    def openers(self) -> Collection[str]:
        """Markers that may come next instead of text of the answer."""

    def feed(self, text: str) -> Piece:
        """Takes the next piece of text, with special tokens; returns what has become certain."""

    def flush(self) -> Piece:
        """Returns the rest at the end of the reply."""


class ReplyFormat(Protocol):
    """How a model writes reasoning, answer and tool calls into one text.

    Attributes:
        markers: texts of special tokens that a parser must see. Others are left out of the text.
    """

    @property
    def markers(self) -> Collection[str]:
        """Texts of special tokens that a parser must see."""

    def parser(self) -> ReplyParser:
        """Returns a parser of one reply."""


@dataclass(frozen=True)
class Prompt:
    """A prompt for a model to continue.

    Attributes:
        tokens: the prompt's tokens.
        reply: the format by which a chat's reply is split; None: the reply is plain text.
    """

    tokens: tuple[int, ...]
    reply: ReplyFormat | None = None


@dataclass(frozen=True)
class Generation:
    """A finished text.

    Attributes:
        text: the generated text, or a chat's answer, without the stop string or the end token.
        finish_reason: "stop" (the model ended, or a stop string came), "length" or "cancelled".
        prompt_tokens: number of tokens of the prompt.
        completion_tokens: number of generated tokens, an end token included.
        prefill_seconds: time until the first token was chosen.
        decode_seconds: time from the first token to the end.
        experts_seconds: the part of both times that was spent in cpumoe's experts.
        reasoning: what the model wrote before its answer.
        tool_calls: function calls that the model asks for.
        logprobs: log probabilities of the generated tokens; None: not requested.
        prompt_logprobs: log probabilities of the prompt's tokens; None: not requested.
    """

    text: str
    finish_reason: FinishReason
    prompt_tokens: int
    completion_tokens: int
    prefill_seconds: float
    decode_seconds: float
    experts_seconds: float
    reasoning: str = ""
    tool_calls: tuple[ToolCall, ...] = ()
    logprobs: tuple[TokenLogprob, ...] | None = None
    prompt_logprobs: tuple[TokenLogprob, ...] | None = None


class TextModel(Protocol):
    """A model that continues text. One thread at a time may call its methods.

    Each method may raise `ModelError` if the model's files make an answer impossible.
    """

    @property
    def name(self) -> str:
        """The model's name for clients."""

    @property
    def context_length(self) -> int:
        """The most tokens of prompt and continuation together."""

    def encode(self, text: str, *, add_special_tokens: bool = True) -> Prompt:
        """Returns the prompt of a text to continue.

        Args:
            text: any text.
            add_special_tokens: whether to add the special tokens that the tokenizer puts before a
                text.

        Raises:
            ValueError: `text` is not valid, such as half a surrogate pair.
        """

    def encode_chat(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] = (),
        template_arguments: Mapping[str, Any] | None = None,
    ) -> Prompt:
        """Returns the prompt of a conversation, up to where the assistant speaks.

        Args:
            messages: messages in OpenAI's format. Each has "role" ("system", "user", "assistant"
                or "tool") and "content", and optionally "tool_calls", "tool_call_id", "name" and
                "reasoning_content".
            tools: functions that the model may call, in OpenAI's format.
            template_arguments: variables of the chat template, such as ``{"enable_thinking":
                False}``.

        Raises:
            ValueError: the model has no chat template, the template refuses the messages, or a text
                is not valid (see `encode`).
            ModelError: the template fails for any messages.
        """

    def decode(self, tokens: Sequence[int]) -> str:
        """Returns the text of some tokens, special ones included.

        Raises:
            ValueError: the model does not have one of the tokens.
        """

    def generate(
        self,
        prompt: Prompt,
        sampling: Sampling,
        *,
        on_piece: Callable[[Piece], None] | None = None,
        cancelled: Callable[[], bool] | None = None,
    ) -> Generation:
        """Continues a prompt.

        Args:
            prompt: a prompt of at least one token and fewer than `context_length`. If nothing shall
                be generated, the prompt may have `context_length` tokens.
            sampling: how tokens are chosen.
            on_piece: called with each part of the reply as soon as it is certain: whole characters
                that cannot be part of a stop string. The fields of all pieces, joined, are those of
                the result. An exception of this function ends the generation and reaches the
                caller.
            cancelled: called after each token, and between parts of a long prompt. If it returns
                True, the generation ends.

        Raises:
            ValueError: the prompt is empty, too long, or has tokens that the model does not have;
                or the model does not support the sampling.
        """
