"""Requests that a server refuses, and its errors."""

import http.client
import json

import openai
import pytest
from fake_model import FakeModel
from serving_tools import Server, error_of

from cpumoe.text.serving.settings import Settings

HELLO = [{"role": "user", "content": "hello"}]
CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"


@pytest.fixture(scope="module")
def server():
    with Server() as running:
        yield running


@pytest.fixture(scope="module", autouse=True)
def _still_serves(server):
    yield
    assert server.http.post(COMPLETIONS, json={"prompt": "x"}).status_code == 200


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"null", b"[]", b"\xff\xfe", b'"text"', b"[" * 100_000, b'{"prompt": "\\ud800"}'],
    ids=lambda body: repr(body[:8]),
)
@pytest.mark.parametrize("path", [CHAT, COMPLETIONS, "/generate"])
def test_bodies_that_are_no_request(server, path, body):
    status, error = server.refuse(path, body)
    assert status == 400
    assert error["type"] == "invalid_request_error"


def test_errors_reach_openais_client_as_its_exceptions(server):
    with server.client() as client:
        with pytest.raises(openai.NotFoundError, match=r"'other'.*'fake'") as caught:
            client.chat.completions.create(model="other", messages=HELLO)
        assert caught.value.code == "model_not_found"
        with pytest.raises(openai.NotFoundError):
            client.models.retrieve("other")
        with pytest.raises(openai.BadRequestError, match="temperature") as caught:
            client.chat.completions.create(model="fake", messages=HELLO, temperature=-1)
        assert caught.value.param == "temperature"


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("logit_bias", {"5": 1}),
        ("frequency_penalty", 0.5),
        ("audio", {"voice": "x"}),
        ("modalities", ["audio"]),
        ("web_search_options", {}),
        ("suffix", "end"),
        ("verbosity", "high"),
        ("functions", [{"name": "f"}]),
        ("function_call", {"name": "f"}),
        # vLLM's and SGLang's.
        ("use_beam_search", True),
        ("length_penalty", 2.0),
        ("bad_words", ["x"]),
        ("allowed_token_ids", [1]),
        ("prompt_logprobs", 1),
        ("truncate_prompt_tokens", 5),
        ("include_stop_str_in_output", True),
        ("no_stop_trim", True),
        ("structured_outputs", {"regex": "a*"}),
        ("regex", "a*"),
        ("ebnf", 'root ::= "a"'),
        ("lora_path", "x"),
        ("thinking_token_budget", 0),
        ("include_reasoning", False),
        ("return_routed_experts", True),
        ("return_token_ids", True),
    ],
)
def test_what_cannot_be_honoured_is_named(server, field, value):
    for path, body in ((CHAT, {"messages": HELLO}), (COMPLETIONS, {"prompt": "x"})):
        status, error = server.refuse(path, {**body, field: value})
        assert (status, error["param"], error["code"]) == (400, field, "unsupported_parameter")
        assert field in error["message"]


@pytest.mark.parametrize(
    ("path", "extra", "param"),
    [
        (COMPLETIONS, {"best_of": 2}, "best_of"),
        (COMPLETIONS, {"tools": [{"type": "function"}]}, "tools"),
        (COMPLETIONS, {"tool_choice": "required"}, "tool_choice"),
        (CHAT, {"echo": True}, "echo"),
        (CHAT, {"continue_final_message": True}, "continue_final_message"),
        (CHAT, {"add_generation_prompt": False}, "add_generation_prompt"),
        (CHAT, {"chat_template": "{{ messages }}"}, "chat_template"),
        (
            CHAT,
            {"stream": True, "stream_options": {"include_obfuscation": True}},
            "stream_options.include_obfuscation",
        ),
    ],
)
def test_what_one_kind_of_completion_lacks_is_named(server, path, extra, param):
    body = {"messages": HELLO} if path == CHAT else {"prompt": "x"}
    status, error = server.refuse(path, {**body, **extra})
    assert (status, error["param"]) == (400, param)


