"""A server's answers to valid requests of the clients that people use."""

import itertools
import json
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor

import pytest
from fake_model import FakeModel
from serving_tools import Server

HELLO = [{"role": "user", "content": "hello"}]
FIVE = " 1 2 3 4 5"


@pytest.fixture(scope="module")
def server():
    with Server() as running:
        yield running


@pytest.fixture
def client(server):
    with server.client() as openai_client:
        yield openai_client


def events_of(reply):
    assert reply.headers["content-type"].startswith("text/event-stream")
    lines = [line for line in reply.text.split("\n\n") if line]
    assert lines.pop() == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines]


def test_chat(server, client):
    reply = client.chat.completions.create(model="fake", messages=HELLO)
    choice = reply.choices[0]
    assert (choice.message.role, choice.message.content) == ("assistant", FIVE)
    assert choice.finish_reason == "stop"
    assert reply.id.startswith("chatcmpl-")
    assert (reply.object, reply.model) == ("chat.completion", "fake")
    assert server.model.prompts[-1] == "user: hello"
    # The end token is one of six.
    assert (reply.usage.prompt_tokens, reply.usage.completion_tokens) == (11, 6)
    assert reply.usage.total_tokens == 17


def test_a_conversation_with_parts_and_a_reply_sent_back(server, client):
    first = client.chat.completions.create(model="fake", messages=HELLO)
    messages = [
        {"role": "developer", "content": "be brief"},
        *HELLO,
        first.choices[0].message,
        {
            "role": "user",
            "name": "anna",
            "content": [{"type": "text", "text": "and"}, {"type": "text", "text": "now?"}],
        },
    ]
    client.chat.completions.create(model="fake", messages=messages)
    expected = f"system: be brief\nuser: hello\nassistant: {FIVE}\nuser: and\nnow?"
    assert server.model.prompts[-1] == expected


@pytest.mark.parametrize("usage", [True, False])
def test_chat_streams(client, usage):
    options = {"stream_options": {"include_usage": True}} if usage else {}
    chunks = [*client.chat.completions.create(model="fake", messages=HELLO, stream=True, **options)]
    assert len({chunk.id for chunk in chunks}) == 1
    assert {chunk.object for chunk in chunks} == {"chat.completion.chunk"}
    if usage:
        last = chunks.pop()
        assert last.choices == []
        assert last.usage.completion_tokens == 6
    deltas = [chunk.choices[0].delta for chunk in chunks]
    assert deltas[0].role == "assistant"
    assert "".join(delta.content or "" for delta in deltas) == FIVE
    reasons = [chunk.choices[0].finish_reason for chunk in chunks]
    assert reasons == [None] * (len(chunks) - 1) + ["stop"]
    assert all(chunk.usage is None for chunk in chunks)


def test_text_comes_as_it_is_generated(server):
    server.model.delay = 0.02
    try:
        with server.client() as client:
            chunks = [*client.completions.create(model="fake", prompt="x", stream=True)]
    finally:
        server.model.delay = 0
    assert [chunk.choices[0].text for chunk in chunks] == [" 1", " 2", " 3", " 4", " 5", ""]


@pytest.mark.parametrize("prompt", ["ab", [97, 98], ["ab"], [[97, 98]]])
def test_completions_take_text_or_tokens(server, client, prompt):
    reply = client.completions.create(model="fake", prompt=prompt, max_tokens=2)
    assert server.model.prompts[-1] == "ab"
    assert (reply.choices[0].text, reply.choices[0].finish_reason) == (" 1 2", "length")
    assert (reply.object, reply.usage.total_tokens) == ("text_completion", 4)


def test_completions_stream(client):
    options = {"stream": True, "stream_options": {"include_usage": True}}
    chunks = [*client.completions.create(model="fake", prompt="x", max_tokens=3, **options)]
    assert chunks.pop().usage.completion_tokens == 3
    assert "".join(chunk.choices[0].text for chunk in chunks) == " 1 2 3"
    assert chunks[-1].choices[0].finish_reason == "length"


def test_limits_of_tokens_have_openais_defaults():
    with Server(FakeModel(end=10**6)) as server, server.client() as client:
        assert client.completions.create(model="fake", prompt="x").usage.completion_tokens == 16
        usage = client.chat.completions.create(model="fake", messages=HELLO).usage
        assert usage.total_tokens == server.model.context_length
        usage = client.chat.completions.create(
            model="fake", messages=HELLO, max_completion_tokens=7
        ).usage
        assert usage.completion_tokens == 7


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("stop", [" 3", [" 9", " 3 4"], ["2 3", "x", "y", "z"]])
def test_stop_strings(client, stop, stream):
    reply = client.completions.create(model="fake", prompt="x", stop=stop, stream=stream)
    choices = [part.choices[0] for part in (reply if stream else [reply])]
    assert "".join(choice.text for choice in choices) == (" 1 " if "2 3" in stop else " 1 2")
    assert choices[-1].finish_reason == "stop"


