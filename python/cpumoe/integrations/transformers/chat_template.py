"""A conversation as its model's chat template writes it."""

from __future__ import annotations

import contextlib
import inspect
import itertools
import json
from collections.abc import Mapping, Sequence
from typing import Any

from jinja2 import TemplateError

from cpumoe.generation import Message, ModelError

# Kimi's templates write the identifiers of calls, which its models expect to be names.
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
            # DeepSeek's templates want the arguments as the text that the model wrote.
            return _render(tokenizer, shaped, **given)
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


def _message(message: Message, template: str) -> dict[str, Any]:
    """A message in OpenAI's shape as templates expect it."""
    changed = dict(message)
    if changed["role"] == "assistant" and changed.get("content") is None:
        changed["content"] = ""  # OpenAI's beside tool calls; many templates take no other
    # gpt-oss' name of it, which the host gives it as well; that template refuses it beside the text
    # of a message with calls.
    if ".thinking" in template and changed.get("tool_calls") and changed.get("content"):
        changed.pop("reasoning_content", None)
    return changed


def _with_arguments(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The messages with the arguments of calls as objects; OpenAI's protocol has JSON text."""
    return [
        {**message, "tool_calls": [_with_object(call) for call in message["tool_calls"]]}
        if message.get("tool_calls")
        else message
        for message in messages
    ]


def _with_object(call: Mapping[str, Any]) -> dict[str, Any]:
    function = dict(call.get("function") or {})
    if isinstance(function.get("arguments"), str):
        # What is no JSON goes back to the model as it once wrote it.
        with contextlib.suppress(ValueError, RecursionError):
            function["arguments"] = json.loads(function["arguments"] or "{}")
    return {**call, "function": function}


def _name_calls(messages: list[dict[str, Any]]) -> None:
    """Gives calls the names that Kimi's models know them by, in the order of the conversation."""
    names: dict[str, str] = {}
    numbers = itertools.count()
    for message in messages:
        calls = []
        for call in message.get("tool_calls") or ():
            number = next(numbers)
            name = f"functions.{(call.get('function') or {}).get('name')}:{number}"
            # Some clients number the calls of each reply anew: a result belongs to the last one.
            names[str(call.get("id", number))] = name
            calls.append({**call, "id": name})
        if calls:
            message["tool_calls"] = calls
        answered = message.get("tool_call_id")
        if answered is not None:
            message["tool_call_id"] = names.get(answered, answered)
