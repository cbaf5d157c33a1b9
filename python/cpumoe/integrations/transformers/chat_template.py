"""A conversation as its model's chat template writes it."""

from __future__ import annotations

import contextlib
import inspect
import json
from collections.abc import Mapping, Sequence
from typing import Any

from jinja2 import TemplateError

from cpumoe.generation import Message, ModelError


def render_chat(
    tokenizer: Any,
    messages: Sequence[Message],
    tools: Sequence[Mapping[str, Any]],
    arguments: Mapping[str, Any],
) -> str:
    """Returns a conversation's text, up to where the assistant speaks.

    Args:
        tokenizer: a transformers tokenizer with a chat template.
        messages: see `cpumoe.generation.TextModel.encode_chat`.
        tools: likewise.
        arguments: for the template.

    Raises:
        ValueError: the template refuses the messages, or an argument is none of the template's.
        ModelError: the template fails whatever the messages are.
    """
    taken = set(inspect.signature(tokenizer.apply_chat_template).parameters) - {"kwargs"}
    if not taken.isdisjoint(arguments):
        names = ", ".join(sorted(taken.intersection(arguments)))
        raise ValueError(f"template arguments: {names}: not the chat template's to decide")
    shaped = [_message(message, tokenizer.chat_template) for message in messages]
    try:
        return _render(tokenizer, shaped, tools=[*map(dict, tools)] or None, **arguments)
    except _Refusal as refusal:
        cause = refusal.cause
        if not refusal.meant and _fails_always(tokenizer):
            raise ModelError(f"the chat template fails: {cause}") from cause
        raise ValueError(f"the chat template refuses these messages: {cause}") from cause


class _Refusal(Exception):  # noqa: N818
    """A template raised something.

    Attributes:
        cause: what.
        meant: by its own decision, not by a mistake in it or in what it was given.
    """

    def __init__(self, cause: Exception) -> None:
        super().__init__(cause)
        self.cause = cause
        # What templates call raise_exception raises it; its subclasses are Jinja's own.
        self.meant = type(cause) is TemplateError


def _render(tokenizer: Any, messages: list[dict[str, Any]], **arguments: Any) -> str:
    try:
        text: str = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=False, **arguments
        )
    except (ImportError, MemoryError):
        raise
    except Exception as error:  # the template is the checkpoint's code, and may raise anything
        raise _Refusal(error) from error
    return text


def _fails_always(tokenizer: Any) -> bool:
    """Whether a template fails for the simplest conversation there is, too."""
    try:
        _render(tokenizer, [{"role": "user", "content": "Hi"}])
    except _Refusal as refusal:
        return not refusal.meant
    return False


def _message(message: Message, template: Any) -> dict[str, Any]:
    """A message in OpenAI's shape as templates expect it."""
    changed = dict(message)
    if changed.get("tool_calls"):
        changed["tool_calls"] = [_tool_call(call) for call in changed["tool_calls"]]
    reasoning = changed.get("reasoning_content")
    # gpt-oss' name of it; its template refuses it beside the text of a message with tool calls.
    refused = changed.get("tool_calls") and changed.get("content")
    if reasoning and not refused and ".thinking" in str(template):
        changed.setdefault("thinking", reasoning)
    return changed


def _tool_call(call: Mapping[str, Any]) -> dict[str, Any]:
    """A call whose arguments are the object that OpenAI's protocol sends as JSON text."""
    function = dict(call.get("function") or {})
    if isinstance(function.get("arguments"), str):
        # What is no JSON goes back to the model as it once wrote it.
        with contextlib.suppress(ValueError):
            function["arguments"] = json.loads(function["arguments"] or "{}")
    return {**call, "function": function}
