"""Tools of requests, and answers that must be tool calls."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator

from cpumoe.text.generation import ToolCall
from cpumoe.text.serving.body import StrictModel
from cpumoe.text.serving.errors import invalid


class Function(StrictModel):
    """The function of a tool. Other fields go to the chat template."""

    name: str
    parameters: dict[str, Any] | None = None


class Tool(StrictModel):
    """An entry of `tools`."""

    type: Literal["function"]
    function: Function

    def document(self) -> dict[str, Any]:
        """Returns the tool for the chat template."""
        return self.model_dump(exclude_unset=True)


@dataclass(frozen=True)
class NamedTool:
    """A `tool_choice` that names a function."""

    name: str


def _tool_choice(value: Any) -> Any:
    if value in (None, ""):
        return None
    if isinstance(value, dict) and value.get("type", "function") == "function":
        function = value.get("function")
        name = function.get("name") if isinstance(function, dict) else None
        if isinstance(name, str):
            return NamedTool(name)
    if value not in ("none", "auto", "required"):
        raise ValueError("expected none, auto, required, or an object that names a function")
    return value


ToolChoice = Annotated[Any, BeforeValidator(_tool_choice)]


@dataclass(frozen=True)
class ForcedCalls:
    """An answer that must consist of function calls.

    A schema restricts the model's text, so that it can be parsed whatever the model was trained
    for. For a named function the text is the arguments, otherwise a list of names with arguments.

    Attributes:
        functions: the functions that may be called.
        named: whether exactly one named function is called once.
        several: whether several calls are allowed.
    """

    functions: Sequence[Function]
    named: bool
    several: bool

    @property
    def schema(self) -> str:
        """JSON text of the schema of the model's text."""
        if self.named:
            return json.dumps(_parameters(self.functions[0]))
        calls: dict[str, Any] = {
            "type": "array",
            "minItems": 1,
            "items": {"anyOf": [_call(*numbered) for numbered in enumerate(self.functions)]},
        }
        return json.dumps(calls if self.several else {**calls, "maxItems": 1})

    def calls(self, text: str) -> tuple[ToolCall, ...]:
        """Returns the calls in the model's text, which may be cut off."""
        if self.named:
            return (ToolCall(self.functions[0].name, text),)
        return tuple(
            ToolCall(call["name"], json.dumps(call["arguments"], ensure_ascii=False))
            for call in _whole_elements(text)
            # A call in another format that was cut off can hold a list, too.
            if isinstance(call, dict) and {"name", "arguments"} <= call.keys()
        )


def forced_calls(
    tools: Sequence[Tool], choice: str | NamedTool | None, several: bool
) -> ForcedCalls | None:
    """Returns the calls that `tool_choice` forces the model to make, if any.

    Raises:
        ApiError: `tool_choice` names no tool of the request.
    """
    if choice is None or choice in ("none", "auto"):
        return None
    functions = [tool.function for tool in tools]
    if isinstance(choice, NamedTool):
        functions = [f for f in functions if f.name == choice.name]
        if not functions:
            message = f"tool_choice: no tool is called {choice.name!r}"
            raise invalid(message, "tool_choice")
        return ForcedCalls(functions, named=True, several=False)
    if not functions:
        raise invalid("tool_choice: expected tools to choose from, got none", "tool_choice")
    return ForcedCalls(functions, named=False, several=several)


def _parameters(function: Function) -> dict[str, Any]:
    # A function without parameters takes an empty object.
    return function.parameters or {"type": "object", "properties": {}}


def _call(number: int, function: Function) -> dict[str, Any]:
    place = f"#/items/anyOf/{number}/properties/arguments"
    return {
        "type": "object",
        "properties": {
            "name": {"const": function.name},
            "arguments": _moved(_parameters(function), place),
        },
        "required": ["name", "arguments"],
        "additionalProperties": False,
    }


def _moved(schema: Any, place: str) -> Any:
    """Returns the schema with references that fit its place in another schema."""
    if isinstance(schema, list):
        return [_moved(element, place) for element in schema]
    if not isinstance(schema, dict):
        return schema
    moved = {name: _moved(value, place) for name, value in schema.items()}
    target = moved.get("$ref")
    if isinstance(target, str) and target.startswith("#"):
        moved["$ref"] = place + target[1:]
    return moved


def _whole_elements(text: str) -> list[Any]:
    """Returns the complete elements of a JSON list that may be cut off."""
    decoder, elements = json.JSONDecoder(), []
    at = text.find("[") + 1
    while at:
        at += len(text[at:]) - len(text[at:].lstrip(" \t\r\n,"))
        try:
            element, at = decoder.raw_decode(text, at)
        except ValueError:
            break
        elements.append(element)
    return elements
