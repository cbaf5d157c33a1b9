"""The syntaxes in which models write tool calls."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cpumoe.text.generation import ToolCall

Tools = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class ToolSyntax:
    """One syntax of calls.

    Attributes:
        begin: marker before each call.
        end: marker after each call.
        parse: returns the call in the text between both markers; None: the text is no call.
        around: markers before the first call, between calls, or after the last one. They have no
            meaning.
        inner: further markers between `begin` and `end`.
        needs_end: whether text without the end marker is never a call.
        sign: text in a template that uses this syntax; default: `begin`.
    """

    begin: str
    end: str
    parse: Callable[[str, Tools], ToolCall | None]
    around: tuple[str, ...] = ()
    inner: tuple[str, ...] = ()
    needs_end: bool = False
    sign: str = ""

    def is_in(self, template: str) -> bool:
        """Whether a chat template uses this syntax."""
        return (self.sign or self.begin) in template


def is_object(arguments: str) -> bool:
    """Whether the arguments of a call are a JSON object."""
    try:
        return isinstance(json.loads(arguments), dict)
    except (ValueError, RecursionError):
        return False


def _json_or_xml(content: str, tools: Tools) -> ToolCall | None:
    """JSON, ``{"name": ..., "arguments": {...}}``, or the elements of Qwen3-Coder and GLM."""
    content = content.strip()
    if content.startswith("<function="):
        if not content.endswith("</function>"):
            return None
        return _elements(_QWEN_FUNCTION, _QWEN_PARAMETER, content, tools)
    if _GLM_PARAMETER.search(content):
        return _elements(_GLM_FUNCTION, _GLM_PARAMETER, content, tools)
    try:
        call = json.loads(content)
    except (ValueError, RecursionError):
        return None
    if not isinstance(call, dict) or not isinstance(call.get("name"), str):
        return None
    arguments = call.get("arguments", call.get("parameters", {}))
    return ToolCall(call["name"], arguments if isinstance(arguments, str) else _dump(arguments))


_QWEN_FUNCTION = re.compile(r"<function=(?P<name>[^>\s]+)>")
_QWEN_PARAMETER = re.compile(
    r"<parameter=(?P<key>[^>]+)>(?P<text>.*?)(?:</parameter>|(?=<parameter=)|(?=</function>)|\Z)",
    re.DOTALL,
)
_GLM_FUNCTION = re.compile(r"\A(?P<name>[^\s<]+)")
_GLM_PARAMETER = re.compile(
    r"<arg_key>(?P<key>.*?)</arg_key>\s*<arg_value>(?P<text>.*?)</arg_value>", re.DOTALL
)
_DSML = "\N{FULLWIDTH VERTICAL LINE}DSML\N{FULLWIDTH VERTICAL LINE}"
_DSML_FUNCTION = re.compile(r'\A\s+name="(?P<name>[^"]+)"[^>]*>')
_DSML_PARAMETER = re.compile(
    rf'<{_DSML}parameter\s+name="(?P<key>[^"]+)"(?:\s+string="(?P<string>true|false)")?\s*>'
    rf"(?P<text>.*?)</{_DSML}parameter>",
    re.DOTALL,
)


def _dsml(content: str, tools: Tools) -> ToolCall | None:
    """The elements of DeepSeek-V3.2 and V4, which say whether a parameter is text."""
    return _elements(_DSML_FUNCTION, _DSML_PARAMETER, content, tools)


def _elements(
    function: re.Pattern[str], parameter: re.Pattern[str], content: str, tools: Tools
) -> ToolCall | None:
    named = function.search(content)
    if named is None:
        return None
    name = named["name"]
    properties = _properties(name, tools)
    arguments = {}
    for match in parameter.finditer(content, named.end()):
        groups = match.groupdict()
        declared = groups.get("string")
        # Text is not quoted. If the element does not say what it is, the tool's schema does.
        is_text = (
            _is_text(properties.get(groups["key"])) if declared is None else declared == "true"
        )
        text = groups["text"]
        if declared is None:
            text = text.removeprefix("\n").removesuffix("\n")
        arguments[groups["key"]] = text if is_text else _loaded(text)
    return ToolCall(name, _dump(arguments))


def _properties(name: str, tools: Tools) -> Mapping[str, Any]:
    for tool in tools:
        function = tool.get("function") or {}
        if function.get("name") == name:
            properties = (function.get("parameters") or {}).get("properties")
            return properties if isinstance(properties, Mapping) else {}
    return {}


def _is_text(schema: Any) -> bool:
    kind = schema.get("type") if isinstance(schema, Mapping) else "string"
    return kind == "string" or (isinstance(kind, list) and "string" in kind)


def _loaded(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


_SEPARATOR = "<｜tool▁sep｜>"
_FENCED = re.compile(r"\A(?P<name>\S+)\s*```json\s*(?P<arguments>.*?)\s*(?:```)?\s*\Z", re.DOTALL)


def _deepseek(content: str, _: Tools) -> ToolCall | None:
    """DeepSeek-V3.1's ``NAME<sep>{...}``, or V3's ``function<sep>NAME`` with a fenced block."""
    head, found, tail = content.partition(_SEPARATOR)
    if not found:
        return None
    fenced = _FENCED.match(tail.strip()) if head.strip() == "function" else None
    if fenced is not None:
        return ToolCall(fenced["name"], fenced["arguments"])
    return ToolCall(head.strip(), tail.strip())


_KIMI_ARGUMENTS = "<|tool_call_argument_begin|>"


def _kimi(content: str, _: Tools) -> ToolCall | None:
    """Kimi's ``functions.NAME:INDEX`` with arguments."""
    head, found, tail = content.partition(_KIMI_ARGUMENTS)
    name = re.sub(r":\d+\Z", "", head.strip()).removeprefix("functions.")
    return ToolCall(name, tail.strip()) if found and name else None


def _dump(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


TOOL_SYNTAXES = (
    ToolSyntax("<tool_call>", "</tool_call>", _json_or_xml),
    ToolSyntax(
        "<｜tool▁call▁begin｜>",
        "<｜tool▁call▁end｜>",
        _deepseek,
        around=("<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"),
        inner=(_SEPARATOR,),
    ),
    ToolSyntax(
        "<|tool_call_begin|>",
        "<|tool_call_end|>",
        _kimi,
        around=("<|tool_calls_section_begin|>", "<|tool_calls_section_end|>"),
        inner=(_KIMI_ARGUMENTS,),
    ),
    ToolSyntax(
        f"<{_DSML}invoke",
        f"</{_DSML}invoke>",
        _dsml,
        around=tuple(
            f"<{slash}{_DSML}{name}>"
            for name in ("function_calls", "tool_calls")
            for slash in ("", "/")
        ),
        inner=(_DSML,),
        needs_end=True,
        sign=_DSML,  # templates build the other markers from it
    ),
)
