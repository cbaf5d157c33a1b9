"""Parses the replies that servers send in a chat.

OpenAI's API is a stream of events. Each event is a JSON object, and the last one is "[DONE]". Other
servers deviate from it: fields are null, missing or of other types, an error is plain text or has
status 200, ``stream`` is ignored, content types are wrong. So the kind of a reply is read from its
body, events without content are skipped, and an unreadable reply is an error with a quotation.
"""

from __future__ import annotations

import dataclasses
import html
import json
import re
from collections.abc import Iterable, Iterator
from itertools import chain
from typing import Any

from cpumoe.text.generation import Piece, ToolCall

# The most bytes of one event or document: more than any answer has, yet few enough to keep.
MAX_BYTES = 16 << 20

_SSE_LINE = re.compile(rb"(data|event|id|retry)?:")
_DONE = "[DONE]"
_MESSAGE_KEYS = ("error", "message", "detail", "msg", "description")
_QUOTED_CHARACTERS = 300


class ReplyError(Exception):
    """A server reports an error, or its reply is unreadable. The message quotes the server."""


_NOTHING = Piece()


@dataclasses.dataclass(frozen=True)
class Part:
    """What one event adds to the answer.

    Attributes:
        piece: text, reasoning and tool calls.
        finish_reason: why the answer ends here; None: it goes on.
        tokens: number of tokens generated so far; None: unknown.
    """

    piece: Piece = _NOTHING
    finish_reason: str | None = None
    tokens: int | None = None


def read_reply(body: Iterable[bytes]) -> Iterator[Part]:
    """Yields the parts of an answer as they come.

    Args:
        body: the body of the server's reply, in pieces of any size.

    Raises:
        ReplyError: the reply is an error, is unreadable, or ends before the answer is complete.
    """
    lines = _lines(body)
    first = next((line for line in lines if line.strip()), b"").removeprefix(b"\xef\xbb\xbf")
    lines = chain([first], lines)
    if not _SSE_LINE.match(first):
        yield _whole(_joined(lines))
        return
    complete, unread = False, None
    for name, data in _events(lines):
        if data.strip() == _DONE:
            complete = True
            break
        document = _event(name, data)
        if not document:
            continue
        part = _part(document)
        if part == Part() and "choices" not in document:
            unread = document
        complete = complete or part.finish_reason is not None
        yield part
    if not complete:
        said = f"; the server sent: {quote(unread)}" if unread else ""
        raise ReplyError(f"the stream ended before the answer was complete{said}")


def read_body(body: Iterable[bytes]) -> bytes:
    """Returns the whole body of a reply.

    Raises:
        ReplyError: the body is longer than `MAX_BYTES`.
    """
    return _joined(_lines(body))


def quote(said: Any) -> str:
    """Returns the message in an error's body, or the beginning of the body.

    Args:
        said: the body, as text, bytes or decoded JSON.
    """
    if isinstance(said, bytes):
        said = said.decode(errors="replace")
    if isinstance(said, str):
        try:
            said = json.loads(said)
        except (ValueError, RecursionError):
            return _shorten(_without_markup(said))
    try:
        return _shorten(_message(said) or json.dumps(said, ensure_ascii=False))
    except RecursionError:
        return "deeply nested JSON"


def first_model(document: Any) -> str | None:
    """Returns the name of the first model in a list of models; None: there is none."""
    if isinstance(document, dict):
        document = document.get("data") or document.get("models")
    first = document[0] if isinstance(document, list) and document else None
    if isinstance(first, dict):
        first = next((first[key] for key in ("id", "model", "name") if first.get(key)), None)
    return first if isinstance(first, str) and first else None


class _Limit:
    """Counts the bytes that are kept until an event or document ends."""

    def __init__(self) -> None:
        self._left = MAX_BYTES

    def add(self, part: bytes) -> None:
        self._left -= len(part) + 1
        if self._left < 0:
            raise ReplyError(
                f"expected a reply or event of at most {MAX_BYTES >> 20} MiB, got more"
            )


def _lines(body: Iterable[bytes]) -> Iterator[bytes]:
    """Yields lines, which end with a line feed, or with a carriage return and a line feed."""
    line: list[bytes] = []
    limit = _Limit()
    for piece in body:
        for index, part in enumerate(piece.split(b"\n")):
            if index:
                yield b"".join(line).removesuffix(b"\r")
                line, limit = [], _Limit()
            line.append(part)
            limit.add(part)
    if any(line):
        yield b"".join(line)


def _joined(lines: Iterable[bytes]) -> bytes:
    kept: list[bytes] = []
    limit = _Limit()
    for line in lines:
        limit.add(line)
        kept.append(line)
    return b"\n".join(kept)


