"""The bodies of OpenAI's protocol, and what they ask the model for."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field

from cpumoe.generation import Sampling
from cpumoe.serving.body import StrictModel
from cpumoe.serving.errors import invalid
from cpumoe.serving.fields import (
    Count,
    Integer,
    Prompts,
    SamplingFields,
    Seed,
    TokenLimit,
    TopLogprobs,
    choice_seed,
)
from cpumoe.serving.parameters import NOTHING, refuse_common, refuse_unsupported
from cpumoe.serving.tools import ForcedCalls, Tool, ToolChoice, forced_calls

# What is said of a message and does not reach the model.
_MESSAGE_UNSUPPORTED: dict[str, Sequence[Any]] = {"audio": NOTHING, "function_call": NOTHING}


class _StreamOptions(StrictModel):
    include_usage: bool | None = None
    # vLLM's and SGLang's: in every event.
    continuous_usage_stats: bool | None = None


class _JsonSchema(StrictModel):
    # A field of this name would hide a method of the base class.
    json_schema: dict[str, Any] | None = Field(None, alias="schema")


class _ResponseFormat(StrictModel):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: _JsonSchema | None = None

    def schema_text(self) -> str | None:
        """Returns JSON text of the schema of the answer, if it shall have one."""
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
    """What both kinds of completions take."""

    model: str | None = None
    max_tokens: TokenLimit = None
    min_tokens: Count | None = None
    seed: Seed = None
    n: Annotated[Integer, Field(ge=1)] | None = None
    stream: bool | None = None
    stream_options: _StreamOptions | None = None
    response_format: _ResponseFormat | None = None

    # What the request calls the attributes of `Sampling`.
    names: ClassVar[Mapping[str, str]] = {
        "max_new_tokens": "max_tokens",
        "json_schema": "response_format",
        "prompt_logprobs": "logprobs",
    }

    @property
    def answers(self) -> int:
        """How many answers each prompt shall have."""
        return self.n or 1

    def check(self) -> None:
        """Refuses what no completion of this server has.

        Raises:
            ApiError: names the field.
        """
        options = self.stream_options
        if options is not None:
            refuse_unsupported(options.model_extra, {}, (), where="stream_options")

    def samplings(self, **others: Any) -> list[Sampling]:
        """Returns the sampling of each answer to a prompt.

        Args:
            **others: attributes of `Sampling`.

        Raises:
            ApiError: a value out of its range.
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
    # JSON text; some clients send the object itself.
    arguments: Annotated[str, BeforeValidator(_json_text)] = "{}"


class _ToolCall(StrictModel):
    id: str | None = None
    type: Literal["function"] = "function"
    function: _FunctionCall


def _message_text(value: Any) -> Any:
    """A message's content; the texts of its parts are joined by line ends."""
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
    """A message of a chat; fields that are not listed here do not reach the model."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Annotated[str | None, BeforeValidator(_message_text)] = None
    name: str | None = None
    tool_calls: list[_ToolCall] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None
    # vLLM's newer name of it.
    reasoning: str | None = None

    def document(self, where: str) -> dict[str, Any]:
        """Returns it as the chat template shall see it.

        Args:
            where: what the request calls it.

        Raises:
            ApiError: names the field.
        """
        extra = {k: v for k, v in (self.model_extra or {}).items() if k in _MESSAGE_UNSUPPORTED}
        refuse_unsupported(extra, _MESSAGE_UNSUPPORTED, (), where=where)
        # Replies that only reason, or only call functions, come back without text.
        if self.content is None and self.role not in ("assistant", "tool"):
            name = f"{where}.content"
            raise invalid(f"{name}: expected a string or a list of text parts, got none", name)
        # OpenAI's newer name of the role; chat templates know the older.
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
    """Returns messages as the chat template shall see them.

    Raises:
        ApiError: names the message.
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
    # They reach the chat template, whose matter they are.
    chat_template_kwargs: dict[str, Any] | None = None
    reasoning_effort: str | None = None

    def check(self) -> None:
        """Refuses what no chat of this server has."""
        super().check()
        refuse_common(self.model_extra, {"add_special_tokens": (False,), "echo": NOTHING})
        if self.top_logprobs and not self.logprobs:
            raise invalid("top_logprobs: only with logprobs=true", "top_logprobs")
        schema = self.response_format and self.response_format.schema_text()
        if schema is not None and self.offered_tools and self.forced_calls() is None:
            raise invalid(
                "response_format: with tools, this server holds an answer to a format only where "
                "tool_choice is none",
                "response_format",
                "unsupported_parameter",
            )

    @property
    def offered_tools(self) -> list[Tool]:
        """The functions that the model may call."""
        return [] if self.tool_choice == "none" else self.tools or []

    def forced_calls(self) -> ForcedCalls | None:
        """Returns what the model must call, if anything.

        Raises:
            ApiError: `tool_choice` names no tool.
        """
        several = self.parallel_tool_calls is not False
        return forced_calls(self.tools or [], self.tool_choice, several)

    @property
    def template_arguments(self) -> Mapping[str, Any]:
        """What the request has for the chat template."""
        arguments = dict(self.chat_template_kwargs or {})
        if self.reasoning_effort:
            arguments.setdefault("reasoning_effort", self.reasoning_effort)
        return arguments

    def conversation(self) -> list[dict[str, Any]]:
        """Returns the messages as the chat template shall see them.

        Raises:
            ApiError: names the message.
        """
        return conversation(self.messages)

    def samplings(self, **others: Any) -> list[Sampling]:
        """Returns the sampling of each answer; see the base class."""
        forced = self.forced_calls()
        if forced is not None:
            others["json_schema"] = forced.schema
        return super().samplings(
            # 0 says nothing here: an answer without a token is none.
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
        """Refuses what no completion of this server has."""
        super().check()
        # Chat's fields, as clients of both send them.
        refuse_common(
            self.model_extra,
            {"tool_choice": (*NOTHING, "none", "auto"), "tools": NOTHING, "top_logprobs": NOTHING},
            ignored={"parallel_tool_calls"},
        )
        if (self.best_of or self.answers) != self.answers:
            raise invalid(
                f"best_of: this server returns all answers that it generates, n={self.answers}; "
                "leave it out",
                "best_of",
                "unsupported_parameter",
            )

    def samplings(self, **others: Any) -> list[Sampling]:
        """Returns the sampling of each answer to a prompt; see the base class."""
        # No new tokens make sense where the prompt's own are the answer.
        limit = self.max_tokens if self.echo else self.max_tokens or None
        return super().samplings(
            max_new_tokens=limit,
            logprobs=self.logprobs,
            prompt_logprobs=self.logprobs if self.echo else None,
            **others,
        )