@pytest.mark.parametrize(
    ("extra", "param"),
    [
        ({"max_tokens": "5"}, "max_tokens"),
        ({"max_tokens": 2.5}, "max_tokens"),
        ({"max_tokens": -2}, "max_tokens"),
        ({"max_tokens": True}, "max_tokens"),
        ({"n": 0}, "n"),
        ({"n": True}, "n"),
        ({"top_p": 1.5}, "top_p"),
        ({"top_k": -2}, "top_k"),
        ({"min_p": 2}, "min_p"),
        ({"min_tokens": -1}, "min_tokens"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"seed": -2}, "seed"),
        ({"seed": 2**63}, "seed"),
        ({"stop_token_ids": ["x"]}, "stop_token_ids"),
        ({"ignore_eos": "no"}, "ignore_eos"),
        ({"logprobs": 2}, "logprobs"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"chat_template_kwargs": []}, "chat_template_kwargs"),
        ({"temperature": "hot"}, "temperature"),
        ({"temperature": 1e9}, "temperature"),
        ({"stop": 5}, "stop"),
        ({"stop": list("abcdefghijklmnopq")}, "stop"),
        ({"stream": "yes"}, "stream"),
        ({"max_tokenz": 5}, "max_tokenz"),
        ({"messages": []}, "messages"),
        ({"messages": "hello"}, "messages"),
        ({"messages": [{"role": "wizard", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user", "content": None}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0]"),
        ({"messages": [{"role": "assistant", "content": "x"}]}, "messages"),
        ({"messages": [{**HELLO[0], "audio": {"id": "1"}}]}, "messages[0].audio"),
        ({"messages": [{**HELLO[0], "tool_calls": [{"id": "1"}]}]}, "messages[0].tool_calls"),
    ],
)
def test_bad_values_are_named(server, extra, param):
    status, error = server.refuse(CHAT, json.dumps({"messages": HELLO, **extra}))
    assert status == 400, error
    assert error["param"].startswith(param)
    assert error["message"]


@pytest.mark.parametrize(
    "prompt",
    [
        ["a", [1]],
        ["a", 1],
        [1, "a"],
        [-1],
        [[1], [-1]],
        [[1], []],
        ["a", ""],
        [2**31],
        [1.5],
        [True],
        5,
        {},
        None,
        [],
        "",
    ],
)
def test_bad_prompts(server, prompt):
    status, error = server.refuse(COMPLETIONS, {"prompt": prompt})
    assert (status, error["param"]) == (400, "prompt")


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "text"),
        ({"text": "a", "input_ids": [1]}, "text"),
        ({"text": [1, 2]}, "text"),
        ({"text": []}, "text"),
        ({"input_ids": []}, "input_ids"),
        ({"input_ids": [[1], "a"]}, "input_ids"),
        ({"text": "a", "token_ids_logprob": [1]}, "token_ids_logprob"),
        ({"text": "a", "return_hidden_states": True}, "return_hidden_states"),
        ({"text": "a", "image_data": ["x"]}, "image_data"),
        ({"text": "a", "textt": "b"}, "textt"),
        ({"text": "a", "sampling_params": {"regex": "a"}}, "regex"),
        ({"text": "a", "sampling_params": {"frequency_penalty": 1}}, "frequency_penalty"),
        ({"text": "a", "sampling_params": {"json_schema": "{"}}, "json_schema"),
        (
            {"text": "a", "sampling_params": {"min_new_tokens": -1}},
            "sampling_params.min_new_tokens",
        ),
        ({"text": "a", "top_logprobs_num": 21}, "top_logprobs_num"),
        ({"text": "a", "sampling_params": {"temperature": -1}}, "temperature"),
        ({"text": "a", "sampling_params": [{}]}, "sampling_params"),
    ],
)
def test_sglang_refusals(server, body, param):
    status, error = server.refuse("/generate", body)
    assert (status, error["param"]) == (400, param)


def test_context_length(server):
    status, error = server.refuse(COMPLETIONS, {"prompt": "x" * 1_000_000})
    assert (status, error["code"], error["param"]) == (400, "context_length_exceeded", "prompt")
    assert "1000 " in error["message"]
    assert "1000000" in error["message"]
    status, error = server.refuse(CHAT, {"messages": [{"role": "user", "content": "x" * 1000}]})
    assert (status, error["code"], error["param"]) == (400, "context_length_exceeded", "messages")


