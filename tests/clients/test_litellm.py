"""LiteLLM, with OpenAI's protocol as its provider."""

import asyncio
import json

import litellm
import pytest
from schemas import PAINT_TOOL, Paint

litellm.suppress_debug_info = True


@pytest.fixture
def ask(url, model, conversation):
    return {
        "model": f"openai/{model}",
        "api_base": f"{url}/v1",
        "api_key": "-",
        "messages": conversation,
        "max_tokens": 12,
        "temperature": 0,
        "max_retries": 0,
    }


def test_completion(ask):
    reply = litellm.completion(**ask)
    assert reply.choices[0].message.content
    assert reply.usage.completion_tokens <= 12


def test_stream(ask):
    chunks = [*litellm.completion(**ask, stream=True, stream_options={"include_usage": True})]
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)


def test_async(ask):
    assert asyncio.run(litellm.acompletion(**ask)).choices[0].message.content


def test_vllms_fields(ask):
    reply = litellm.completion(**ask, top_k=20, extra_body={"min_p": 0.1, "min_tokens": 2})
    assert reply.usage.completion_tokens >= 2


def test_tools(ask):
    ask |= {"max_tokens": 400, "tools": [PAINT_TOOL], "tool_choice": "required"}
    reply = litellm.completion(**ask, parallel_tool_calls=False)
    (call,) = reply.choices[0].message.tool_calls
    assert json.loads(call.function.arguments)["colour"] in ("red", "green", "blue")


def test_response_format(ask):
    schema = {"name": "paint", "schema": Paint.model_json_schema(), "strict": True}
    ask |= {"max_tokens": 400}
    reply = litellm.completion(
        **ask, response_format={"type": "json_schema", "json_schema": schema}
    )
    assert Paint.model_validate_json(reply.choices[0].message.content)


def test_text_completion(ask, model):
    del ask["messages"]
    ask["model"] = f"text-completion-openai/{model}"
    assert litellm.text_completion(**ask, prompt="Once").choices[0].text


def test_a_refusal_is_an_exception(ask):
    with pytest.raises(litellm.BadRequestError, match="logit_bias"):
        litellm.completion(**ask, logit_bias={"5": 1})
