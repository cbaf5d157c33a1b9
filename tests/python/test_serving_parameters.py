"""Clients' default parameters are accepted, and requested ones reach the model."""

import json

import pytest
from fake_model import FakeModel
from serving_tools import Server

CHAT, COMPLETIONS, GENERATE = "/v1/chat/completions", "/v1/completions", "/generate"
HELLO = [{"role": "user", "content": "hello"}]
BODIES = {CHAT: {"messages": HELLO}, COMPLETIONS: {"prompt": "x"}, GENERATE: {"text": "x"}}


@pytest.fixture(scope="module")
def server():
    with Server() as running:
        yield running


def ask(server, path, **fields):
    """Returns the answer to a request that must succeed, and its sampling."""
    reply = server.http.post(path, json={**BODIES[path], **fields})
    assert reply.status_code == 200, reply.text
    return reply.json(), server.model.samplings[-1]


NEUTRAL = {
    "repetition_penalty": [1.0, 1],
    "top_k": [-1, 0],
    "min_p": [0, 0.0],
    "ignore_eos": [False],
    "skip_special_tokens": [True],
    "stop_token_ids": [[]],
    "stop": [[], "", [""]],
    "temperature": [1],
    "top_p": [1.0],
}


@pytest.mark.parametrize(
    ("name", "neutral"), [(n, v) for n, values in NEUTRAL.items() for v in (None, *values)]
)
def test_neutral_sampling_is_accepted_everywhere(server, name, neutral):
    for path in (CHAT, COMPLETIONS):
        ask(server, path, **{name: neutral})
    ask(server, GENERATE, sampling_params={name: neutral})


@pytest.mark.parametrize(
    "fields",
    [
        {"min_tokens": 0},
        {"seed": -1},
        {"max_tokens": -1},
        {"max_tokens": None},
        {"n": 1.0},
        {"logprobs": 0},
        {"logprobs": False},
        {"top_logprobs": 0},
        {"logit_bias": {}},
        {"frequency_penalty": 0.0, "presence_penalty": 0},
        {"tools": [], "tool_choice": "auto", "parallel_tool_calls": True},
        {"functions": [], "function_call": "none"},
        {"response_format": {"type": "text"}},
        {"modalities": ["text"], "audio": None, "verbosity": "medium"},
        {"user": "me", "metadata": {"a": "b"}, "store": False, "service_tier": "auto"},
        {"safety_identifier": "x", "prompt_cache_key": "y", "prediction": {"type": "content"}},
        {"stream_options": {"include_usage": True}},
        # vLLM's and SGLang's.
        {"use_beam_search": False, "length_penalty": 1.0, "bad_words": [], "priority": 0},
        {"add_generation_prompt": True, "continue_final_message": False},
        {"include_stop_str_in_output": False, "no_stop_trim": False, "stop_regex": None},
        {"spaces_between_special_tokens": True, "include_reasoning": True},
        {"return_routed_experts": False, "routed_experts_start_len": 0, "lora_path": None},
        {"request_id": "1", "rid": "2", "cache_salt": "3", "session_id": "4"},
        {"return_token_ids": False, "return_hidden_states": False, "thinking_token_budget": -1},
        {"separate_reasoning": True, "stream_reasoning": True, "custom_params": None},
        {"truncate_prompt_tokens": None, "prompt_logprobs": None, "structured_outputs": None},
        # Fields of no known version of a server.
        {"a_new_field": False, "another": None, "one_more": [], "last": {}},
    ],
    ids=lambda fields: next(iter(fields)),
)
def test_what_asks_for_nothing_is_accepted(server, fields):
    for path in (CHAT, COMPLETIONS):
        document, _ = ask(server, path, **fields)
        assert document["choices"][0]["finish_reason"] == "stop"


@pytest.mark.parametrize(
    "fields",
    [
        {"chat_template_kwargs": {}},
        {"chat_template_kwargs": None, "reasoning_effort": None},
        {"logprobs": False, "top_logprobs": None},
    ],
)
def test_what_asks_a_chat_for_nothing_is_accepted(server, fields):
    ask(server, CHAT, **fields)


