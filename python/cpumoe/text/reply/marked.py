"""Replies with markers around reasoning and tool calls, such as ``<think>``."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from enum import Enum, auto

from cpumoe.text.generation import Piece, ToolCall
from cpumoe.text.reply.tool_syntax import Tools, ToolSyntax, is_object
from cpumoe.text.stop_strings import overlap


@dataclass(frozen=True)
class MarkedReply:
    """A reply of optional reasoning, then the answer, with calls within or after it.

    Attributes:
        reasoning: the markers before and after reasoning; None: the reply has no reasoning.
        begun: whether the prompt ends with the marker that begins reasoning.
        syntax: the syntax of calls; None: the reply has no calls.
        tools: functions that may be called, in OpenAI's format.
    """

    reasoning: tuple[str, str] | None
    begun: bool
    syntax: ToolSyntax | None
    tools: Tools = field(default=(), repr=False)

    @property
    def markers(self) -> Collection[str]:
        """All markers that a parser looks for."""
        syntax = self.syntax
        calls = () if syntax is None else (syntax.begin, syntax.end, *syntax.around, *syntax.inner)
        return (*(self.reasoning or ()), *calls)

    def parser(self) -> MarkedParser:
        """Returns a parser of one reply."""
        return MarkedParser(self)


class _At(Enum):
    START = auto()
    REASONING = auto()
    ANSWER = auto()
    CALL = auto()


class MarkedParser:
    """Splits a reply. Text that may be the beginning of a marker is held back.

    White space around reasoning and calls is dropped.
    """

    def __init__(self, reply: MarkedReply) -> None:
        """Begins where the prompt ends."""
        self._reply = reply
        self._at = _At.ANSWER
        if reply.reasoning is not None:
            self._at = _At.REASONING if reply.begun else _At.START
        self._rest = ""
        self._bare = self._at is _At.REASONING  # only white space so far in this part
        self._called = False

    @property
    def answering(self) -> bool:
        """Whether the next text belongs to the answer, unless it is an opener."""
        return self._at in (_At.START, _At.ANSWER) and not self._called

    @property
    def openers(self) -> Collection[str]:
        """Markers that may come next instead of text of the answer."""
        reasoning, syntax = self._reply.reasoning, self._reply.syntax
        opener = reasoning[:1] if reasoning is not None and self._at is _At.START else ()
        calls = () if syntax is None else (syntax.begin, *syntax.around)
        return (*opener, *calls)

    def feed(self, text: str) -> Piece:
        """Takes the next piece of text; returns what has become certain."""
        self._rest += text
        return self._take()

    def flush(self) -> Piece:
        """Returns the rest at the end of the reply."""
        rest, self._rest = self._rest, ""
        if self._at is _At.REASONING:
            return Piece(reasoning=self._trimmed(rest).rstrip())
        if self._at is _At.CALL:
            # The end marker may have ended the reply. Arguments that are cut off are no call.
            call = None if self._syntax.needs_end else self._parse(rest)
            if call is not None and is_object(call.arguments):
                return Piece(tool_calls=(call,))
            return Piece(self._syntax.begin + rest)
        rest = self._trimmed(rest)
        return Piece(rest.rstrip() if self._called else rest)

    def _take(self) -> Piece:
        texts: list[str] = []
        thoughts: list[str] = []
        calls: list[ToolCall] = []
        at = None
        while at is not self._at:
            at = self._at
            if at is _At.START:
                self._start()
            elif at is _At.REASONING:
                thoughts.append(self._reasoning())
            elif at is _At.ANSWER:
                texts.append(self._answer())
            else:
                self._call(texts, calls)
        return Piece("".join(texts), "".join(thoughts), tuple(calls))

    def _start(self) -> None:
        """Decides whether there is reasoning, which can only come first."""
        assert self._reply.reasoning is not None
        opener = self._reply.reasoning[0]
        begin = self._rest.lstrip()
        if begin.startswith(opener):
            self._enter(_At.REASONING, begin[len(opener) :])
        elif not opener.startswith(begin):
            self._at = _At.ANSWER

    def _reasoning(self) -> str:
        assert self._reply.reasoning is not None
        close = self._reply.reasoning[1]
        before, found, after = self._rest.partition(close)
        if found:
            thought = self._trimmed(before).rstrip()
            self._enter(_At.ANSWER, after)
            return thought
        return self._certain((close,))

    def _answer(self) -> str:
        if self._reply.syntax is None:
            text, self._rest = self._rest, ""
            return self._trimmed(text)
        marks = (self._syntax.begin, *self._syntax.around)
        text = ""
        while (found := _first(self._rest, marks)) is not None:
            at, mark = found
            text += self._trimmed(self._rest[:at]).rstrip()
            is_call = mark == self._syntax.begin
            self._enter(_At.CALL if is_call else _At.ANSWER, self._rest[at + len(mark) :])
            if is_call:
                return text
        return text + self._certain(marks)

    def _call(self, texts: list[str], calls: list[ToolCall]) -> None:
        content, found, after = self._rest.partition(self._syntax.end)
        if not found:
            return
        call = self._parse(content)
        if call is None:
            texts.append(self._syntax.begin + content + self._syntax.end)
        else:
            calls.append(call)
            self._called = True
        self._enter(_At.ANSWER, after)

    def _parse(self, content: str) -> ToolCall | None:
        return self._syntax.parse(content, self._reply.tools)

    def _certain(self, marks: Sequence[str]) -> str:
        """Takes text that neither begins a marker nor is white space before one."""
        keep = max(overlap(self._rest, mark) for mark in marks)
        sure = self._rest[: len(self._rest) - keep].rstrip()
        text = self._trimmed(sure)
        self._rest = self._rest[len(sure) :]
        return text

    def _trimmed(self, text: str) -> str:
        """Returns text without white space at the beginning of a part."""
        if self._bare:
            text = text.lstrip()
            self._bare = not text
        return text

    def _enter(self, at: _At, rest: str) -> None:
        self._at, self._rest, self._bare = at, rest, True

    @property
    def _syntax(self) -> ToolSyntax:
        assert self._reply.syntax is not None
        return self._reply.syntax


def _first(text: str, marks: Sequence[str]) -> tuple[int, str] | None:
    """Returns position and marker of the first of some markers in a text."""
    found = [(text.find(mark), mark) for mark in marks]
    return min((f for f in found if f[0] >= 0), default=None)
