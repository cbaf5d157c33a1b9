"""Function calls, answer formats and reasoning in OpenAI's protocol."""

import json

import openai
import pytest
from fake_model import FakeModel
from pydantic import BaseModel
from serving_tools import Server

from cpumoe.text.generation import Piece, ToolCall
from cpumoe.text.serving.tools import Tool, forced_calls

HELLO = [{"role": "user", "content": "hello"}]
CHAT = "/v1/chat/completions"


def tool(name, **properties):
    parameters = {"type": "object", "properties": properties, "required": [*properties]}
    return {"type": "function", "function": {"name": name, "parameters": parameters}}


WEATHER = tool("weather", city={"type": "string"})
TIME = tool("time", zone={"type": "string"})


@pytest.fixture
def server():
    with Server(FakeModel()) as running:
        yield running


@pytest.fixture
def client(server):
    with server.client() as openai_client:
        yield openai_client


def said(server, *texts):
    """Makes the model say this."""
    server.model.reply = [text if isinstance(text, Piece) else Piece(text) for text in texts]


def collect(stream):
    """Returns the message in a stream's events, and its finish reason."""
    message = {"content": "", "reasoning_content": "", "tool_calls": []}
    for chunk in stream:
        choice = chunk.choices[0]
        delta = choice.delta.model_dump(exclude_none=True)
        for name in ("content", "reasoning_content"):
            message[name] += delta.get(name, "")
        for call in delta.get("tool_calls", []):
            if call["index"] == len(message["tool_calls"]):
                assert call["type"] == "function"
                message["tool_calls"].append({"id": call["id"], **call["function"]})
            else:
                message["tool_calls"][call["index"]]["arguments"] += call["function"]["arguments"]
    return message, choice.finish_reason


def test_what_the_model_calls_is_a_message_with_calls(server, client):
    calls = (ToolCall("weather", '{"city": "Rome"}'), ToolCall("time", '{"zone": "CET"}'))
    said(server, "Let me see.", Piece(tool_calls=calls[:1]), Piece(tool_calls=calls[1:]))
    ask = {"model": "fake", "messages": HELLO, "tools": [WEATHER, TIME]}
    choice = client.chat.completions.create(**ask).choices[0]
    assert choice.finish_reason == "tool_calls"
    assert choice.message.content == "Let me see."
    functions = [call.function for call in choice.message.tool_calls]
    assert [(f.name, f.arguments) for f in functions] == [(c.name, c.arguments) for c in calls]
    assert len({call.id for call in choice.message.tool_calls}) == 2
    _, tools, _ = server.model.chats[-1]
    assert tools == [WEATHER, TIME]
    message, reason = collect(client.chat.completions.create(**ask, stream=True))
    assert (message["content"], reason) == ("Let me see.", "tool_calls")
    assert [(c["name"], c["arguments"]) for c in message["tool_calls"]] == [
        (c.name, c.arguments) for c in calls
    ]


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_wants_one_call_at_a_time_gets_the_first(server, client, stream):
    calls = (ToolCall("weather", '{"city": "Rome"}'), ToolCall("time", '{"zone": "CET"}'))
    said(server, Piece(tool_calls=calls), Piece(tool_calls=calls))
    reply = client.chat.completions.create(
        model="fake",
        messages=HELLO,
        tools=[WEATHER, TIME],
        parallel_tool_calls=False,
        stream=stream,
    )
    if stream:
        message, reason = collect(reply)
        names = [call["name"] for call in message["tool_calls"]]
    else:
        reason = reply.choices[0].finish_reason
        names = [call.function.name for call in reply.choices[0].message.tool_calls]
    assert (names, reason) == (["weather"], "tool_calls")


def test_calls_alone_leave_the_content_null(server, client):
    said(server, Piece(tool_calls=(ToolCall("time", "{}"),)))
    message = client.chat.completions.create(model="fake", messages=HELLO, tools=[TIME]).choices[0]
    assert message.message.content is None


def test_tools_that_shall_not_be_called_are_not_offered(server, client):
    client.chat.completions.create(model="fake", messages=HELLO, tools=[TIME], tool_choice="none")
    assert server.model.chats[-1][1] == []


