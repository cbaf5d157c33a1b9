"""LangChain's ChatOpenAI."""

import asyncio

import pytest
from langchain_core.messages import HumanMessage, ToolMessage
from langchain_openai import ChatOpenAI
from schemas import PAINT_TOOL, Paint

QUESTION = [HumanMessage("Tell me of the sea.")]


@pytest.fixture(scope="module")
def chat(url, model):
    return ChatOpenAI(
        model=model,
        base_url=f"{url}/v1",
        api_key="-",
        max_retries=0,
        max_tokens=400,
        temperature=0,
    )


def test_invoke(chat):
    reply = chat.invoke(QUESTION, max_tokens=12)
    assert reply.content
    assert reply.usage_metadata["output_tokens"] <= 12


def test_stream(chat):
    chunks = [*chat.stream(QUESTION, max_tokens=12, stream_usage=True)]
    assert "".join(chunk.content for chunk in chunks)
    total = chunks[0]
    for chunk in chunks[1:]:
        total += chunk
    assert total.usage_metadata["output_tokens"] <= 12


def test_async_stream(chat):
    async def collect():
        return "".join([chunk.content async for chunk in chat.astream(QUESTION, max_tokens=12)])

    assert asyncio.run(collect())


def test_batch(chat):
    replies = chat.batch([QUESTION] * 3, max_tokens=8)
    assert all(reply.content for reply in replies)


def test_log_probabilities(chat):
    reply = chat.bind(logprobs=True, top_logprobs=2).invoke(QUESTION, max_tokens=5)
    assert 0 < len(reply.response_metadata["logprobs"]["content"]) <= 5


@pytest.mark.parametrize("method", ["json_schema", "function_calling"])
def test_structured_output(chat, method):
    assert isinstance(chat.with_structured_output(Paint, method=method).invoke(QUESTION), Paint)


def test_tools(chat):
    with_tools = chat.bind_tools([PAINT_TOOL], tool_choice="any", parallel_tool_calls=False)
    reply = with_tools.invoke(QUESTION)
    (call,) = reply.tool_calls
    assert call["name"] == "paint"
    history = [*QUESTION, reply, ToolMessage("ordered", tool_call_id=call["id"])]
    assert chat.invoke(history, max_tokens=12).response_metadata["finish_reason"]