def test_operators_limit_of_tokens():
    with Server(FakeModel(end=10**6), max_tokens=7) as server, server.client() as client:
        for asked in (3, 7, 8, 10**6):
            reply = client.completions.create(model="fake", prompt="x", max_tokens=asked)
            assert reply.usage.completion_tokens == min(asked, 7)
            assert reply.choices[0].finish_reason == "length"


def test_paths_and_methods(server):
    for path in ("/v1", "/v1/chat", "/docs", "/openapi.json", "/v1/embeddings"):
        reply = server.http.get(path)
        assert (reply.status_code, error_of(reply)["code"]) == (404, "not_found")
    for path in (CHAT, COMPLETIONS, "/generate"):
        reply = server.http.get(path)
        assert (reply.status_code, error_of(reply)["code"]) == (405, "method_not_allowed")
        assert reply.headers["allow"] == "POST"


@pytest.mark.parametrize("path", ["/api/chat", "/api/generate", "/v1/messages", "/v1/responses"])
def test_clients_of_other_protocols_are_told_which_ones_there_are(server, path):
    status, error = server.refuse(path, {"model": "llama3"})
    assert (status, error["code"]) == (404, "not_found")
    assert path in error["message"]
    assert "OpenAI's API (/v1/chat/completions" in error["message"]


def test_only_json_is_read(server):
    """Otherwise a web page could send requests to its visitor's local server."""
    for kind in ("text/plain", "application/x-www-form-urlencoded"):
        status, error = server.refuse(COMPLETIONS, "{}", headers={"Content-Type": kind})
        assert status == 415
        assert "application/json" in error["message"]


def test_size_of_a_body():
    with Server(max_request_bytes=1000) as server:
        body = json.dumps({"prompt": "x" * 2000})
        status, error = server.refuse(COMPLETIONS, body)
        assert (status, error["code"]) == (413, "request_too_large")
        connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=10)
        chunks = (b" " * 100 for _ in range(20))
        headers = {"Content-Type": "application/json"}
        connection.request("POST", COMPLETIONS, chunks, headers, encode_chunked=True)
        assert connection.getresponse().status == 413
        connection.close()
        assert server.http.post(COMPLETIONS, json={"prompt": "x"}).status_code == 200


def test_api_key():
    with Server(api_key="sésame") as server:
        for headers in ({}, {"Authorization": "Bearer x"}, {"Authorization": b"Bearer \xff"}):
            for path in (CHAT, COMPLETIONS, "/generate"):
                status, error = server.refuse(path, b"{", headers=headers)
                assert (status, error["code"]) == (401, "invalid_api_key")
            assert server.http.get("/v1/models", headers=headers).status_code == 401
            assert server.http.get("/health", headers=headers).status_code == 200
        with server.client(api_key="x") as client, pytest.raises(openai.AuthenticationError):
            client.models.list()
        key = {"Authorization": "Bearer sésame".encode()}
        assert server.http.get("/v1/models", headers=key).status_code == 200


def test_our_own_mistakes_are_logged_not_told(caplog):
    model = FakeModel()
    with Server(model) as server:
        model.fails_at = 1
        for stream in (True, False):
            status, error = server.refuse(COMPLETIONS, {"prompt": "x", "stream": stream})
            assert (status, error["code"]) == (500, "internal_error")
            assert "secret" not in error["message"]
        model.fails_at, model.delay = 3, 0.02
        body = {"prompt": "x", "stream": True}
        text = server.http.post(COMPLETIONS, json=body).text
        *_, last, done, end = text.split("\n\n")
        assert json.loads(last.removeprefix("data: "))["error"]["code"] == "internal_error"
        assert (done, end) == ("data: [DONE]", "")
        model.fails_at = None
        assert server.http.post(COMPLETIONS, json={"prompt": "x"}).status_code == 200


def test_settings_are_checked():
    for wrong in ({"queue": -1}, {"max_tokens": 0}, {"api_key": ""}, {"served_model_name": " "}):
        with pytest.raises(ValueError, match=r"expected .* got"):
            Settings(**wrong)
    assert "secret" not in repr(Settings(api_key="secret"))
