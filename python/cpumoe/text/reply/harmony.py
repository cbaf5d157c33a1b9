"""Replies of several messages on channels: gpt-oss' harmony format.

A message is ``<|start|>assistant<|channel|>analysis<|message|>text<|end|>``. The prompt ends after
the first ``<|start|>assistant``. The header of a call names its recipient, ``to=functions.NAME``.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass

from cpumoe.text.generation import Piece, ToolCall
from cpumoe.text.reply.tool_syntax import is_object
from cpumoe.text.stop_strings import overlap

CHANNEL = "<|channel|>"
MESSAGE = "<|message|>"
_START, _END, _RETURN, _CALL = "<|start|>", "<|end|>", "<|return|>", "<|call|>"
_CONSTRAIN = "<|constrain|>"
# The end of a message may be missing, so the next message ends it as well.
_ENDS = (_END, _RETURN, _CALL, _START, CHANNEL)
_RECIPIENT = re.compile(r"to=([^\s<]+)")
_CHANNEL = re.compile(re.escape(CHANNEL) + r"\s*([^\s<]+)")
# A reply that begins differently is text without channels.
_HEADERS = (CHANNEL, _START, "to=")


@dataclass(frozen=True)
class HarmonyReply:
    """A reply of messages. Analysis is reasoning; final and commentary are the answer."""

    @property
    def markers(self) -> Collection[str]:
        """All markers that a parser looks for."""
        return (CHANNEL, MESSAGE, _START, _END, _RETURN, _CALL, _CONSTRAIN)

    def parser(self) -> HarmonyParser:
        """Returns a parser of one reply."""
        return HarmonyParser()


class HarmonyParser:
    """Splits a reply. Text that may be the beginning of a marker is held back."""

    def __init__(self) -> None:
        """Begins in the first message's header."""
        self._rest = ""
        self._first = True
        self._header: str | None = ""  # None: in a message
        self._reasons = False
        self._recipient: str | None = None
        self._said = {True: False, False: False}
        self._between = False

    @property
    def answering(self) -> bool:
        """Whether the next text belongs to the answer, unless it is an opener."""
        if self._header is None:
            return not self._reasons and self._recipient is None
        return self._first and not self._rest

    @property
    def openers(self) -> Collection[str]:
        """Markers that may come next instead of text of the answer."""
        return (CHANNEL,) if self._first else ()

    def feed(self, text: str) -> Piece:
        """Takes the next piece of text; returns what has become certain."""
        self._rest += text
        pieces = []
        while True:
            before = (self._header is None, len(self._rest))
            pieces.append(self._read_header() if self._header is not None else self._read_body())
            if before == (self._header is None, len(self._rest)):
                return _joined(pieces)

    def flush(self) -> Piece:
        """Returns the rest at the end of the reply."""
        rest, self._rest = self._rest, ""
        if self._header is not None:
            return Piece(rest) if self._first else Piece()
        if self._recipient is None:
            return self._body(rest)
        # The call's end marker may have ended the reply. Arguments that are cut off are no call.
        if is_object(rest):
            return Piece(tool_calls=(ToolCall(self._recipient, rest.strip()),))
        return Piece(rest)

    def _read_header(self) -> Piece:
        if self._first and not self._may_be_header():
            self._begin_body(reasons=False, recipient=None)
            return Piece()
        header, found, after = self._rest.partition(MESSAGE)
        if not found:
            return Piece()
        self._rest = after
        recipient = _RECIPIENT.search(header)
        channel = _CHANNEL.search(header)
        self._begin_body(
            reasons=channel is not None and channel[1] == "analysis",
            recipient=None if recipient is None else recipient[1].removeprefix("functions."),
        )
        return Piece()

    def _may_be_header(self) -> bool:
        begin = self._rest.lstrip()
        return any(begin.startswith(h) or h.startswith(begin) for h in _HEADERS)

    def _begin_body(self, *, reasons: bool, recipient: str | None) -> None:
        self._header, self._first = None, False
        self._reasons, self._recipient = reasons, recipient
        self._between = self._said[reasons]

    def _read_body(self) -> Piece:
        ends = [(self._rest.find(end), end) for end in _ENDS]
        found = min((e for e in ends if e[0] >= 0), default=None)
        if found is None:
            if self._recipient is not None:
                return Piece()
            keep = max(overlap(self._rest, end) for end in _ENDS)
            sure = self._rest[: len(self._rest) - keep]
            self._rest = self._rest[len(sure) :]
            return self._body(sure)
        at, end = found
        body, self._rest = self._rest[:at], self._rest[at:]
        if end != CHANNEL:  # CHANNEL belongs to the next header
            self._rest = self._rest[len(end) :]
        self._header = ""
        if self._recipient is not None:
            return Piece(tool_calls=(ToolCall(self._recipient, body.strip()),))
        return self._body(body)

    def _body(self, text: str) -> Piece:
        if not text:
            return Piece()
        # A line feed separates messages that are joined to one text.
        text = "\n" + text if self._between else text
        self._between = False
        self._said[self._reasons] = True
        return Piece(reasoning=text) if self._reasons else Piece(text)


def _joined(pieces: list[Piece]) -> Piece:
    return Piece(
        "".join(piece.text for piece in pieces),
        "".join(piece.reasoning for piece in pieces),
        tuple(call for piece in pieces for call in piece.tool_calls),
    )
