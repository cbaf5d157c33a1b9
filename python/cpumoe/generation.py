"""Text generation as the command line and the server see it, whatever host runs the model."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from cpumoe.seed import check_seed

Message = Mapping[str, Any]
FinishReason = Literal["stop", "length", "cancelled"]
# Below, decoding is greedy: logits divided by less might overflow.
LEAST_TEMPERATURE = 1e-5


class ModelError(RuntimeError):
    """The model's files are at fault, not what it was asked for; the message names the file."""


@dataclass(frozen=True)
class Sampling:
    """How the next tokens are chosen; None leaves the choice to the model's generation config.

    Attributes:
        max_new_tokens: at most this many tokens; 0 only reads the prompt; None: what the context
            has room for.
        temperature: divides the logits; 0 (and less than `LEAST_TEMPERATURE`) is greedy decoding.
        top_p: nucleus: the most probable tokens that together have this probability, in (0, 1].
        stop: strings that end the text and are not part of it.
        seed: of the random choice; the same seed, prompt and threads give the same text.
        top_k: choose from this many most probable tokens; 0: from all.
        min_p: choose from tokens at least this many times as probable as the most probable one,
            0 to 1; 0: from all.
        repetition_penalty: divides positive logits of tokens that prompt or text have already, and
            multiplies negative ones; above 0, and 1 is none.
        min_tokens: until so many tokens are there, nothing ends the text but `max_new_tokens`.
        ignore_eos: the model's own end tokens do not end the text.
        stop_token_ids: tokens that end the text and are not part of it.
        skip_special_tokens: special tokens are no part of the text.
        logprobs: give each generated token's log probability, and this many most probable
            alternatives; 0: none of these. Probabilities are the model's own, before temperature,
            penalties and whatever else changes the choice.
        prompt_logprobs: likewise for the prompt's tokens, but the first, which nothing predicts.
        json_schema: JSON text of a schema; the text is a JSON document that it admits.

    Raises:
        ValueError: a value outside these ranges; the message begins with the attribute's name.
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
        # Written so that NaN fails as well.
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
        raise ValueError(f"json_schema: expected JSON, got text that is none: {error}") from None
    if not isinstance(schema, (dict, bool)):
        raise ValueError(f"json_schema: expected a JSON object, got {type(schema).__name__}")


@dataclass(frozen=True)
class ToolCall:
    """A function that the model wants to be called.

    Attributes:
        name: the function's.
        arguments: its arguments as JSON text, an object unless the model made a mistake.
    """

    name: str
    arguments: str


@dataclass(frozen=True)
class TokenLogprob:
    """How probable a token was.

    Attributes:
        token_id: which token.
        text: of this token alone; where its bytes are part of a character, replacement characters.
        raw: its bytes.
        logprob: natural logarithm of its probability; None: nothing predicts a prompt's first.
        top: the most probable tokens in its place, the most probable one first.
    """

    token_id: int
    text: str
    raw: bytes
    logprob: float | None
    top: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True)
class Piece:
    """What of a growing reply has become certain since the last piece.

    Attributes:
        text: of the answer.
        reasoning: what the model thinks before it answers.
        tool_calls: each of them whole.
        logprobs: of the tokens generated since the last piece.
        tokens: how many tokens were generated since the last piece.
    """

    text: str = ""
    reasoning: str = ""
    tool_calls: tuple[ToolCall, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()
    tokens: int = 0

    def __bool__(self) -> bool:
        """Whether there is anything in it."""
        return bool(self.text or self.reasoning or self.tool_calls or self.logprobs)


class ReplyParser(Protocol):
    """Takes one reply apart while it grows."""

    @property
    def answering(self) -> bool:
        """Whether what comes next is the answer, unless one of `openers` does."""

    @property
    def openers(self) -> Collection[str]:
        """Markers that may come next instead of the answer."""

    def feed(self, text: str) -> Piece:
        """Takes the next piece of text, special tokens included; returns what is certain by now."""

    def flush(self) -> Piece:
        """Returns what is left at the reply's end."""


class ReplyFormat(Protocol):
    """How a model writes reasoning, answer and tool calls into one text.

    Attributes:
        markers: what a parser has to see, where it is a token: special tokens are not text else.
    """

    @property
    def markers(self) -> Collection[str]:
        """See the class."""

    def parser(self) -> ReplyParser:
        """Returns a parser of one reply."""


@dataclass(frozen=True)
class Prompt:
    """What a model is asked to continue.

    Attributes:
        tokens: of the text.
        reply: how a chat's reply is taken apart; None: the text is given as it comes.
    """

    tokens: tuple[int, ...]
    reply: ReplyFormat | None = None


@dataclass(frozen=True)
class Generation:
    """A finished text.

    Attributes:
        text: what was generated, without the stop string or the end token; of a chat's reply, the
            answer.
        finish_reason: "stop" (the model ended, or a stop string came), "length" or "cancelled".
        prompt_tokens: tokens of the prompt.
        completion_tokens: tokens generated, an end token included.
        prefill_seconds: until the first token was chosen.
        decode_seconds: from then to the end.
        experts_seconds: of both, spent in cpumoe's experts.
        reasoning: what the model thought before it answered.
        tool_calls: functions that the model wants to be called.
        logprobs: of each generated token; None: not asked for.
        prompt_logprobs: of each token of the prompt; None: not asked for.
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
    """A model that continues text. Its methods are called by one thread at a time.

    Each of them may raise `ModelError`: the model's files make an answer impossible.
    """

    @property
    def name(self) -> str:
        """What clients call the model."""

    @property
    def context_length(self) -> int:
        """Tokens of prompt and continuation together."""

    def encode(self, text: str, *, add_special_tokens: bool = True) -> Prompt:
        """Returns the prompt of a text to continue.

        Args:
            text: any.
            add_special_tokens: put before it what the tokenizer puts before a text.

        Raises:
            ValueError: text that is none, such as half a surrogate pair.
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
            messages: in the shape of OpenAI's: each with "role" ("system", "user", "assistant" or
                "tool") and "content", and maybe "tool_calls", "tool_call_id", "name" and
                "reasoning_content".
            tools: functions that the model may call, in OpenAI's shape.
            template_arguments: for the chat template, such as ``{"enable_thinking": False}``.

        Raises:
            ValueError: the model has no chat template, or its template refuses the messages; text
                as in `encode`.
            ModelError: the template fails whatever the messages are.
        """

    def decode(self, tokens: Sequence[int]) -> str:
        """Returns the text of some tokens, special ones included.

        Raises:
            ValueError: tokens that the model does not have.
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
            prompt: of at least one token and fewer than `context_length`; where nothing shall be
                generated, `context_length` at most.
            sampling: how tokens are chosen.
            on_piece: called with each part of the reply as soon as it is certain: whole characters,
                nothing that may turn out to be part of a stop string. The pieces' fields joined are
                the result's. What it raises ends the generation and reaches the caller.
            cancelled: asked after each token, and between parts of a long prompt; True ends the
                generation.

        Raises:
            ValueError: an empty or too long prompt, tokens that the model does not have, or a
                sampling that it cannot honour.
        """
