"""A conversation as its model's chat template writes it."""

from __future__ import annotations

import contextlib
import inspect
import json
from collections.abc import Mapping, Sequence
from typing import Any

from cpumoe.generation import Message


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
    """
    taken = set(inspect.signature(tokenizer.apply_chat_template).parameters) - {"kwargs"}
    if not taken.isdisjoint(arguments):
        names = ", ".join(sorted(taken.intersection(arguments)))
        raise ValueError(f"template arguments: {names}: not the chat template's to decide")
    try:
        text: str = tokenizer.apply_chat_template(
            [_message(message, tokenizer.chat_template) for message in messages],
            tools=[dict(tool) for tool in tools] or None,
            add_generation_prompt=True,
            tokenize=False,
            **arguments,
        )
    except (ImportError, MemoryError):
        raise
    except Exception as error:  # the template is the checkpoint's code, and may raise anything
        raise ValueError(f"the chat template refuses these messages: {error}") from error
    return text


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