@pytest.mark.parametrize("stream", [True, False])
def test_a_named_function_is_called_with_arguments_of_its_schema(server, client, stream):
    said(server, '{"city"', ': "Ro', 'me"}')
    ask = {
        "model": "fake",
        "messages": HELLO,
        "tools": [WEATHER, TIME],
        "tool_choice": {"type": "function", "function": {"name": "weather"}},
        "stream": stream,
    }
    reply = client.chat.completions.create(**ask)
    if stream:
        message, reason = collect(reply)
        (call,) = message["tool_calls"]
        assert message["content"] == ""
    else:
        message, reason = reply.choices[0].message, reply.choices[0].finish_reason
        call = message.tool_calls[0].function.model_dump()
        assert message.content is None
    assert (call["name"], call["arguments"], reason) == (
        "weather",
        '{"city": "Rome"}',
        "tool_calls",
    )
    assert json.loads(server.model.samplings[-1].json_schema) == WEATHER["function"]["parameters"]


@pytest.mark.parametrize("stream", [True, False])
def test_some_function_is_called_where_one_is_required(server, client, stream):
    said(
        server,
        '[{"name": "time", "arguments": {"zone": "CET"}}, ',
        '{"name": "weather", "arguments": {"city": "Köln"}}]',
    )
    reply = client.chat.completions.create(
        model="fake", messages=HELLO, tools=[WEATHER, TIME], tool_choice="required", stream=stream
    )
    if stream:
        message, reason = collect(reply)
        calls = message["tool_calls"]
    else:
        reason = reply.choices[0].finish_reason
        calls = [call.function.model_dump() for call in reply.choices[0].message.tool_calls]
    assert [(call["name"], call["arguments"]) for call in calls] == [
        ("time", '{"zone": "CET"}'),
        ("weather", '{"city": "Köln"}'),
    ]
    assert reason == "tool_calls"
    schema = json.loads(server.model.samplings[-1].json_schema)
    assert (schema["type"], schema["minItems"], "maxItems" in schema) == ("array", 1, False)
    names = [option["properties"]["name"]["const"] for option in schema["items"]["anyOf"]]
    assert names == ["weather", "time"]


def test_one_call_at_a_time(server, client):
    said(server, '[{"name": "time", "arguments": {"zone": "CET"}}]')
    client.chat.completions.create(
        model="fake",
        messages=HELLO,
        tools=[TIME],
        tool_choice="required",
        parallel_tool_calls=False,
    )
    assert json.loads(server.model.samplings[-1].json_schema)["maxItems"] == 1


def test_calls_that_were_cut_off_are_left_out(server, client):
    said(server, '[{"name": "time", "arguments": {"zone": "CET"}}, {"name": "ti')
    choice = client.chat.completions.create(
        model="fake", messages=HELLO, tools=[TIME], tool_choice="required", max_tokens=1
    ).choices[0]
    assert [call.function.name for call in choice.message.tool_calls] == ["time"]
    assert choice.finish_reason == "length"


@pytest.mark.parametrize("stream", [False, True])
def test_a_required_call_may_be_in_the_models_own_format(server, client, stream):
    said(server, Piece(tool_calls=(ToolCall("time", '{"zone": "UTC"}'),)), "Done.")
    answer = client.chat.completions.create(
        model="fake", messages=HELLO, tools=[TIME], tool_choice="required", stream=stream
    )
    if stream:
        message, reason = collect(answer)
        calls = [(call["name"], call["arguments"]) for call in message["tool_calls"]]
    else:
        reason = answer.choices[0].finish_reason
        found = answer.choices[0].message.tool_calls
        calls = [(call.function.name, call.function.arguments) for call in found]
    assert calls == [("time", '{"zone": "UTC"}')]
    assert reason == "tool_calls"


def test_a_call_in_another_format_that_was_cut_off_is_left_out(server, client):
    said(server, '<tool_call>{"name": "time", "arguments": {"zones": ["UTC", "CE')
    answer = client.chat.completions.create(
        model="fake", messages=HELLO, tools=[TIME], tool_choice="required"
    )
    assert not answer.choices[0].message.tool_calls


