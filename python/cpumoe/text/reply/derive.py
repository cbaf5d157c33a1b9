"""Derives the format of replies from the markers in the model's chat template."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from cpumoe.text.generation import ReplyFormat
from cpumoe.text.reply.harmony import CHANNEL, MESSAGE, HarmonyReply
from cpumoe.text.reply.marked import MarkedReply
from cpumoe.text.reply.tool_syntax import TOOL_SYNTAXES

_REASONING = (("<think>", "</think>"), ("[THINK]", "[/THINK]"))


def reply_format(
    template: str, prompt: str, tools: Sequence[Mapping[str, Any]] = ()
) -> ReplyFormat | None:
    """Returns the format of the reply to a prompt; None: the whole reply is the answer.

    Args:
        template: text of the model's chat template.
        prompt: the conversation as the template writes it, up to where the model speaks.
        tools: functions that the model may call, in OpenAI's format. Without functions, no text is
            taken for a call.
    """
    if CHANNEL in template and MESSAGE in template:
        return HarmonyReply()
    reasoning = next((pair for pair in _REASONING if pair[1] in template), None)
    written = prompt.rstrip()
    begun = reasoning is not None and written.endswith(reasoning[0])
    if reasoning is not None and written.endswith(reasoning[1]):
        reasoning = None  # the prompt already contains it
    syntax = next((s for s in TOOL_SYNTAXES if s.is_in(template)), None) if tools else None
    if reasoning is None and syntax is None:
        return None
    return MarkedReply(reasoning, begun, syntax, tuple(tools))
