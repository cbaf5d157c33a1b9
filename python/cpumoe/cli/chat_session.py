"""A conversation and the commands that change it, without a terminal."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from cpumoe.cli.chat_backends import Answer, ChatBackend, ChatError
from cpumoe.text.generation import Message, Piece, Sampling


def _at_least_one(text: str) -> int:
    if (count := int(text)) < 1:
        raise ChatError(f"max_tokens: expected 1 or more, got {count}")
    return count


_SETTINGS: dict[str, tuple[str, Callable[[str], float]]] = {
    "temperature": ("temperature", float),
    "top_p": ("top_p", float),
    "max_tokens": ("max_new_tokens", _at_least_one),
    "seed": ("seed", int),
}
_ROLES = ("system", "user", "assistant")


class Screen(Protocol):
    """Where a session shows its output."""

    def piece(self, piece: Piece) -> None:
        """Shows a piece of an answer."""

    def end_answer(self, answer: Answer | None) -> None:
        """Ends an answer, which is None if it broke off."""

    def note(self, message: str) -> None:
        """Shows a remark that is no part of an answer."""

    def error(self, message: str) -> None:
        """Shows an error."""


class Session:
    """A conversation with a back end.

    Attributes:
        messages: the conversation so far; a system message comes first.
        failures: number of questions that got no answer.
    """

    def __init__(
        self, backend: ChatBackend, screen: Screen, sampling: Sampling, system: str | None
    ) -> None:
        """Begins a conversation; `system` is its first message."""
        self._backend = backend
        self._screen = screen
        self._sampling = sampling
        self._answers: list[Answer] = []
        # A question without an answer, for /retry.
        self._unanswered: str | None = None
        self.messages: list[Message] = []
        self.failures = 0
        self._set_system(system or "")

    def enter(self, line: str) -> bool:
        """Handles a line of input, a question or a command; returns False to end the chat."""
        line = line.strip()
        if not line:
            return True
        if not line.startswith("/"):
            self._ask(line)
            return True
        name, _, argument = line[1:].partition(" ")
        if name in ("exit", "quit"):
            return False
        command = _COMMANDS.get(name)
        try:
            if command is None:
                raise ChatError(f"no such command: /{name}; /help lists them")
            command[0](self, argument.strip())
        except (ChatError, ValueError, OSError) as error:
            self._screen.error(str(error))
        return True

    def _ask(self, question: str) -> None:
        self.messages.append({"role": "user", "content": question})
        try:
            answer = self._backend.answer(self.messages, self._sampling, self._screen.piece)
        except ChatError as error:
            self._screen.end_answer(None)
            self._give_up(question, str(error))
            return
        self._screen.end_answer(answer)
        if answer.text:
            # Reasoning is no part of the conversation: chat templates leave it out.
            self.messages.append({"role": "assistant", "content": answer.text})
            self._answers.append(answer)
            self._unanswered = None
        else:
            lack = answer.lack
            self._give_up(question, lack and f"{self._backend.place}: {lack}")

    def _give_up(self, question: str, failure: str | None) -> None:
        # Chat templates expect an answer between two questions.
        self.messages.pop()
        self._unanswered = question
        if failure is not None:
            self._screen.error(failure)
            self.failures += 1

    def _take_back(self) -> str:
        """Removes the last question and its answer; returns the question."""
        if not self.messages or self.messages[-1]["role"] != "assistant":
            raise ChatError("nothing has been answered yet")
        self.messages.pop()
        if not self.messages or self.messages[-1]["role"] != "user":
            raise ChatError("the last answer had no question; it is removed")
        return str(self.messages.pop()["content"])

    def _set_system(self, text: str) -> None:
        if self.messages and self.messages[0]["role"] == "system":
            del self.messages[0]
        if text:
            self.messages.insert(0, {"role": "system", "content": text})

    def _help(self, _: str) -> None:
        lines = [f"/{usage:24} {text}" for _, usage, text in _COMMANDS.values()]
        lines += [f"/{'exit':24} ends the chat, as Ctrl-D does", "Ctrl-C stops an answer."]
        self._screen.note("\n".join(lines))

    def _clear(self, _: str) -> None:
        self.messages = [m for m in self.messages if m["role"] == "system"]
        self._unanswered = None

    def _system(self, text: str) -> None:
        self._set_system(text)

    def _undo(self, _: str) -> None:
        self._screen.note(f"removed: {self._take_back()}")

    def _retry(self, _: str) -> None:
        self._ask(self._unanswered or self._take_back())

    def _save(self, file: str) -> None:
        Path(file or _missing("a file")).write_text(
            json.dumps(self.messages, indent=2, ensure_ascii=False) + "\n", encoding="utf-8"
        )
        self._screen.note(f"saved {len(self.messages)} messages")

    def _load(self, file: str) -> None:
        path = Path(file or _missing("a file"))
        try:
            messages = json.loads(path.read_text(encoding="utf-8"))
            loaded = [{"role": m["role"], "content": m["content"]} for m in messages]
            right = all(m["role"] in _ROLES and isinstance(m["content"], str) for m in loaded)
        except (ValueError, TypeError, KeyError, RecursionError):
            right = False
        if not right:
            raise ChatError(f"{path}: expected a JSON list of messages, as /save writes it")
        self.messages = [*loaded]
        self._unanswered = None
        self._screen.note(f"loaded {len(loaded)} messages")

    def _set(self, argument: str) -> None:
        if argument:
            name, _, value = argument.partition(" ")
            if name not in _SETTINGS:
                raise ChatError(f"/set: expected one of {', '.join(_SETTINGS)}, got {name!r}")
            field, parse = _SETTINGS[name]
            try:
                parsed: Any = None if value.strip() in ("", "default") else parse(value)
            except ValueError:
                raise ChatError(f"{name}: expected a number, got {value!r}") from None
            self._sampling = dataclasses.replace(self._sampling, **{field: parsed})
        values = {name: getattr(self._sampling, field) for name, (field, _) in _SETTINGS.items()}
        said = (f"{n} {'default' if value is None else value}" for n, value in values.items())
        self._screen.note(", ".join(said))

    def _stats(self, _: str) -> None:
        tokens = sum(answer.tokens or 0 for answer in self._answers)
        seconds = sum(answer.first_seconds + answer.rest_seconds for answer in self._answers)
        self._screen.note(
            f"{self._backend.name}: {len(self.messages)} messages; {len(self._answers)} answers, "
            f"{tokens} tokens in {seconds:.1f} s"
        )


def _missing(what: str) -> str:
    raise ChatError(f"expected {what}, got nothing")


_COMMANDS: dict[str, tuple[Callable[[Session, str], None], str, str]] = {
    "help": (Session._help, "help", "lists the commands"),
    "clear": (Session._clear, "clear", "forgets the conversation, but not the system message"),
    "system": (Session._system, "system TEXT", "sets the system message; without TEXT removes it"),
    "undo": (Session._undo, "undo", "removes the last question and its answer"),
    "retry": (Session._retry, "retry", "asks the last question again"),
    "save": (Session._save, "save FILE", "writes the conversation as JSON"),
    "load": (Session._load, "load FILE", "continues a saved conversation"),
    "set": (
        Session._set,
        "set NAME VALUE",
        f"{', '.join(_SETTINGS)}: a number, or 'default'; without NAME shows them",
    ),
    "stats": (
        Session._stats,
        "stats",
        "shows the number of messages, answers and tokens, and the time",
    ),
}