def test_references_within_parameters_still_hold_within_the_schema_of_calls():
    parameters = {
        "type": "object",
        "properties": {"place": {"$ref": "#/$defs/Place"}},
        "$defs": {"Place": {"type": "object", "properties": {"in": {"$ref": "#/$defs/Place"}}}},
    }
    tools = [
        Tool.model_validate(TIME),
        Tool.model_validate(
            {"type": "function", "function": {"name": "go", "parameters": parameters}}
        ),
    ]
    schema = json.loads(forced_calls(tools, "required", several=True).schema)
    moved = schema["items"]["anyOf"][1]["properties"]["arguments"]
    target = moved["properties"]["place"]["$ref"]
    place = schema
    for step in target.removeprefix("#/").split("/"):
        place = place[int(step) if isinstance(place, list) else step]
    assert place == moved["$defs"]["Place"]
    assert place["properties"]["in"]["$ref"] == target


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tool_choice": "sometimes", "tools": [TIME]}, "tool_choice"),
        ({"tool_choice": {"type": "allowed_tools"}, "tools": [TIME]}, "tool_choice"),
        (
            {"tool_choice": {"type": "function", "function": {"name": "x"}}, "tools": [TIME]},
            "tool_choice",
        ),
        ({"tools": [{"type": "custom", "custom": {"name": "f"}}]}, "tools[0].type"),
        ({"tools": [{"type": "function", "function": {}}]}, "tools[0].function.name"),
        ({"response_format": {"type": "grammar"}}, "response_format.type"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
        ({"response_format": {"type": "json_object"}, "tools": [TIME]}, "response_format"),
        (
            {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"name": "x", "schema": {"title": "impossible"}},
                }
            },
            "response_format",
        ),
        (
            {"tools": [tool("impossible")], "tool_choice": "required"},
            "tools",
        ),
    ],
)
def test_what_cannot_be_held_to_is_named(server, fields, param):
    status, error = server.refuse(CHAT, {"messages": HELLO, **fields})
    assert (status, error["param"]) == (400, param)
    assert error["message"].startswith(param)


def test_an_answer_in_json(server, client):
    said(server, "{}")
    client.chat.completions.create(
        model="fake", messages=HELLO, response_format={"type": "json_object"}
    )
    assert json.loads(server.model.samplings[-1].json_schema) == {"type": "object"}
    client.completions.create(
        model="fake", prompt="x", extra_body={"response_format": {"type": "json_object"}}
    )
    assert json.loads(server.model.samplings[-1].json_schema) == {"type": "object"}
    body = {"text": "x", "sampling_params": {"json_schema": '{"type": "null"}'}}
    assert server.http.post("/generate", json=body).status_code == 200
    assert server.model.samplings[-1].json_schema == '{"type": "null"}'


class City(BaseModel):
    name: str
    people: int


def test_openais_client_parses_an_answer(server, client):
    said(server, '{"name": "Rome", ', '"people": 3000000}')
    reply = client.chat.completions.parse(model="fake", messages=HELLO, response_format=City)
    assert reply.choices[0].message.parsed == City(name="Rome", people=3000000)
    schema = json.loads(server.model.samplings[-1].json_schema)
    assert [*schema["properties"]] == ["name", "people"]


def test_openais_client_parses_a_call(server, client):
    said(server, '{"name": "Rome", "people": 5}')
    reply = client.chat.completions.parse(
        model="fake",
        messages=HELLO,
        tools=[openai.pydantic_function_tool(City)],
        tool_choice={"type": "function", "function": {"name": "City"}},
    )
    call = reply.choices[0].message.tool_calls[0]
    assert call.function.parsed_arguments == City(name="Rome", people=5)


def test_reasoning_is_apart_from_the_answer(server, client):
    said(server, Piece(reasoning="hm, "), Piece(reasoning="yes"), "Hello!")
    ask = {"model": "fake", "messages": HELLO}
    message = client.chat.completions.create(**ask).choices[0].message
    assert (message.reasoning_content, message.content) == ("hm, yes", "Hello!")
    message, reason = collect(client.chat.completions.create(**ask, stream=True))
    assert (message["reasoning_content"], message["content"]) == ("hm, yes", "Hello!")
    assert reason == "stop"
    server.model.reply = None
    assert "reasoning_content" not in server.http.post(CHAT, json=ask).text
