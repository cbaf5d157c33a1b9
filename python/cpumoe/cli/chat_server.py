"""The chat back end that asks a server with OpenAI's API."""

from __future__ import annotations

import json
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing, contextmanager
from typing import TYPE_CHECKING, Any

from cpumoe.cli.chat_backends import Answer, ChatError, Stopwatch
from cpumoe.cli.chat_connection import CONNECT_SECONDS, open_client, proxy_in_force
from cpumoe.cli.chat_reply import Part, ReplyError, first_model, quote, read_body, read_reply
from cpumoe.text.generation import Message, Piece, Sampling

if TYPE_CHECKING:
    import httpx2

_CHAT_PATH = "chat/completions"
_USAGE_OPTION = "stream_options"


class ServerBackend:
    """A server with OpenAI's API."""

    def __init__(self, url: str, api_key: str | None, model: str | None, timeout: float) -> None:
        """Prepares to ask a server.

        Args:
            url: the address of the server or its API, as in ``http://127.0.0.1:8000/v1``.
            api_key: the key to send; None: no key.
            model: the name of the model that answers; None: the first that the server lists.
            timeout: seconds that the server may be silent.

        Raises:
            ChatError: the server cannot be reached, or does not list its models.
        """
        self._timeout = timeout
        self._client = open_client(_api_url(url), api_key, timeout)
        # A password in the URL is left out.
        self.place = str(self._client.base_url.copy_with(userinfo=b"")).rstrip("/")
        # Some servers refuse options that they do not know.
        self._wants_usage = True
        self.name = model or self._first_model()

    def answer(
        self, messages: Sequence[Message], sampling: Sampling, on_piece: Callable[[Piece], None]
    ) -> Answer:
        """Answers the last message; see `ChatBackend`."""
        answer, watch = Answer(), Stopwatch()
        reason = "stop"
        try:
            with closing(self._parts(messages, sampling)) as parts:
                for part in parts:
                    reason = part.finish_reason or reason
                    answer.tokens = answer.tokens if part.tokens is None else part.tokens
                    if part.piece:
                        watch.piece()
                        answer.add(part.piece)
                        on_piece(part.piece)
            answer.finish_reason = reason
        except KeyboardInterrupt:
            answer.finish_reason = "cancelled"
        watch.stop(answer)
        return answer

    def _parts(self, messages: Sequence[Message], sampling: Sampling) -> Generator[Part]:
        with self._errors():
            while True:
                request = self._request(messages, sampling)
                with self._client.stream("POST", _CHAT_PATH, content=request) as response:
                    if response.is_success:
                        yield from read_reply(response.iter_bytes())
                        return
                    said = quote(read_body(response.iter_bytes()))
                if not (self._wants_usage and _USAGE_OPTION in said):
                    raise ReplyError(_status(response, said))
                self._wants_usage = False

    def _request(self, messages: Sequence[Message], sampling: Sampling) -> bytes:
        body: dict[str, Any] = {
            "model": self.name,
            "messages": [dict(message) for message in messages],
            "stream": True,
            _USAGE_OPTION: {"include_usage": True} if self._wants_usage else None,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "max_tokens": sampling.max_new_tokens,
            "seed": sampling.seed,
            "stop": list(sampling.stop) or None,
        }
        return json.dumps({name: v for name, v in body.items() if v is not None}).encode()

    def _first_model(self) -> str:
        with self._errors(), self._client.stream("GET", "models") as response:
            body = read_body(response.iter_bytes())
            if not response.is_success:
                raise ReplyError(_status(response, quote(body)))
            try:
                name = first_model(json.loads(body))
            except (ValueError, RecursionError):
                name = None
            if name is None:
                said = quote(body) or "nothing"
                raise ReplyError(
                    f"expected a list of models, got: {said}; name a model with --model-name"
                )
            return name

    @contextmanager
    def _errors(self) -> Iterator[None]:
        """Turns errors of the connection and of the reply into one line."""
        import httpx2

        try:
            yield
        except ReplyError as error:
            raise ChatError(f"{self.place}: {error}") from error
        except httpx2.ConnectTimeout as error:
            seconds = min(self._timeout, CONNECT_SECONDS)
            raise self._unreachable(f"no connection within {seconds:g} s") from error
        except httpx2.TimeoutException as error:
            raise ChatError(
                f"{self.place}: no reply for {self._timeout:g} s; --timeout sets a longer time"
            ) from error
        except (httpx2.ConnectError, httpx2.ProxyError, httpx2.UnsupportedProtocol) as error:
            raise self._unreachable(str(error)) from error
        except (httpx2.HTTPError, httpx2.InvalidURL, OSError) as error:
            raise ChatError(f"{self.place}: {str(error) or type(error).__name__}") from error

    def _unreachable(self, why: str) -> ChatError:
        proxy = proxy_in_force(self._client)
        hint = f"; the proxy that {proxy} names may be the cause" if proxy else ""
        return ChatError(f"{self.place}: {why}{hint}")


def _status(response: httpx2.Response, said: str) -> str:
    return f"{response.status_code}: {said or response.reason_phrase}"


def _api_url(url: str) -> str:
    """Returns the API's address, given that of the server, of the API or of its chat."""
    url = url.rstrip("/").removesuffix(f"/{_CHAT_PATH}")
    return url + ("/v1" if url.count("/") < 3 else "")
