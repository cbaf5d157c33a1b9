"""Back ends that answer in a chat: their interface, and the one for a model in this process.

`chat_server` has the other back end.
"""

from __future__ import annotations

import dataclasses
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

from cpumoe.text.generation import Message, Piece, Sampling, TextModel


class ChatError(Exception):
    """A question got no answer. The conversation can go on."""


@dataclasses.dataclass
class Answer:
    """The answer to a question.

    Attributes:
        text: the whole answer, or the part that came before Ctrl-C.
        finish_reason: "stop", "length", "cancelled" (by Ctrl-C), or another that a server sends.
        tokens: number of generated tokens; None: the server does not report it.
        first_seconds: time until the first piece.
        rest_seconds: time from the first piece to the end.
        reasoning: what the model wrote before its answer.
        tools: names of the functions that the model calls.
    """

    text: str = ""
    finish_reason: str = "cancelled"
    tokens: int | None = None
    first_seconds: float = 0.0
    rest_seconds: float = 0.0
    reasoning: str = ""
    tools: tuple[str, ...] = ()

    @property
    def tokens_per_second(self) -> float | None:
        """Speed after the first token; None: unknown."""
        if self.tokens is None or self.tokens < 2 or self.rest_seconds <= 0:
            return None
        return (self.tokens - 1) / self.rest_seconds

    @property
    def lack(self) -> str | None:
        """Why there is no text; None: there is, or the user stopped the answer."""
        if self.text or self.finish_reason == "cancelled":
            return None
        end = "" if self.finish_reason == "stop" else f" (finish reason {self.finish_reason})"
        if self.tools:
            called = ", ".join(dict.fromkeys(self.tools))
            return f"the model called tools, which a chat does not have: {called}{end}"
        if self.reasoning:
            return f"the model wrote reasoning, but no answer{end}"
        return f"the answer is empty{end}"

    def add(self, piece: Piece) -> None:
        """Appends a piece."""
        self.text += piece.text
        self.reasoning += piece.reasoning
        self.tools += tuple(call.name for call in piece.tool_calls)


class ChatBackend(Protocol):
    """Answers questions."""

    @property
    def name(self) -> str:
        """The model's name."""

    @property
    def place(self) -> str:
        """The subject of errors: a server's address, or the model's name."""

    def answer(
        self, messages: Sequence[Message], sampling: Sampling, on_piece: Callable[[Piece], None]
    ) -> Answer:
        """Answers the last message; Ctrl-C ends the answer, not the program.

        Args:
            messages: the conversation, ending with the user's question.
            sampling: how tokens are chosen.
            on_piece: called with each piece of the answer.

        Raises:
            ChatError: there is no answer, or it broke off; the message begins with `place`.
        """


class LocalBackend:
    """A model in this process."""

    def __init__(self, model: TextModel) -> None:
        """Takes a loaded model."""
        self._model = model
        self.name = self.place = model.name

    def answer(
        self, messages: Sequence[Message], sampling: Sampling, on_piece: Callable[[Piece], None]
    ) -> Answer:
        """Answers the last message; see `ChatBackend`."""
        answer = Answer()

        def keep(piece: Piece) -> None:
            answer.add(piece)
            on_piece(piece)

        try:
            prompt = self._model.encode_chat(messages)
            with _interrupts() as interrupted:
                result = self._model.generate(
                    prompt, sampling, on_piece=keep, cancelled=interrupted
                )
        except ValueError as error:
            raise ChatError(f"{self.place}: {error}") from error
        except KeyboardInterrupt:
            return answer
        answer.finish_reason = result.finish_reason
        answer.tokens = result.completion_tokens
        answer.first_seconds = result.prefill_seconds
        answer.rest_seconds = result.decode_seconds
        return answer


class Stopwatch:
    """Times an answer: until its first piece, and from there to its end."""

    def __init__(self) -> None:
        """Starts."""
        self._start = time.perf_counter()
        self._first: float | None = None

    def piece(self) -> None:
        """Notes that a piece has come."""
        if self._first is None:
            self._first = time.perf_counter()

    def stop(self, answer: Answer) -> None:
        """Writes both times into an answer."""
        end = time.perf_counter()
        first = end if self._first is None else self._first
        answer.first_seconds, answer.rest_seconds = first - self._start, end - first


@contextmanager
def _interrupts() -> Iterator[Callable[[], bool]]:
    """Yields a function that says whether Ctrl-C was pressed.

    The model asks this function between two tokens, where it can stop and be used again. A second
    Ctrl-C raises KeyboardInterrupt at once.
    """
    pressed = False

    def press(*_: Any) -> None:
        nonlocal pressed
        if pressed:
            raise KeyboardInterrupt
        pressed = True

    previous = signal.signal(signal.SIGINT, press)
    try:
        yield lambda: pressed
    finally:
        signal.signal(signal.SIGINT, previous)