def _events(lines: Iterable[bytes]) -> Iterator[tuple[str, str]]:
    """Yields type and data of server-sent events. The last one needs no blank line at its end."""
    name, limit = "", _Limit()
    data: list[str] = []
    for line in chain(lines, [b""]):
        if not line:
            if data:
                yield name, "\n".join(data)
            name, data, limit = "", [], _Limit()
            continue
        limit.add(line)
        field, _, value = line.decode(errors="replace").partition(":")
        value = value.removeprefix(" ")
        if field == "data":
            data.append(value)
        elif field == "event":
            name = value


def _event(name: str, data: str) -> dict[str, Any]:
    """Returns an event's JSON object, which is empty for an event without content.

    Raises:
        ReplyError: the data is no JSON object, or the event reports an error.
    """
    if name == "error":
        raise ReplyError(quote(data) or "an error event without a message")
    try:
        document = json.loads(data) if data.strip() else None
    except (ValueError, RecursionError):
        raise ReplyError(f"expected JSON as an event's data, got: {quote(data)}") from None
    if not document:
        return {}
    if not isinstance(document, dict):
        raise ReplyError(f"expected a JSON object as an event's data, got: {quote(document)}")
    return document


def _whole(body: bytes) -> Part:
    """Returns the answer of a server that does not stream."""
    try:
        document = json.loads(body)
    except (ValueError, RecursionError):
        document = None
    if not isinstance(document, dict):
        raise ReplyError(f"expected an answer, got: {quote(body) or 'nothing'}")
    part = _part(document)
    if part == Part():
        raise ReplyError(f"expected an answer, got: {quote(document)}")
    return part if part.finish_reason else dataclasses.replace(part, finish_reason="stop")


def _part(document: dict[str, Any]) -> Part:
    """Returns an event's content. Missing fields and fields of other types count as empty.

    Raises:
        ReplyError: the event reports an error.
    """
    if document.get("error") or document.get("object") == "error":
        raise ReplyError(quote(document))
    choices = document.get("choices")
    choice = _object(choices[0]) if isinstance(choices, list) and choices else {}
    message = _object(choice.get("delta")) or _object(choice.get("message"))
    content = message.get("content") or message.get("refusal") or choice.get("text")
    tokens = _object(document.get("usage")).get("completion_tokens")
    reason = choice.get("finish_reason")
    return Part(
        Piece(_text(content), _reasoning(message), _tool_calls(message)),
        reason if isinstance(reason, str) and reason else None,
        tokens if isinstance(tokens, int) else None,
    )


def _text(content: Any) -> str:
    """Returns the text of a content, which may be a list of parts."""
    if isinstance(content, list):
        parts = (_object(part).get("text", part) for part in content)
        return "".join(part for part in parts if isinstance(part, str))
    return content if isinstance(content, str) else ""


def _reasoning(message: dict[str, Any]) -> str:
    text = _text(message.get("reasoning_content") or message.get("reasoning"))
    content = message.get("content")
    parts = content if isinstance(content, list) else []
    return text + "".join(_text(_object(part).get("thinking")) for part in parts)


def _tool_calls(message: dict[str, Any]) -> tuple[ToolCall, ...]:
    """Returns the tool calls that begin here. Later parts of a call have no name."""
    calls = message.get("tool_calls")
    calls = calls if isinstance(calls, list) else [{"function": message.get("function_call")}]
    functions = [_object(_object(call).get("function")) for call in calls]
    return tuple(
        ToolCall(function["name"], _text(function.get("arguments")))
        for function in functions
        if isinstance(function.get("name"), str) and function["name"]
    )


def _object(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _message(said: Any) -> str:
    """Returns the message in an error's body, whichever field has it; "": there is none."""
    if isinstance(said, str):
        return said
    if isinstance(said, list):
        return "; ".join(filter(None, map(_message, said)))
    fields = _object(said)
    texts = (_message(fields[key]) for key in _MESSAGE_KEYS if key in fields)
    return next(filter(None, texts), "")


def _without_markup(text: str) -> str:
    """Returns an HTML page's title, or else its text without tags; other text unchanged."""
    if not text.lstrip().startswith("<"):
        return text
    title = re.search(r"<title[^>]*>([^<]+)", text, re.IGNORECASE)
    return html.unescape(title[1] if title else re.sub(r"<[^>]*>", " ", text))


def _shorten(text: str) -> str:
    """Returns text on one line, cut to a readable length."""
    line = " ".join(text[: 4 * _QUOTED_CHARACTERS].split())
    cut = line[:_QUOTED_CHARACTERS]
    return cut if len(line) == len(cut) else f"{cut}…"
