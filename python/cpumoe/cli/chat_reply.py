"""What servers send as the reply to a chat, taken apart.

OpenAI's API is a stream of events, each a JSON object, the last one "[DONE]". What other servers
make of it differs: fields are null, missing or of other types, an error is a text or has a status
of 200, ``stream`` is ignored, content types are wrong. So the body decides what it is, what says
nothing is passed over, and what cannot be read is an error that quotes the server.
"""

from __future__ import annotations

import dataclasses
import html
import json
import re
from collections.abc import Iterable, Iterator
from itertools import chain
from typing import Any

from cpumoe.generation import Piece, ToolCall

# Bytes of one event or document: much more than any answer has, and little enough to be kept.
MAX_BYTES = 16 << 20

_SSE_LINE = re.compile(rb"(data|event|id|retry)?:")
_DONE = "[DONE]"
_MESSAGE_KEYS = ("error", "message", "detail", "msg", "description")
_QUOTED_CHARACTERS = 300


class ReplyError(Exception):
    """A server that reports an error, or says what nobody can read; the message quotes it."""


_NOTHING = Piece()


@dataclasses.dataclass(frozen=True)
class Part:
    """What one event adds to the answer.

    Attributes:
        piece: text, reasoning and calls of tools.
        finish_reason: why the answer ends here; None: it goes on.
        tokens: generated so far; None: not said.
    """

    piece: Piece = _NOTHING
    finish_reason: str | None = None
    tokens: int | None = None


def read_reply(body: Iterable[bytes]) -> Iterator[Part]:
    """Yields the parts of an answer as they come.

    Args:
        body: of the server's reply, in pieces of any size.

    Raises:
        ReplyError: the server reports an error, cannot be understood, or ends in the middle.
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
        said = f"; it said: {quote(unread)}" if unread else ""
        raise ReplyError(f"the stream ended before the answer did{said}")


def read_body(body: Iterable[bytes]) -> bytes:
    """Returns the whole body of a reply.

    Raises:
        ReplyError: it is longer than `MAX_BYTES`.
    """
    return _joined(_lines(body))


def quote(said: Any) -> str:
    """Returns what a server says in an error's body, or the body's beginning.

    Args:
        said: the body: text, bytes, or what JSON decodes to.
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
    """Returns the name of the first model in a list of models; None: there is none to be found."""
    if isinstance(document, dict):
        document = document.get("data") or document.get("models")
    first = document[0] if isinstance(document, list) and document else None
    if isinstance(first, dict):
        first = next((first[key] for key in ("id", "model", "name") if first.get(key)), None)
    return first if isinstance(first, str) and first else None


class _Limit:
    """Counts bytes that must be kept until something ends."""

    def __init__(self) -> None:
        self._left = MAX_BYTES

    def add(self, part: bytes) -> None:
        self._left -= len(part) + 1
        if self._left < 0:
            raise ReplyError(f"expected at most {MAX_BYTES >> 20} MiB without an end, got more")


def _lines(body: Iterable[bytes]) -> Iterator[bytes]:
    """Yields lines without their ends, which are those of JSON and of events: no others."""
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
    """Yields type and data of server-sent events, the last one even if nothing ends it."""
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
    """Returns the object that an event is; an empty one if it says nothing.

    Raises:
        ReplyError: it is none, or an error.
    """
    if name == "error":
        raise ReplyError(quote(data) or "an error event without a word")
    try:
        document = json.loads(data) if data.strip() else None
    except (ValueError, RecursionError):
        raise ReplyError(f"expected events of JSON, got: {quote(data)}") from None
    if not document:
        return {}
    if not isinstance(document, dict):
        raise ReplyError(f"expected events that are JSON objects, got: {quote(document)}")
    return document


def _whole(body: bytes) -> Part:
    """Returns the answer of a server that sends it at once."""
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
    """Returns what an event says, whatever is missing in it or of another type.

    Raises:
        ReplyError: it is an error.
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
    """Returns a text, or that of a list of parts."""
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
    """Returns the calls that begin here: their arguments may come in more parts, without a name."""
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
    """Returns the text in an error's body, wherever servers put it; "": there is none."""
    if isinstance(said, str):
        return said
    if isinstance(said, list):
        return "; ".join(filter(None, map(_message, said)))
    fields = _object(said)
    texts = (_message(fields[key]) for key in _MESSAGE_KEYS if key in fields)
    return next(filter(None, texts), "")


def _without_markup(text: str) -> str:
    """Returns the title of a page, or what a browser would show of it; other text as it is."""
    if not text.lstrip().startswith("<"):
        return text
    title = re.search(r"<title[^>]*>([^<]+)", text, re.IGNORECASE)
    return html.unescape(title[1] if title else re.sub(r"<[^>]*>", " ", text))


def _shorten(text: str) -> str:
    """Returns text on one line, cut where it is too long to be read."""
    line = " ".join(text[: 4 * _QUOTED_CHARACTERS].split())
    cut = line[:_QUOTED_CHARACTERS]
    return cut if len(line) == len(cut) else f"{cut}…"