def test_what_asks_sglangs_protocol_for_nothing_is_accepted(server):
    document, sampling = ask(
        server,
        GENERATE,
        return_logprob=False,
        logprob_start_len=-1,
        top_logprobs_num=0,
        lora_path="",
        image_data=None,
        return_routed_experts=False,
        stream_options={"include_usage": True},
        sampling_params={
            "n": 1,
            "top_k": 1 << 30,
            "min_new_tokens": 0,
            "frequency_penalty": 0.0,
            "spaces_between_special_tokens": True,
            "no_stop_trim": False,
            "json_schema": None,
            "regex": None,
            "sampling_seed": -1,
            "max_new_tokens": 16.0,
        },
    )
    assert document["text"] == " 1 2 3 4 5"
    assert (sampling.top_k, sampling.seed, sampling.max_new_tokens) == (0, None, 16)


def test_samplers_reach_the_model(server):
    wanted = {
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 7,
        "min_p": 0.1,
        "repetition_penalty": 1.2,
        "stop_token_ids": [3, 4],
        "stop": ["a", "b"],
        "skip_special_tokens": False,
    }
    expected = {**wanted, "stop_token_ids": (3, 4), "stop": ("a", "b")}
    for path, fields in (
        (CHAT, {**wanted, "min_tokens": 2, "seed": 5}),
        (COMPLETIONS, {**wanted, "min_tokens": 2, "seed": 5}),
        (GENERATE, {"sampling_params": {**wanted, "min_new_tokens": 2, "sampling_seed": 5}}),
    ):
        _, sampling = ask(server, path, **fields)
        assert {name: getattr(sampling, name) for name in wanted} == expected
        assert (sampling.min_tokens, sampling.seed) == (2, 5)


def test_ignore_eos_and_min_tokens_reach_the_model(server):
    for fields, tokens in (({"ignore_eos": True}, 9), ({"min_tokens": 7}, 8)):
        document, _ = ask(server, COMPLETIONS, max_tokens=9, **fields)
        assert document["usage"]["completion_tokens"] == tokens
    document, _ = ask(server, GENERATE, sampling_params={"max_new_tokens": 9, "ignore_eos": True})
    assert document["meta_info"]["completion_tokens"] == 9


def test_a_nucleus_of_nothing_is_greedy(server):
    for path, fields in (
        (CHAT, {"top_p": 0, "temperature": 0.8}),
        (GENERATE, {"sampling_params": {"top_p": 0.0}}),
    ):
        _, sampling = ask(server, path, **fields)
        assert (sampling.temperature, sampling.top_p) == (0, None)


@pytest.mark.parametrize("limit", [-1, 0, None])
def test_a_limit_that_is_none(limit):
    with Server(FakeModel(end=10**6)) as server:
        document, _ = ask(server, CHAT, max_tokens=limit)
        assert document["usage"]["total_tokens"] == server.model.context_length
        document, _ = ask(server, COMPLETIONS, max_tokens=limit)
        assert document["usage"]["completion_tokens"] == 16


@pytest.mark.parametrize("limit", [1000, 10**6, 10**400])
def test_a_limit_above_the_context_is_what_there_is_room_for(limit):
    with Server(FakeModel(end=10**6)) as server:
        for path in (CHAT, COMPLETIONS):
            document, _ = ask(server, path, max_tokens=limit)
            assert document["usage"]["total_tokens"] == server.model.context_length


def test_whole_numbers_may_have_a_fraction_of_zero(server):
    document, sampling = ask(server, COMPLETIONS, max_tokens=3.0, top_k=5.0, seed=7.0, n=2.0)
    assert [choice["text"] for choice in document["choices"]] == [" 1 2 3"] * 2
    assert sampling.top_k == 5


def test_sixteen_stop_strings(server):
    stop = [f"never {n}" for n in range(15)] + [" 3"]
    for path, fields in (
        (CHAT, {"stop": stop}),
        (COMPLETIONS, {"stop": stop}),
        (GENERATE, {"sampling_params": {"stop": stop}}),
    ):
        _, sampling = ask(server, path, **fields)
        assert sampling.stop == tuple(stop)


