"""Writes a conversation as text by the model's chat template."""

from __future__ import annotations

import contextlib
import inspect
import itertools
import json
from collections.abc import Mapping, Sequence
from typing import Any

from jinja2 import TemplateError

from cpumoe.text.generation import Message, ModelError

# Kimi's templates write the ids of tool calls, and its models expect names as ids.
_NAMED_CALLS = "<|tool_call_begin|>"


def render_chat(
    tokenizer: Any,
    messages: Sequence[Message],
    tools: Sequence[Mapping[str, Any]],
    arguments: Mapping[str, Any],
) -> str:
    """Returns a conversation's text, up to where the assistant speaks.

    Args:
        tokenizer: a transformers tokenizer with a chat template.
        messages: see `cpumoe.text.generation.TextModel.encode_chat`.
        tools: see `cpumoe.text.generation.TextModel.encode_chat`.
        arguments: variables of the template.

    Raises:
        ValueError: the template refuses the messages, or an argument is not a template variable.
        ModelError: the template fails for any messages.
    """
    taken = set(inspect.signature(tokenizer.apply_chat_template).parameters) - {"kwargs"}
    if not taken.isdisjoint(arguments):
        names = ", ".join(sorted(taken.intersection(arguments)))
        raise ValueError(
            f"template arguments: expected variables of the chat template, got reserved: {names}"
        )
    given = {"tools": [*map(dict, tools)] or None, **arguments}
    template = str(tokenizer.chat_template)
    shaped = [_message(message, template) for message in messages]
    if _NAMED_CALLS in template:
        _name_calls(shaped)
    try:
        try:
            return _render(tokenizer, _with_arguments(shaped), **given)
        except _Refusal as refusal:
            if refusal.meant or not any(message.get("tool_calls") for message in shaped):
                raise
            # DeepSeek's templates expect the arguments as the text that the model wrote.
            return _render(tokenizer, shaped, **given)
    except _Refusal as refusal:
        cause = refusal.cause
        if not refusal.meant and _fails_always(tokenizer):
            raise ModelError(f"the chat template fails: {cause}") from cause
        raise ValueError(f"the chat template refuses these messages: {cause}") from cause


class _Refusal(Exception):  # noqa: N818
    """A template raised an exception.

    Attributes:
        cause: the exception.
        meant: whether the template raised it on purpose, not because of a mistake.
    """

    def __init__(self, cause: Exception) -> None:
        super().__init__(cause)
        self.cause = cause
        # raise_exception in a template raises TemplateError. Jinja itself raises its subclasses.
        self.meant = type(cause) is TemplateError


def _render(tokenizer: Any, messages: list[dict[str, Any]], **arguments: Any) -> str:
    try:
        text: str = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=False, **arguments
        )
    except (ImportError, MemoryError):
        raise
    except Exception as error:  # the template is the checkpoint's code and may raise anything
        raise _Refusal(error) from error
    return text


def _fails_always(tokenizer: Any) -> bool:
    """Whether a template fails even for the simplest conversation."""
    try:
        _render(tokenizer, [{"role": "user", "content": "Hi"}])
    except _Refusal as refusal:
        return not refusal.meant
    return False


def _message(message: Message, template: str) -> dict[str, Any]:
    """Returns a message in OpenAI's format, changed to what templates expect."""
    changed = dict(message)
    if changed["role"] == "assistant" and changed.get("content") is None:
        changed["content"] = ""  # OpenAI allows null beside tool calls; many templates do not
    # gpt-oss' template calls reasoning "thinking", and transformers sets both names. The template
    # refuses reasoning in a message that has text and tool calls.
    if ".thinking" in template and changed.get("tool_calls") and changed.get("content"):
        changed.pop("reasoning_content", None)
    return changed


def _with_arguments(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns the messages with the calls' arguments as objects instead of JSON text."""
    return [
        {**message, "tool_calls": [_with_object(call) for call in message["tool_calls"]]}
        if message.get("tool_calls")
        else message
        for message in messages
    ]


def _with_object(call: Mapping[str, Any]) -> dict[str, Any]:
    function = dict(call.get("function") or {})
    if isinstance(function.get("arguments"), str):
        # Arguments that are no JSON go back to the model as the model wrote them.
        with contextlib.suppress(ValueError, RecursionError):
            function["arguments"] = json.loads(function["arguments"] or "{}")
    return {**call, "function": function}


def _name_calls(messages: list[dict[str, Any]]) -> None:
    """Gives calls the ids that Kimi's models expect, numbered through the conversation."""
    names: dict[str, str] = {}
    numbers = itertools.count()
    for message in messages:
        calls = []
        for call in message.get("tool_calls") or ():
            number = next(numbers)
            name = f"functions.{(call.get('function') or {}).get('name')}:{number}"
            # Some clients number the calls of each reply anew. A result is the last such call's.
            names[str(call.get("id", number))] = name
            calls.append({**call, "id": name})
        if calls:
            message["tool_calls"] = calls
        answered = message.get("tool_call_id")
        if answered is not None:
            message["tool_call_id"] = names.get(answered, answered)
