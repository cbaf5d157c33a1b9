"""The request bodies of OpenAI's protocol, and their conversion for the model."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field

from cpumoe.text.generation import Sampling
from cpumoe.text.serving.body import StrictModel
from cpumoe.text.serving.errors import invalid
from cpumoe.text.serving.fields import (
    Count,
    Integer,
    Prompts,
    SamplingFields,
    Seed,
    TokenLimit,
    TopLogprobs,
    choice_seed,
)
from cpumoe.text.serving.parameters import NOTHING, refuse_common, refuse_unsupported
from cpumoe.text.serving.tools import ForcedCalls, Tool, ToolChoice, forced_calls

# Fields of a message that are not supported, and their values without effect.
_MESSAGE_UNSUPPORTED: dict[str, Sequence[Any]] = {"audio": NOTHING, "function_call": NOTHING}


class _StreamOptions(StrictModel):
    include_usage: bool | None = None
    # A field of vLLM and SGLang that asks for usage in every event.
    continuous_usage_stats: bool | None = None


class _JsonSchema(StrictModel):
    # A field of this name would hide a method of the base class.
    json_schema: dict[str, Any] | None = Field(None, alias="schema")


class _ResponseFormat(StrictModel):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: _JsonSchema | None = None

    def schema_text(self) -> str | None:
        """Returns the JSON text of the answer's schema, if there is one."""
        if self.type == "text":
            return None
        if self.type == "json_schema":
            if self.json_schema is None:
                name = "response_format.json_schema"
                raise invalid(f"{name}: expected a schema, got none", name)
            if self.json_schema.json_schema is not None:
                return json.dumps(self.json_schema.json_schema)
        return json.dumps({"type": "object"})


class OpenAiBody(SamplingFields):
    """The common fields of both kinds of completions."""

    model: str | None = None
    max_tokens: TokenLimit = None
    min_tokens: Count | None = None
    seed: Seed = None
    n: Annotated[Integer, Field(ge=1)] | None = None
    stream: bool | None = None
    stream_options: _StreamOptions | None = None
    response_format: _ResponseFormat | None = None

    # The request's names of attributes of `Sampling`.
    names: ClassVar[Mapping[str, str]] = {
        "max_new_tokens": "max_tokens",
        "json_schema": "response_format",
        "prompt_logprobs": "logprobs",
    }

    @property
    def answers(self) -> int:
        """Number of answers to each prompt."""
        return self.n or 1

    def check(self) -> None:
        """Refuses values that this server does not support.

        Raises:
            ApiError: a value is not supported; the message names the field.
        """
        options = self.stream_options
        if options is not None:
            refuse_unsupported(options.model_extra, {}, (), where="stream_options")

    def samplings(self, **others: Any) -> list[Sampling]:
        """Returns the sampling of each answer to a prompt.

        Args:
            **others: attributes of `Sampling`.

        Raises:
            ApiError: a value is out of its range.
        """
        others.setdefault("min_tokens", self.min_tokens or 0)
        if self.response_format is not None:
            others.setdefault("json_schema", self.response_format.schema_text())
        return [
            self.sampling(self.names, seed=choice_seed(self.seed, choice), **others)
            for choice in range(self.answers)
        ]


def _json_text(value: Any) -> Any:
    return json.dumps(value, ensure_ascii=False) if isinstance(value, dict) else value


class _FunctionCall(StrictModel):
    name: str
    # JSON text. Some clients send the object instead.
    arguments: Annotated[str, BeforeValidator(_json_text)] = "{}"


class _ToolCall(StrictModel):
    id: str | None = None
    type: Literal["function"] = "function"
    function: _FunctionCall


def _message_text(value: Any) -> Any:
    """Returns the content of a message, with the texts of its parts joined by line feeds."""
    if value is None or isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise ValueError("expected a string or a list of text parts")
    texts = []
    for index, part in enumerate(value):
        kind = part.get("type") if isinstance(part, dict) else part
        if kind not in ("text", "refusal"):
            raise ValueError(f"part {index}: only parts of type 'text' are supported, got {kind!r}")
        text = part.get(kind)
        if not isinstance(text, str):
            raise ValueError(f"part {index}: {kind}: expected a string")
        texts.append(text)
    return "\n".join(texts)


