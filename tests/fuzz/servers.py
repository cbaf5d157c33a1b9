"""Targets over HTTP: requests to cpumoe's server, and other servers' replies to the chat."""

import contextlib
import json

from fake_model import FakeModel
from hypothesis import strategies as st
from starlette.testclient import TestClient

from cpumoe.cli.chat_backends import Answer
from cpumoe.cli.chat_reply import ReplyError, first_model, quote, read_reply
from cpumoe.text.serving.app import create_app

from .documents import changed, damaged, dumped, json_bytes
from .target import Target, in_one_line_for_terminals

_MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": [{"type": "text", "text": "Hi"}]},
    {"role": "assistant", "content": None, "tool_calls": [{"id": "1", "type": "function",
     "function": {"name": "weather", "arguments": "{}"}}]},
    {"role": "tool", "tool_call_id": "1", "content": "wet"},
]  # fmt: skip
_SAMPLING = {"max_tokens": 3, "temperature": 0.5, "top_p": 0.9, "seed": 1, "stop": ["x"], "n": 2,
             "top_k": 3, "min_p": 0.1, "logit_bias": {}, "stop_token_ids": [3]}  # fmt: skip
_TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}]
_SCHEMA = {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "object"}}}
BODIES = {
    "/v1/chat/completions": (
        {"messages": _MESSAGES, "tools": _TOOLS, "tool_choice": "auto", **_SAMPLING},
        {"messages": _MESSAGES[:2], "stream": True, "stream_options": {"include_usage": True}},
        {"messages": _MESSAGES[:2], "logprobs": True, "top_logprobs": 2, "max_tokens": 2},
        {"messages": _MESSAGES[:2], "response_format": _SCHEMA, "chat_template_kwargs": {"a": 1}},
    ),
    "/v1/completions": (
        {"model": "fake", "prompt": "a", **_SAMPLING},
        {"prompt": ["a", "b"], "echo": True, "logprobs": 1, "max_tokens": 0},
        {"prompt": [[1, 2], [3]], "stream": True, "max_tokens": 2, "n": 2},
    ),
    "/generate": (
        {"text": "a", "sampling_params": {"max_new_tokens": 2, "temperature": 0}},
        {"input_ids": [[1], [2]], "sampling_params": [{}, {"n": 2}], "return_logprob": True},
        {"text": ["a"], "stream": True, "sampling_params": {"json_schema": "{}"}},
    ),
    "/tokenize": ({"prompt": "a", "add_special_tokens": True}, {"messages": _MESSAGES[:2]}),
    "/detokenize": ({"tokens": [1, 2]},),
}
_PATHS = (*BODIES, "/", "/health", "/v1/models", "/v1/models/fake", "/metrics", "/version", "/x")
_METHODS = ("POST", "POST", "POST", "GET", "HEAD", "PUT", "DELETE", "OPTIONS")
_TYPES = (
    "application/json",
    "application/json",
    "application/json; charset=utf-16",
    "text/plain",
    "",
)
# Statuses of a server that works correctly, unlike 500.
_SOUND = frozenset({200, 400, 401, 404, 405, 408, 411, 413, 415, 429, 501, 503})


class Requests(Target):
    """Requests to the application, in this process."""

    def __init__(self):
        self._stack = contextlib.ExitStack()
        self._model = FakeModel()
        self._http = self._stack.enter_context(TestClient(create_app(self._model)))

    def close(self):
        self._stack.close()

    def strategy(self):
        fitting = st.sampled_from(list(BODIES)).flatmap(
            lambda path: st.tuples(
                st.just("POST"), st.just(path), st.just(_TYPES[0]), json_bytes(BODIES[path])
            )
        )
        every = tuple(body for bodies in BODIES.values() for body in bodies)
        odd = st.tuples(*map(st.sampled_from, (_METHODS, _PATHS, _TYPES)), json_bytes(every))
        return fitting | fitting | fitting | odd

    def check(self, data):
        method, path, kind, body = data
        reply = self._http.request(method, path, content=body, headers={"Content-Type": kind})
        assert reply.status_code in _SOUND, f"{reply.status_code}: {reply.text[:300]}"
        assert "Traceback" not in reply.text
        if reply.status_code >= 400 and method != "HEAD":
            error = reply.json()["error"]
            assert list(error) == ["message", "type", "param", "code"]
            assert 0 < len(error["message"]) < 2000
        assert self._http.get("/health").status_code == 200
        for noted in (self._model.prompts, self._model.samplings, self._model.chats):
            noted.clear()


_CHUNK = {
    "id": "1",
    "object": "chat.completion.chunk",
    "choices": [{"index": 0, "delta": {"role": "assistant", "content": "Hi", "tool_calls": [
        {"index": 0, "function": {"name": "f", "arguments": "{"}}]}, "finish_reason": None}],
    "usage": None,
}  # fmt: skip
_CHUNKS = (
    _CHUNK,
    {"choices": [{"delta": {"reasoning_content": "Hm"}, "finish_reason": "stop"}]},
    {"choices": [], "usage": {"completion_tokens": 3}},
    {"choices": [{"message": {"content": [{"type": "text", "text": "Hi"}]}}]},
    {"error": {"message": "no", "code": 500}},
    {"object": "list", "data": [{"id": "m"}]},
)


@st.composite
def _streams(draw):
    events = [dumped(changed(draw, _CHUNKS)) for _ in range(draw(st.integers(0, 5)))]
    field = draw(st.sampled_from([b"data: ", b"data: ", b"data:", b"event: error\ndata: ", b": "]))
    end = draw(st.sampled_from([b"\n\n", b"\n\n", b"\r\n\r\n", b"\n"]))
    last = draw(st.sampled_from([b"data: [DONE]\n\n", b"data: [DONE]", b""]))
    return damaged(draw, b"".join(field + event + end for event in events) + last)


class Replies(Target):
    """Replies of servers to the chat client: streams of events, documents, anything."""

    def strategy(self):
        return st.tuples(_streams() | json_bytes(_CHUNKS), st.integers(1, 5000))

    def check(self, data):
        body, step = data
        pieces = [body[at : at + step] for at in range(0, len(body), step)]
        answer = Answer()
        try:
            for part in read_reply(pieces):
                answer.add(part.piece)
                assert part.tokens is None or isinstance(part.tokens, int)
                assert part.finish_reason is None or isinstance(part.finish_reason, str)
        except ReplyError as error:
            in_one_line_for_terminals(error)
        assert answer.lack is None or answer.lack
        assert len(quote(body)) < 1000
        with contextlib.suppress(ValueError, RecursionError):
            name = first_model(json.loads(body))
            assert name is None or isinstance(name, str)
