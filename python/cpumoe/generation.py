"""Text generation as the command line and the server see it, whatever host runs the model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from cpumoe.seed import check_seed

Message = Mapping[str, str]
FinishReason = Literal["stop", "length", "cancelled"]
# Below, decoding is greedy: logits divided by less might overflow.
LEAST_TEMPERATURE = 1e-5


@dataclass(frozen=True)
class Sampling:
    """How the next tokens are chosen; None leaves the choice to the model's generation config.

    Attributes:
        max_new_tokens: at most this many tokens, at least 1; None: what the context has room for.
        temperature: divides the logits; 0 (and less than `LEAST_TEMPERATURE`) is greedy decoding.
        top_p: nucleus: the most probable tokens that together have this probability, in (0, 1].
        stop: strings that end the text and are not part of it.
        seed: of the random choice; the same seed, prompt and threads give the same text.

    Raises:
        ValueError: a value outside these ranges.
    """

    max_new_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    stop: tuple[str, ...] = ()
    seed: int | None = None

    def __post_init__(self) -> None:
        """Checks the values."""
        if self.max_new_tokens is not None and self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens: expected 1 or more, got {self.max_new_tokens}")
        # Written so that NaN fails as well.
        if self.temperature is not None and not 0 <= self.temperature <= 100:
            raise ValueError(f"temperature: expected 0 to 100, got {self.temperature}")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p: expected above 0 and at most 1, got {self.top_p}")
        if "" in self.stop:
            raise ValueError("stop: expected strings of at least one character, got an empty one")
        if self.seed is not None:
            check_seed(self.seed)


@dataclass(frozen=True)
class Generation:
    """A finished text.

    Attributes:
        text: what was generated, without the stop string or the end token.
        finish_reason: "stop" (the model ended, or a stop string came), "length" or "cancelled".
        prompt_tokens: tokens of the prompt.
        completion_tokens: tokens generated, an end token included.
        prefill_seconds: until the first token was chosen.
        decode_seconds: from then to the end.
        experts_seconds: of both, spent in cpumoe's experts.
    """

    text: str
    finish_reason: FinishReason
    prompt_tokens: int
    completion_tokens: int
    prefill_seconds: float
    decode_seconds: float
    experts_seconds: float


class TextModel(Protocol):
    """A model that continues text. Its methods are called by one thread at a time."""

    @property
    def name(self) -> str:
        """What clients call the model."""

    @property
    def context_length(self) -> int:
        """Tokens of prompt and continuation together."""

    def encode(self, text: str) -> list[int]:
        """Returns the tokens of a prompt.

        Raises:
            ValueError: text that is none, such as half a surrogate pair.
        """

    def encode_chat(self, messages: Sequence[Message]) -> list[int]:
        """Returns the tokens of a conversation, up to where the assistant speaks.

        Args:
            messages: each with "role" ("system", "user", "assistant") and "content".

        Raises:
            ValueError: the model has no chat template, or its template refuses the messages; text
                as in `encode`.
        """

    def generate(
        self,
        prompt: Sequence[int],
        sampling: Sampling,
        *,
        on_text: Callable[[str], None] | None = None,
        cancelled: Callable[[], bool] | None = None,
    ) -> Generation:
        """Continues a prompt.

        Args:
            prompt: tokens, at least one and fewer than `context_length`.
            sampling: how tokens are chosen.
            on_text: called with each piece of text as soon as it is certain: whole characters,
                nothing that may turn out to be part of a stop string. The pieces joined are the
                result's text. What it raises ends the generation and reaches the caller.
            cancelled: asked after each token; True ends the generation.

        Raises:
            ValueError: an empty or too long prompt, or tokens that the model does not have.
        """


class StopStrings:
    """Cuts a growing text at the first of some strings that is complete.

    Of several that end together the longest counts, so the pieces that the text comes in make no
    difference. Text that may be the beginning of a stop string is held back until it is certain.
    """

    def __init__(self, stop: Sequence[str]) -> None:
        """Cuts at the first of `stop`; at none if it is empty."""
        self._stop = tuple(stop)
        self._held = ""
        self.found = False

    def feed(self, piece: str) -> str:
        """Takes the next piece of text; returns what of the text so far has become certain."""
        if self.found:
            return ""
        text = self._held + piece
        hits = [(text.find(stop), stop) for stop in self._stop]
        ends = [(at + len(stop), at) for at, stop in hits if at >= 0]
        if ends:
            self.found = True
            self._held = ""
            return text[: min(ends)[1]]
        keep = max((_overlap(text, stop) for stop in self._stop), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def flush(self, piece: str = "") -> str:
        """Takes the last piece of text; returns all that is left."""
        text = self.feed(piece)
        held, self._held = self._held, ""
        return text + held


def _overlap(text: str, stop: str) -> int:
    """Length of the longest proper beginning of `stop` that `text` ends with."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)