class Message(StrictModel):
    """A message of a chat. Other fields do not reach the model."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Annotated[str | None, BeforeValidator(_message_text)] = None
    name: str | None = None
    tool_calls: list[_ToolCall] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None
    # vLLM's newer name of reasoning_content.
    reasoning: str | None = None

    def document(self, where: str) -> dict[str, Any]:
        """Returns the message for the chat template.

        Args:
            where: the name of the message in the request.

        Raises:
            ApiError: a field is wrong; the message names it.
        """
        extra = {k: v for k, v in (self.model_extra or {}).items() if k in _MESSAGE_UNSUPPORTED}
        refuse_unsupported(extra, _MESSAGE_UNSUPPORTED, (), where=where)
        # Replies with only reasoning or only calls come back without text.
        if self.content is None and self.role not in ("assistant", "tool"):
            name = f"{where}.content"
            raise invalid(f"{name}: expected a string or a list of text parts, got none", name)
        # developer is OpenAI's newer name of system, which chat templates know.
        role = "system" if self.role == "developer" else self.role
        document: dict[str, Any] = {"role": role, "content": self.content or ""}
        if self.tool_calls:
            document["tool_calls"] = [
                call.model_dump(exclude_none=True) for call in self.tool_calls
            ]
        reasoning = self.reasoning_content or self.reasoning
        others = {"name": self.name, "tool_call_id": self.tool_call_id}
        others["reasoning_content"] = reasoning or None
        return document | {name: value for name, value in others.items() if value is not None}


def conversation(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """Returns messages for the chat template.

    Raises:
        ApiError: a message is wrong; the error names it.
    """
    return [m.document(f"messages[{index}]") for index, m in enumerate(messages)]


def _zero_is_false(value: Any) -> Any:
    return False if value == 0 and isinstance(value, int) else value


def _false_is_none(value: Any) -> Any:
    return None if value is False else value


class ChatBody(OpenAiBody):
    """The body of /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: TokenLimit = None
    logprobs: Annotated[bool | None, BeforeValidator(_zero_is_false)] = None
    top_logprobs: TopLogprobs = None
    tools: list[Tool] | None = None
    tool_choice: ToolChoice = None
    parallel_tool_calls: bool | None = None
    # Both go to the chat template.
    chat_template_kwargs: dict[str, Any] | None = None
    reasoning_effort: str | None = None

    def check(self) -> None:
        """Refuses values that this server does not support in chats."""
        super().check()
        refuse_common(self.model_extra, {"add_special_tokens": (False,), "echo": NOTHING})
        if self.top_logprobs and not self.logprobs:
            raise invalid("top_logprobs: expected logprobs=true beside it", "top_logprobs")
        schema = self.response_format and self.response_format.schema_text()
        if schema is not None and self.offered_tools and self.forced_calls() is None:
            raise invalid(
                "response_format cannot be combined with tools on this server, unless tool_choice "
                "is none",
                "response_format",
                "unsupported_parameter",
            )

    @property
    def offered_tools(self) -> list[Tool]:
        """The functions that the model may call."""
        return [] if self.tool_choice == "none" else self.tools or []

    def forced_calls(self) -> ForcedCalls | None:
        """Returns the calls that the model must make, if any.

        Raises:
            ApiError: `tool_choice` names no tool.
        """
        several = self.parallel_tool_calls is not False
        return forced_calls(self.tools or [], self.tool_choice, several)

    @property
    def template_arguments(self) -> Mapping[str, Any]:
        """The request's variables for the chat template."""
        arguments = dict(self.chat_template_kwargs or {})
        if self.reasoning_effort:
            arguments.setdefault("reasoning_effort", self.reasoning_effort)
        return arguments

    def conversation(self) -> list[dict[str, Any]]:
        """Returns the messages for the chat template.

        Raises:
            ApiError: a message is wrong; the error names it.
        """
        return conversation(self.messages)

    def samplings(self, **others: Any) -> list[Sampling]:
        """Returns the sampling of each answer; see the base class."""
        forced = self.forced_calls()
        if forced is not None:
            others["json_schema"] = forced.schema
        return super().samplings(
            # 0 means no limit, because an answer without tokens is no answer.
            max_new_tokens=self.max_completion_tokens or self.max_tokens or None,
            logprobs=(self.top_logprobs or 0) if self.logprobs else None,
            **others,
        )


class CompletionBody(OpenAiBody):
    """The body of /v1/completions."""

    prompt: Prompts
    echo: bool | None = None
    logprobs: Annotated[TopLogprobs, BeforeValidator(_false_is_none)] = None
    best_of: Annotated[Integer, Field(ge=0)] | None = None
    add_special_tokens: bool | None = None

    def check(self) -> None:
        """Refuses values that this server does not support in completions."""
        super().check()
        # Some clients send the fields of chats as well.
        refuse_common(
            self.model_extra,
            {"tool_choice": (*NOTHING, "none", "auto"), "tools": NOTHING, "top_logprobs": NOTHING},
            ignored={"parallel_tool_calls"},
        )
        if (self.best_of or self.answers) != self.answers:
            raise invalid(
                f"best_of: expected n={self.answers}, because this server returns all answers that "
                f"it generates; leave it out",
                "best_of",
                "unsupported_parameter",
            )

    def samplings(self, **others: Any) -> list[Sampling]:
        """Returns the sampling of each answer to a prompt; see the base class."""
        # With echo, 0 new tokens make sense: the prompt is the answer.
        limit = self.max_tokens if self.echo else self.max_tokens or None
        return super().samplings(
            max_new_tokens=limit,
            logprobs=self.logprobs,
            prompt_logprobs=self.logprobs if self.echo else None,
            **others,
        )