def test_replayed_history(server):
    """Clients send back messages with fields that other servers added."""
    call = {
        "id": "call_1",
        "type": "function",
        "function": {"name": "f", "arguments": "{}"},
        "index": 0,
    }
    messages = [
        {"role": "developer", "content": [{"type": "text", "text": "be brief", "cache": {"a": 1}}]},
        {"role": "user", "content": "hi", "id": "msg_1", "timestamp": 5, "files": ["x"]},
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [call],
            "refusal": None,
            "annotations": [],
            "audio": None,
            "function_call": None,
            "provider_specific_fields": {"x": 1},
            "reasoning_content": "I call f.",
        },
        {"role": "tool", "tool_call_id": "call_1", "name": "f", "content": "result"},
        {"role": "assistant", "content": None, "reasoning": "done"},
        {"role": "assistant", "content": "", "tool_calls": []},
        {"role": "user", "name": "anna", "content": "and?"},
    ]
    server.http.post(CHAT, json={"messages": messages}).raise_for_status()
    seen, _, _ = server.model.chats[-1]
    assert [message["role"] for message in seen] == [
        "system",
        "user",
        "assistant",
        "tool",
        "assistant",
        "assistant",
        "user",
    ]
    assert seen[0]["content"] == "be brief"
    assert seen[1] == {"role": "user", "content": "hi"}
    assert seen[2]["content"] == ""
    assert seen[2]["reasoning_content"] == "I call f."
    assert seen[2]["tool_calls"][0]["function"] == {"name": "f", "arguments": "{}"}
    assert seen[3] == {"role": "tool", "content": "result", "name": "f", "tool_call_id": "call_1"}
    assert seen[4]["reasoning_content"] == "done"
    assert seen[6]["name"] == "anna"


def test_template_arguments_reach_the_chat_template(server):
    ask(server, CHAT, chat_template_kwargs={"enable_thinking": False}, reasoning_effort="low")
    _, _, arguments = server.model.chats[-1]
    assert arguments == {"enable_thinking": False, "reasoning_effort": "low"}


def test_special_tokens_before_a_prompt_can_be_left_out(server):
    encode, seen = server.model.encode, []

    def spy(text, *, add_special_tokens=True):
        seen.append(add_special_tokens)
        return encode(text, add_special_tokens=add_special_tokens)

    server.model.encode = spy
    try:
        ask(server, COMPLETIONS, add_special_tokens=False)
        ask(server, COMPLETIONS)
    finally:
        del server.model.encode
    assert seen == [False, True]


@pytest.mark.parametrize(
    "body",
    [
        # vLLM's `vllm bench serve`, backends openai and openai-chat.
        {
            "model": "fake",
            "prompt": "x",
            "repetition_penalty": 1.0,
            "max_tokens": 16,
            "logprobs": None,
            "stream": True,
            "stream_options": {"include_usage": True},
            "ignore_eos": True,
        },
        {
            "model": "fake",
            "messages": [{"role": "user", "content": [{"type": "text", "text": "x"}]}],
            "max_completion_tokens": 16,
            "stream": True,
            "stream_options": {"include_usage": True},
            "ignore_eos": True,
        },
        # SGLang's `bench_serving`, backends sglang-oai, vllm-chat and sglang.
        {
            "model": "fake",
            "prompt": "x",
            "temperature": 0.0,
            "best_of": 1,
            "max_tokens": 16,
            "stream": True,
            "ignore_eos": True,
        },
        {
            "model": "fake",
            "messages": HELLO,
            "max_completion_tokens": 16,
            "stream": True,
            "temperature": 0.0,
            "ignore_eos": True,
        },
        {
            "text": "x",
            "sampling_params": {"temperature": 0.0, "max_new_tokens": 16, "ignore_eos": True},
            "stream": True,
            "stream_options": {"include_usage": True},
            "lora_path": "",
            "return_logprob": False,
            "logprob_start_len": -1,
        },
    ],
    ids=["vllm-completions", "vllm-chat", "sglang-completions", "sglang-chat", "sglang-generate"],
)
def test_request_shapes_of_serving_benchmarks(server, body):
    path = CHAT if "messages" in body else COMPLETIONS if "prompt" in body else GENERATE
    reply = server.http.post(path, json=body)
    assert reply.status_code == 200, reply.text
    *events, done, end = reply.text.split("\n\n")
    assert (done, end) == ("data: [DONE]", "")
    documents = [json.loads(event.removeprefix("data: ")) for event in events]
    if path == GENERATE:
        # The benchmark counts tokens between events by this field.
        counts = [document["meta_info"]["completion_tokens"] for document in documents]
        assert counts == sorted(counts)
        assert (counts[0] > 0, counts[-1]) == (True, 16)
    elif "stream_options" in body:
        assert documents[-1]["usage"]["completion_tokens"] == 16
        assert documents[-1]["choices"] == []
