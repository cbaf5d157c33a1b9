"""Who answers in a chat: a model in this process, or a server with OpenAI's API."""

from __future__ import annotations

import dataclasses
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from typing import TYPE_CHECKING, Any, Protocol

from cpumoe.generation import Message, Piece, Sampling, TextModel

if TYPE_CHECKING:
    from openai.types.chat import ChatCompletionChunk


class ChatError(Exception):
    """A question that got no answer; the conversation can go on."""


@dataclasses.dataclass
class Answer:
    """What came of a question.

    Attributes:
        text: all of it, or what came before Ctrl-C.
        finish_reason: "stop", "length", or "cancelled" by Ctrl-C.
        tokens: generated; None: the server does not say.
        first_seconds: until the first text.
        rest_seconds: from then to the end.
    """

    text: str = ""
    finish_reason: str = "cancelled"
    tokens: int | None = None
    first_seconds: float = 0.0
    rest_seconds: float = 0.0

    @property
    def tokens_per_second(self) -> float | None:
        """Speed after the first token, if it can be told."""
        if self.tokens is None or self.tokens < 2 or self.rest_seconds <= 0:
            return None
        return (self.tokens - 1) / self.rest_seconds


class ChatBackend(Protocol):
    """Answers questions."""

    @property
    def name(self) -> str:
        """The model's."""

    def answer(
        self, messages: Sequence[Message], sampling: Sampling, on_text: Callable[[str], None]
    ) -> Answer:
        """Answers the last message; Ctrl-C ends the answer, not the program.

        Args:
            messages: the conversation, ending with the user's question.
            sampling: how tokens are chosen.
            on_text: called with each piece of the answer's text.

        Raises:
            ChatError: there is none.
        """


class LocalBackend:
    """A model in this process."""

    def __init__(self, model: TextModel) -> None:
        """Takes a loaded model."""
        self._model = model
        self.name = model.name

    def answer(
        self, messages: Sequence[Message], sampling: Sampling, on_text: Callable[[str], None]
    ) -> Answer:
        """Answers the last message; see `ChatBackend`."""
        pieces = []

        def keep(piece: Piece) -> None:
            pieces.append(piece.text)
            on_text(piece.text)

        try:
            prompt = self._model.encode_chat(messages)
            with _interrupts() as interrupted:
                result = self._model.generate(
                    prompt, sampling, on_piece=keep, cancelled=interrupted
                )
        except ValueError as error:
            raise ChatError(str(error)) from error
        except KeyboardInterrupt:
            return Answer("".join(pieces))
        return Answer(
            result.text,
            result.finish_reason,
            result.completion_tokens,
            result.prefill_seconds,
            result.decode_seconds,
        )


@contextmanager
def _interrupts() -> Iterator[Callable[[], bool]]:
    """Yields a function that says whether Ctrl-C was pressed.

    The model then stops between two tokens, where it can be used again. A second Ctrl-C does not
    wait for that.
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


class ServerBackend:
    """A server with OpenAI's API."""

    def __init__(self, url: str, api_key: str | None, model: str | None) -> None:
        """Prepares to ask a server.

        Args:
            url: of the server or its API, as in ``http://127.0.0.1:8000/v1``.
            api_key: what it wants to see; None: nothing.
            model: which of its models answers; None: the first that it lists.

        Raises:
            ChatError: its models cannot be listed.
        """
        from openai import OpenAI

        self._url = _api_url(url)
        # The client insists on a key. It shall not try again by itself: the user sees what is
        # wrong, and /retry is at hand.
        self._client: Any = OpenAI(base_url=self._url, api_key=api_key or "-", max_retries=0)
        self.name = model or self._first_model()

    def answer(
        self, messages: Sequence[Message], sampling: Sampling, on_text: Callable[[str], None]
    ) -> Answer:
        """Answers the last message; see `ChatBackend`."""
        answer, start = Answer(), time.perf_counter()
        try:
            with self._errors(), closing(self._stream(messages, sampling)) as chunks:
                for text in _texts(chunks, answer):
                    if not answer.text:
                        answer.first_seconds = time.perf_counter() - start
                    answer.text += text
                    on_text(text)
        except KeyboardInterrupt:
            answer.finish_reason = "cancelled"
        answer.rest_seconds = time.perf_counter() - start - answer.first_seconds
        return answer

    def _stream(self, messages: Sequence[Message], sampling: Sampling) -> Any:
        wanted: dict[str, Any] = {
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "max_tokens": sampling.max_new_tokens,
            "seed": sampling.seed,
            "stop": list(sampling.stop) or None,
        }
        return self._client.chat.completions.create(
            model=self.name,
            messages=[dict(message) for message in messages],
            stream=True,
            stream_options={"include_usage": True},
            **{name: value for name, value in wanted.items() if value is not None},
        )

    def _first_model(self) -> str:
        with self._errors():
            for model in self._client.models.list():
                return str(model.id)
        raise ChatError(f"{self._url} lists no models: name one with --model-name")

    @contextmanager
    def _errors(self) -> Iterator[None]:
        """Turns the client's errors into one line each."""
        import httpx
        import openai

        try:
            yield
        except openai.APIStatusError as error:
            body = error.body if isinstance(error.body, dict) else {}
            message = body.get("message") or error.message
            raise ChatError(f"{self._url}: {error.status_code}: {message}") from error
        except openai.APIConnectionError as error:
            raise ChatError(f"{self._url}: {error.__cause__ or error}") from error
        except (openai.OpenAIError, httpx.HTTPError, httpx.InvalidURL) as error:
            raise ChatError(f"{self._url}: {error}") from error


def _texts(chunks: Iterator[ChatCompletionChunk], answer: Answer) -> Iterator[str]:
    """Yields a stream's texts and notes in `answer` what else it says."""
    for chunk in chunks:
        if chunk.usage is not None:
            answer.tokens = chunk.usage.completion_tokens
        for choice in chunk.choices[:1]:
            if choice.finish_reason is not None:
                answer.finish_reason = choice.finish_reason
            if choice.delta.content:
                yield choice.delta.content


def _api_url(url: str) -> str:
    """The API's address, where only the server's is given."""
    return url.rstrip("/") + ("/v1" if url.rstrip("/").count("/") < 3 else "")