def test_sampling_reaches_the_model(server, client):
    client.chat.completions.create(
        model="fake", messages=HELLO, temperature=0.5, top_p=0.9, seed=7, stop="q", max_tokens=9
    )
    sampling = server.model.samplings[-1]
    assert (sampling.temperature, sampling.top_p, sampling.seed) == (0.5, 0.9, 7)
    assert (sampling.stop, sampling.max_new_tokens) == (("q",), 9)
    client.chat.completions.create(model="fake", messages=HELLO)
    sampling = server.model.samplings[-1]
    assert (sampling.temperature, sampling.top_p, sampling.seed) == (None, None, None)


def test_concurrent_requests_get_their_own_answers():
    with Server(FakeModel(delay=0.002)) as server, server.client() as client:

        def ask(number):
            prompt, stream = "x" * number, number % 2 == 0
            options = {"stream_options": {"include_usage": True}} if stream else {}
            reply = client.completions.create(
                model="fake", prompt=prompt, max_tokens=5, stream=stream, **options
            )
            return ([*reply][-1] if stream else reply).usage.prompt_tokens

        with ThreadPoolExecutor(8) as pool:
            assert [*pool.map(ask, range(1, 17))] == [*range(1, 17)]


def test_models(client):
    (card,) = client.models.list()
    assert (card.id, card.object, card.owned_by) == ("fake", "model", "cpumoe")
    assert client.models.retrieve("fake") == card


def test_served_name_may_be_a_path():
    with Server(served_model_name="org/model") as server, server.client() as client:
        assert client.models.retrieve("org/model").id == "org/model"
        assert client.completions.create(model="org/model", prompt="x").model == "org/model"


@pytest.mark.parametrize(
    "prompt", [{"text": "ab", "stream": None}, {"text": None, "input_ids": [97, 98]}]
)
def test_sglang(server, prompt):
    sampling = {"temperature": 0, "max_new_tokens": 3, "sampling_seed": 1}
    body = {**prompt, "sampling_params": sampling, "rid": "mine"}
    reply = server.http.post("/generate", json=body).json()
    assert server.model.prompts[-1] == "ab"
    assert server.model.samplings[-1].seed == 1
    assert reply["text"] == " 1 2 3"
    information = reply["meta_info"]
    assert information.pop("e2e_latency") > 0
    assert information == {
        "id": "mine",
        "finish_reason": {"type": "length", "length": 3},
        "prompt_tokens": 2,
        "completion_tokens": 3,
        "cached_tokens": 0,
    }


def test_sglang_has_defaults(server):
    for body in ({"text": "a"}, {"text": "a", "sampling_params": None}):
        assert server.http.post("/generate", json=body).json()["text"] == FIVE


def test_an_answer_of_unasked_length_is_what_the_context_has_room_for():
    with Server(FakeModel(end=10**6)) as server:
        for path, body in (
            ("/v1/completions", {"prompt": "x" * 990}),
            ("/generate", {"text": "x" * 990}),
        ):
            assert server.http.post(path, json=body).status_code == 200
            assert server.model.samplings.pop().max_new_tokens == 10


def test_sglang_streams_all_of_the_text_each_time(server):
    body = {"text": "x", "stream": True, "sampling_params": {"stop": ["4"]}}
    events = events_of(server.http.post("/generate", json=body))
    texts = [event["text"] for event in events]
    assert texts[-1] == " 1 2 3 "
    assert all(later.startswith(text) for text, later in itertools.pairwise(texts))
    assert events[0]["meta_info"]["finish_reason"] is None
    assert events[-1]["meta_info"]["finish_reason"] == {"type": "stop"}
    assert server.model.samplings[-1].max_new_tokens == 128


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_curl(server):
    body = {"messages": [{"role": "user", "content": "grüße"}], "stream": True}
    command = ["curl", "-sN", f"{server.url}/v1/chat/completions"]
    command += ["-H", "Content-Type: application/json", "-d", json.dumps(body)]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert output.endswith("data: [DONE]\n\n")
    assert server.model.prompts[-1] == "user: grüße"
