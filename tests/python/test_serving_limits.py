"""Limits of one request: time on the event loop, memory, and lines in the log."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from pydantic import ValidationError
from serving_tools import Server, wait_for
from test_serving_process import serving

from cpumoe.text.serving import body as body_module
from cpumoe.text.serving.body import StrictModel
from cpumoe.text.serving.errors import ApiError

CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"
# Bytes of a request's body.
SIZE = 8 << 20


def filled(before, repeated, after):
    count = (SIZE - len(before) - len(after)) // len(repeated)
    return before + repeated * count + after


HOSTILE = {
    "empty messages": (CHAT, filled(b'{"messages":[', b"{},", b"{}]}")),
    "short messages": (CHAT, filled(b'{"messages":[', b'{"role":1,"content":[]},', b"{}]}")),
    "empty parts": (CHAT, filled(b'{"messages":[{"role":"user","content":[', b"{},", b"{}]}]}")),
    "tools": (CHAT, filled(b'{"messages":[],"tools":[', b"[],", b"[]]}")),
    "strings": (COMPLETIONS, filled(b'{"prompt":"x","stop":[', b'"",', b'""]}')),
    "prompts": (COMPLETIONS, filled(b'{"prompt":[', b"[1],", b"[1]]}")),
    "strings without commas": (COMPLETIONS, filled(b'{"prompt":[', b'""', b"]}")),
    "tokens": (COMPLETIONS, filled(b'{"prompt":[', b"1,", b"1]}")),
    "wrong tokens": ("/generate", filled(b'{"input_ids":[', b"null,", b"1]}")),
    "depth": (COMPLETIONS, b"[" * SIZE),
    "names": (COMPLETIONS, b"{" + b",".join(b'"%06d":1' % n for n in range(SIZE // 11)) + b"}"),
    "a long name": (COMPLETIONS, filled(b'{"', b"x", b'":1}')),
    "a long value": (CHAT, filled(b'{"messages":[{"role":"', b"x", b'","content":""}]}')),
    "a long number": (COMPLETIONS, filled(b'{"prompt":"x","seed":', b"1", b"}")),
    "a long fraction": (COMPLETIONS, filled(b'{"prompt":"x","temperature":9.', b"1", b"}")),
    "as many messages as are read": (CHAT, b'{"messages":[' + b"{}," * 65000 + b"{}]}"),
    "as many tokens as are read": (COMPLETIONS, b'{"prompt":[' + b"12345," * 524000 + b"1]}"),
    "as many wrong tokens": (COMPLETIONS, b'{"prompt":[' + b"1.5," * 524000 + b"1]}"),
    "no end": (COMPLETIONS, filled(b'{"prompt":"', rb"\"", b"")),
}


@pytest.fixture(scope="module")
def process():
    with serving("--quiet") as process:
        yield process


def peak_bytes(process):
    status = Path(f"/proc/{process.popen.pid}/status").read_text("utf-8")
    return int(status.split("VmHWM:")[1].split()[0]) << 10


@pytest.mark.parametrize("name", HOSTILE)
def test_what_a_hostile_body_costs_is_bounded(process, name):
    """An error object per wrong element would take half a minute and several gigabytes."""
    path, content = HOSTILE[name]
    before = peak_bytes(process)
    headers = {"Content-Type": "application/json"}
    reply = process.http.post(path, content=content, headers=headers, timeout=10)
    assert reply.status_code == (200 if name == "a long fraction" else 400), reply.text
    assert len(reply.content) < 2000
    assert peak_bytes(process) - before < 15 * SIZE
    assert process.http.get("/health").status_code == 200


class _Body(StrictModel):
    numbers: list[int] | None = None
    pairs: list[tuple[int, str]] | None = None
    inner: list[_Body] | None = None


def errors_of(document):
    with pytest.raises(ValidationError) as caught:
        _Body.model_validate_json(json.dumps(document))
    return [error["loc"] for error in caught.value.errors()]


def test_a_list_is_read_up_to_its_first_wrong_element():
    assert errors_of({"numbers": [1, "a", "b", "c"]}) == [("numbers", 1)]
    assert errors_of({"pairs": [[1, "a"], [2, 3], [4, 5]]}) == [("pairs", 1, 1)]
    nested = {"inner": [{}, {"numbers": ["a", "b"]}, {"numbers": ["c"]}]}
    assert errors_of(nested) == [("inner", 1, "numbers", 0)]


def counts(text, *, chunk):
    measure = body_module._Measure()
    for start in range(0, len(text), chunk):
        measure.add(text[start : start + chunk])
    return measure.parts, measure.values


@pytest.mark.parametrize("chunk", [1, 2, 3, 1000])
@pytest.mark.parametrize(
    ("document", "parts", "values"),
    [
        ({"a": "b"}, 3, 0),
        ([1, 2.5, -3, None, True], 1, 4),
        ({"text": '[{,"}]\\', "b\\": [[], {}]}, 7, 2),
        ([r"\\", r"\"", '"', "\\", r"\\" * 3 + '"', "\n\t", "ü,"], 8, 6),
    ],
)
def test_what_a_body_consists_of_is_counted_as_it_comes(document, parts, values, chunk):
    for separators in ((",", ":"), (" , ", " : ")):
        text = json.dumps(document, separators=separators, ensure_ascii=False).encode()
        assert counts(text, chunk=chunk) == (parts, values)


def test_too_many_parts_are_refused_before_the_rest_has_come():
    measure = body_module._Measure()
    measure.add(b"{}" * body_module._MOST_PARTS)
    with pytest.raises(ApiError, match="at most 65536 strings, lists and objects, got more"):
        measure.add(b"[")
    with pytest.raises(ApiError, match="at most 524288 values, got more"):
        body_module._Measure().add(b"," * (body_module._MOST_VALUES + 1))


def test_bodies_that_come_at_the_same_time_have_room_together(monkeypatch):
    monkeypatch.setattr(body_module, "_LARGEST_BODIES", 2)
    content = json.dumps({"prompt": "x" * 900})
    head = f"POST {COMPLETIONS} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    head = f"{head}Content-Length: {len(content)}\r\n\r\n"
    with Server(max_request_bytes=1000) as server:
        bodies = server.app.state.service.bodies
        slow = [server.raw((head + content[:-1]).encode()) for _ in range(2)]
        wait_for(lambda: bodies.bytes == 2 * (len(content) - 1))
        status, error = server.refuse(COMPLETIONS, content)
        assert (status, error["code"]) == (503, "overloaded")
        for connection in slow:
            connection.sendall(b"}")
            assert b" 200 " in connection.recv(100)
            connection.close()
        assert bodies.bytes == 0
        assert server.http.post(COMPLETIONS, json={"prompt": "x"}).status_code == 200


def test_errors_repeat_little_of_what_was_sent(process):
    name = "x" * 100_000
    for body in ({"prompt": "x", name: 1}, {"prompt": "x", "model": name}):
        reply = process.http.post(COMPLETIONS, json=body)
        assert reply.status_code in (400, 404)
        assert "xxx … xxx" in reply.json()["error"]["message"]
        assert len(reply.content) < 2000
