"""Functions that a model may call: the request's fields, and answers that must be calls."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator

from cpumoe.generation import ToolCall
from cpumoe.serving.body import StrictModel
from cpumoe.serving.errors import invalid


class Function(StrictModel):
    """What a tool does; other fields are the chat template's."""

    name: str
    parameters: dict[str, Any] | None = None


class Tool(StrictModel):
    """An entry of `tools`."""

    type: Literal["function"]
    function: Function

    def document(self) -> dict[str, Any]:
        """Returns it as the chat template shall see it."""
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
    """An answer that consists of function calls, because the request says so.

    The model's text is held to a schema, so that it can be read whatever the model was trained for:
    the arguments alone of a function that is named, else a list of names with arguments.

    Attributes:
        functions: that may be called.
        named: there is only one, and one call.
        several: more than one call.
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
        """Returns the calls of the model's text, as far as it got."""
        if self.named:
            return (ToolCall(self.functions[0].name, text),)
        return tuple(
            ToolCall(call["name"], json.dumps(call["arguments"], ensure_ascii=False))
            for call in _whole_elements(text)
        )


def forced_calls(
    tools: Sequence[Tool], choice: str | NamedTool | None, several: bool
) -> ForcedCalls | None:
    """Returns what a request's `tool_choice` forces the model to call, if anything.

    Raises:
        ApiError: it names no tool of the request.
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
    """The schema as a part of another one: its references start at its own place in that."""
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
    """The elements of a JSON list that may have been cut off."""
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
