"""OpenAI's client: its requests, and its exceptions for refusals."""

import asyncio
import json

import openai
import pytest
from schemas import PAINT_TOOL, Paint

LIMIT = 12


@pytest.fixture(scope="module")
def client(url):
    with openai.OpenAI(base_url=f"{url}/v1", api_key="-", max_retries=0) as sync_client:
        yield sync_client


def test_models(client, model):
    assert [card.id for card in client.models.list()] == [model]
    assert client.models.retrieve(model).id == model


def test_chat(client, model, conversation):
    reply = client.chat.completions.create(
        model=model, messages=conversation, max_tokens=LIMIT, temperature=0
    )
    assert reply.choices[0].message.role == "assistant"
    assert reply.choices[0].message.content
    assert 0 < reply.usage.completion_tokens <= LIMIT


def test_chat_stream(client, model, conversation):
    chunks = [
        *client.chat.completions.create(
            model=model,
            messages=conversation,
            max_completion_tokens=LIMIT,
            stream=True,
            stream_options={"include_usage": True},
        )
    ]
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-1].usage.completion_tokens <= LIMIT
    assert chunks[-2].choices[0].finish_reason in ("stop", "length")


def test_stream_helper(client, model, conversation):
    with client.chat.completions.stream(
        model=model, messages=conversation, response_format=Paint
    ) as stream:
        deltas = [event.delta for event in stream if event.type == "content.delta"]
        message = stream.get_final_completion().choices[0].message
    assert "".join(deltas) == message.content
    assert isinstance(message.parsed, Paint)


def test_several_answers(client, model, conversation):
    ask = {"model": model, "messages": conversation, "max_tokens": LIMIT, "n": 3}
    reply = client.chat.completions.create(**ask, temperature=1.5, seed=1)
    texts = [choice.message.content for choice in reply.choices]
    assert len(set(texts)) > 1
    again = client.chat.completions.create(**ask, temperature=1.5, seed=1)
    assert [choice.message.content for choice in again.choices] == texts


def test_log_probabilities(client, model, conversation):
    reply = client.chat.completions.create(
        model=model,
        messages=conversation,
        max_tokens=LIMIT,
        temperature=0,
        logprobs=True,
        top_logprobs=3,
    )
    tokens = reply.choices[0].logprobs.content
    assert 0 < len(tokens) <= LIMIT
    for token in tokens:
        # Greedy: each token is the most probable one.
        assert token.logprob == max(top.logprob for top in token.top_logprobs) <= 0


def test_completions_of_several_prompts(client, model):
    reply = client.completions.create(model=model, prompt=["Once", "In the"], max_tokens=LIMIT)
    assert [choice.index for choice in reply.choices] == [0, 1]


def test_completion_stream(client, model):
    stream = client.completions.create(
        model=model, prompt="Once", max_tokens=LIMIT, temperature=0, stream=True
    )
    assert "".join(chunk.choices[0].text for chunk in stream)


def test_echo_scores_a_prompt(client, model):
    text = "In the beginning God created the heaven and the earth."
    reply = client.completions.create(model=model, prompt=text, echo=True, logprobs=1, max_tokens=0)
    choice = reply.choices[0]
    assert choice.text == text
    assert choice.logprobs.token_logprobs[0] is None
    assert sum(choice.logprobs.token_logprobs[1:]) < 0


def test_parse(client, model, conversation):
    reply = client.chat.completions.parse(model=model, messages=conversation, response_format=Paint)
    assert isinstance(reply.choices[0].message.parsed, Paint)


def test_json_object(client, model, conversation):
    # Without a schema a small model may go on for long.
    reply = client.chat.completions.create(
        model=model,
        messages=conversation,
        response_format={"type": "json_object"},
        max_tokens=200,
    )
    choice = reply.choices[0]
    assert choice.message.content.lstrip().startswith("{")
    if choice.finish_reason == "stop":
        assert isinstance(json.loads(choice.message.content), dict)


@pytest.mark.parametrize(
    "choice",
    ["required", {"type": "function", "function": {"name": "paint"}}],
    ids=["any", "named"],
)
def test_a_call_and_its_result(client, model, conversation, choice):
    ask = {"model": model, "tools": [PAINT_TOOL]}
    reply = client.chat.completions.create(
        **ask, messages=conversation, tool_choice=choice, parallel_tool_calls=False
    )
    message = reply.choices[0].message
    assert reply.choices[0].finish_reason == "tool_calls"
    (call,) = message.tool_calls
    assert call.function.name == "paint"
    assert {*json.loads(call.function.arguments)} == {"colour", "litres"}
    result = {"role": "tool", "tool_call_id": call.id, "content": "ordered"}
    reply = client.chat.completions.create(
        **ask, messages=[*conversation, message, result], max_tokens=LIMIT, tool_choice="none"
    )
    assert reply.choices[0].finish_reason in ("stop", "length")


def test_a_call_stream(client, model, conversation):
    with client.chat.completions.stream(
        model=model,
        messages=conversation,
        tools=[openai.pydantic_function_tool(Paint, name="paint")],
        tool_choice={"type": "function", "function": {"name": "paint"}},
    ) as stream:
        for _ in stream:
            pass
        message = stream.get_final_completion().choices[0].message
    assert isinstance(message.tool_calls[0].function.parsed_arguments, Paint)


def test_refusals_are_exceptions(client, model, conversation):
    with pytest.raises(openai.BadRequestError, match="logit_bias") as caught:
        client.chat.completions.create(model=model, messages=conversation, logit_bias={"5": 1})
    assert caught.value.param == "logit_bias"
    with pytest.raises(openai.NotFoundError, match="does not exist"):
        client.chat.completions.create(model="other", messages=conversation)
    with pytest.raises(openai.NotFoundError, match="no such path"):
        client.embeddings.create(model=model, input="x")


def test_async(url, model, conversation):
    async def ask():
        async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="-", max_retries=0) as client:
            create = client.chat.completions.create
            ask = {"model": model, "messages": conversation, "max_tokens": LIMIT, "temperature": 0}
            replies = await asyncio.gather(*(create(**ask) for _ in range(4)))
            text = ""
            async for chunk in await create(**ask, stream=True):
                text += chunk.choices[0].delta.content or ""
            return [reply.choices[0].message.content for reply in replies], text

    texts, streamed = asyncio.run(ask())
    assert all([*texts, streamed])
