"""``cpumoe chat URL`` with replies as real servers send them."""

import json

import pytest
from ports import unused_port
from raw_server import STUCK, RawServer, delta, events, http
from typer.testing import CliRunner

from cpumoe.cli import app, chat_reply
from cpumoe.cli.chat_backends import ChatError
from cpumoe.cli.chat_server import ServerBackend
from cpumoe.text.generation import Sampling

END = {"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]}
NOT_JSON = {"status": "502 Bad Gateway", "content_type": "text/html"}


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch):
    for name in ("SSL_CERT_FILE", "SSL_CERT_DIR", "OPENAI_API_KEY"):
        monkeypatch.delenv(name, raising=False)


def chat(server, *arguments, questions="a\n", **environment):
    url = server if isinstance(server, str) else server.url
    command = ["chat", url, "--model-name", "m", *arguments]
    result = CliRunner().invoke(app, command, input=questions, env=environment)
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


def answered(reply, *arguments, **environment):
    """Returns what a chat prints for a reply that has an answer."""
    with RawServer(reply) as server:
        result = chat(server, *arguments, **environment)
    assert (result.exit_code, result.stderr) == (0, "")
    return result.stdout.removesuffix("\n")


def refused(*replies):
    """Returns a chat's error for a reply without an answer. A second question is answered."""
    with RawServer(*replies, events(delta(content="fine"), END)) as server:
        result = chat(server, questions="a\nb\n")
    assert result.exit_code == 1
    assert result.stdout.endswith("fine\n")
    assert result.stderr.count("\n") == 1
    assert result.stderr.startswith(f"error: {server.url}: ")
    return result.stderr.removeprefix(f"error: {server.url}: ").removesuffix("\n")


@pytest.mark.parametrize(
    "last",
    [
        {"choices": [{"delta": None, "finish_reason": "stop"}]},
        {"choices": [{"finish_reason": "stop"}]},
        {"choices": [None]},
        {"choices": None, "usage": {"completion_tokens": 2}},
        {"choices": {}},
        {"choices": []},
        {"usage": None},
        {"choices": [{"delta": "text", "finish_reason": 7}], "usage": 3},
        delta(content=None, role=None),
        delta(content=5),
        None,
        [],
        {},
        "\r",
    ],
)
def test_events_that_say_nothing_are_passed_over(last):
    assert answered(events(delta(content="1 "), last, delta(content="2"), last, END)) == "1 2"
    assert answered(events(delta(content="1"), last)) == "1"


def test_what_sglang_sends_is_an_answer():
    """The form of SGLang 0.5.23's events."""

    def event(finish_reason=None, **said):
        choice = {"index": 0, "delta": {"reasoning_content": None, **said}, "logprobs": None}
        choice |= {"finish_reason": finish_reason, "matched_stop": None}
        return {"object": "chat.completion.chunk", "choices": [choice]}

    usage = {"prompt_tokens": 8, "total_tokens": 10, "completion_tokens": 2}
    first, last = event(role="assistant", content=""), event("length")
    counted = {"object": "chat.completion.chunk", "choices": [], "usage": usage}
    stream = (first, event(content=" thr"), event(content="ee"), last, counted)
    assert answered(events(*stream)) == " three"


@pytest.mark.parametrize(
    "content",
    [
        [{"type": "text", "text": "one "}, {"type": "text", "text": "two"}],
        ["one ", "two", None, 3, {"type": "image"}],
        "one two",
    ],
)
def test_content_may_come_in_parts(content):
    assert answered(events(delta(content=content), END)) == "one two"
    message = {"role": "assistant", "content": content}
    assert answered(http(json.dumps({"choices": [{"message": message}]}))) == "one two"


def test_a_refusal_and_a_completions_text_are_answers():
    assert answered(events(delta(refusal="no"), END)) == "no"
    assert answered(events({"choices": [{"text": "x", "finish_reason": "length"}]})) == "x"


@pytest.mark.parametrize("content_type", ["text/html", "application/json", "text/event-stream"])
@pytest.mark.parametrize("end", ["\n\n", "\r\n\r\n", ""])
def test_the_body_decides_what_a_reply_is(content_type, end):
    stream = f"\ufeff: hello\n\nevent: x\nid: 1\ndata:{json.dumps(delta('stop', content='a'))}{end}"
    assert answered(http(stream, content_type=content_type)) == "a"
    whole = {"choices": [{"message": {"content": "a\u2028b"}}], "usage": {"completion_tokens": 1}}
    assert answered(http(json.dumps(whole), content_type=content_type)) == "a\u2028b"
    indented = json.dumps(whole, indent=1, ensure_ascii=False).replace("\n", "\r\n")
    assert answered(http(indented, content_type=content_type)) == "a\u2028b"


def test_events_may_have_several_lines_and_arrive_in_any_pieces():
    text = json.dumps(delta(content="ä\u2028ö"), ensure_ascii=False, indent=0)
    stream = "".join(f"data: {line}\n" for line in text.split("\n")) + "\ndata: [DONE]\n\n"
    body = stream.encode()
    for size in (1, 2, 7, len(body)):
        parts = [body[at : at + size] for at in range(0, len(body), size)]
        assert [part.piece.text for part in chat_reply.read_reply(parts)] == ["ä\u2028ö"]


@pytest.mark.parametrize(
    ("said", "shown"),
    [
        ({"error": "out of memory"}, "out of memory"),
        ({"error": {"message": "out of memory", "code": 7}}, "out of memory"),
        ({"error": {"code": 7}}, '{"error": {"code": 7}}'),
        ({"object": "error", "message": "too long"}, "too long"),
        ({"error": "\x1b]0;x\x07 [bold]b[/]"}, "]0;x [bold]b[/]"),
    ],
)
def test_errors_come_with_any_status_and_in_events(said, shown):
    body = json.dumps(said)
    assert refused(http(body)) == shown
    assert refused(http(body, "500 Oh")) == f"500: {shown}"
    assert refused(events(said)) == shown
    assert refused(events(delta(content="be"), said)) == shown
    assert refused(http(f"event: error\ndata: {body}\n\n")) == shown


@pytest.mark.parametrize("data", ["", " ", "<br>"])
def test_an_error_that_says_nothing_is_still_one(data):
    assert refused(http(f"event: error\ndata: {data}\n\n")) == "an error event without a message"


@pytest.mark.parametrize(
    ("reply", "shown"),
    [
        (http("", "502 Bad Gateway"), "502: Bad Gateway"),
        (http("<html><TITLE>Oh &amp; no</TITLE><p>x", **NOT_JSON), "502: Oh & no"),
        (http("<h1>Oh</h1>\n<p>no", **NOT_JSON), "502: Oh no"),
        (http("Bad\r\n gateway", **NOT_JSON), "502: Bad gateway"),
        (http("\xff\x00", **NOT_JSON), "502: ÿ"),
        (http('"Bad"', **NOT_JSON), "502: Bad"),
        (http("[" * 100_000, **NOT_JSON), f"502: {'[' * 300}…"),
        (http('{"detail": "no such model"}', "404 No"), "404: no such model"),
        (
            http('{"detail": [{"loc": ["b"], "msg": "wrong"}, {"msg": "bad"}]}', "422 No"),
            "422: wrong; bad",
        ),
        (http('{"a": 1}', "422 No"), '422: {"a": 1}'),
        (http("nothing to see"), "expected an answer, got: nothing to see"),
        (http("<html>login"), "expected an answer, got: login"),
        (http("null"), "expected an answer, got: null"),
        (http("{}"), "expected an answer, got: {}"),
        (http(""), "expected an answer, got: nothing"),
        (http('{"detail": "busy"}'), "expected an answer, got: busy"),
        (http('{"choices": []}'), 'expected an answer, got: {"choices": []}'),
    ],
)
def test_a_foreign_body_is_quoted(reply, shown):
    assert refused(reply) == shown


@pytest.mark.parametrize(
    ("event", "shown"),
    [
        ('{"choices": [', 'expected JSON as an event\'s data, got: {"choices": ['),
        ("out of memory", "expected JSON as an event's data, got: out of memory"),
        ("[" * 100_000, f"expected JSON as an event's data, got: {'[' * 300}…"),
        ('"hello"', "expected a JSON object as an event's data, got: hello"),
        ([1], "expected a JSON object as an event's data, got: [1]"),
    ],
)
def test_an_event_that_cannot_be_read_is_quoted(event, shown):
    assert refused(events(delta(content="1"), event, END)) == shown


def test_an_answer_that_breaks_off_is_no_answer():
    cut = "the stream ended before the answer was complete"
    assert refused(events(delta(content="1"), done=False)) == cut
    assert refused(events({"detail": "busy"}, done=False)) == f"{cut}; the server sent: busy"
    stream = events(delta(content="1"), END)
    for missing in (1, 20, len(stream) - 120):
        assert refused(http(stream[: len(stream) - missing].partition(b"\r\n\r\n")[2], length=9999))
    assert "disconnected" in refused(b"")
    assert refused(b"SSH-2.0-OpenSSH_9.2\r\n")
    assert refused(b"HTTP/1.1 200 OK\r\nContent-Length: x\r\n\r\n")


def test_reasoning_alone_and_calls_of_tools_are_no_answer():
    for field in ("reasoning_content", "reasoning"):
        assert (
            refused(events(delta(**{field: "hm"}), END))
            == "the model wrote reasoning, but no answer"
        )
        cut_off = events(delta("length", **{field: "hm"}))
        assert "(finish reason length)" in refused(cut_off)
    parts = [{"type": "thinking", "thinking": [{"type": "text", "text": "hm"}]}]
    assert refused(events(delta(content=parts), END)) == "the model wrote reasoning, but no answer"
    calls = [
        [{"index": 0, "id": "1", "function": {"name": "look", "arguments": ""}}],
        [{"index": 0, "function": {"arguments": "{}"}}],
        [{"index": 1, "function": {"name": "find", "arguments": None}}, None],
    ]
    said = refused(events(*(delta(tool_calls=call) for call in calls), delta("tool_calls")))
    assert said == (
        "the model called tools, which a chat does not have: look, find (finish reason tool_calls)"
    )
    assert "look" in refused(events(delta(function_call={"name": "look"}), END))
    assert refused(events(END)) == "the answer is empty"


def test_reasoning_is_no_part_of_the_conversation():
    first = events(delta(reasoning_content="hm"), delta(content="yes"), END)
    with RawServer(first, events(delta(content="no"), END)) as server:
        result = chat(server, questions="a\nb\n")
    assert (result.exit_code, result.stdout) == (0, "yes\nno\n")
    said = [(m["role"], m["content"]) for m in server.requests[1][2]["messages"]]
    assert said == [("user", "a"), ("assistant", "yes"), ("user", "b")]
    backend_sees = []
    with RawServer(first) as server:
        answer = ServerBackend(server.url, None, "m", 20).answer(
            [{"role": "user", "content": "a"}], Sampling(), backend_sees.append
        )
    assert (answer.text, answer.reasoning, answer.finish_reason) == ("yes", "hm", "stop")
    assert [piece.reasoning for piece in backend_sees] == ["hm", ""]


def test_half_a_surrogate_pair_is_no_end_of_a_conversation():
    with RawServer(http(r'{"choices": [{"message": {"content": "\ud83d"}}]}')) as server:
        backend = ServerBackend(server.url, None, "m", 20)
        assert backend.answer([], Sampling(), lambda _: None).text == "\ud83d"
    with RawServer(events(delta(content="x"), END)) as server:
        backend = ServerBackend(server.url, None, "m", 20)
        messages = [{"role": "assistant", "content": "\ud83d"}]
        assert backend.answer(messages, Sampling(), lambda _: None).text == "x"
        assert server.requests[0][2]["messages"] == messages


@pytest.mark.parametrize(
    "reply",
    [[events(delta(content="1"))[:-30], STUCK], [STUCK], [http("", length=9), STUCK]],
)
def test_a_silent_server_is_waited_for_as_long_as_was_said(reply):
    with RawServer(reply) as server:
        result = chat(server, "--timeout", "0.2")
    assert result.exit_code == 1
    assert (
        result.stderr == f"error: {server.url}: no reply for 0.2 s; --timeout sets a longer time\n"
    )


def test_what_has_no_end_is_not_kept(monkeypatch):
    monkeypatch.setattr(chat_reply, "MAX_BYTES", 1000)
    too_long = "expected a reply or event of at most 0 MiB, got more"
    assert refused(http(b"x" * 2000)) == too_long
    assert refused(http(b"\n{" + b"\n" * 2000)) == too_long
    assert refused(http(b"data: " + b"x" * 2000)) == too_long
    assert refused(http(b"data: x\n" * 300)) == too_long
    assert answered(events(*(delta(content="x") for _ in range(100)), END)) == "x" * 100


def test_a_server_that_refuses_to_count_is_asked_without(monkeypatch):
    refusal = http('{"detail": "stream_options: extra fields not permitted"}', "422 No")
    fine = events(delta(content="x"), END)
    with RawServer(refusal, fine, fine) as server:
        result = chat(server, questions="a\nb\n")
    assert (result.exit_code, result.stdout) == (0, "x\nx\n")
    assert ["stream_options" in body for _, _, body in server.requests] == [True, False, False]


@pytest.mark.parametrize(
    "models",
    [
        {"object": "list", "data": [{"id": "m1"}, {"id": "m2"}]},
        [{"id": "m1"}],
        ["m1"],
        {"models": [{"name": "m1"}]},
        {"data": ["m1"]},
        {"data": [{"id": "", "name": "m1"}]},
    ],
)
def test_the_first_model_is_found_in_any_list(models):
    with RawServer(http(json.dumps(models))) as server:
        assert ServerBackend(server.url, None, None, 20).name == "m1"
    assert server.requests[0][0] == "GET /v1/models HTTP/1.1"


@pytest.mark.parametrize(
    ("reply", "shown"),
    [
        (http("<html>Hello"), "expected a list of models, got: Hello; name a model"),
        (http(""), "expected a list of models, got: nothing; name a model"),
        (http("[]"), "name a model with --model-name"),
        (http("null"), "name a model with --model-name"),
        (http('{"data": [{}]}'), "name a model with --model-name"),
        (http('{"data": {"id": "m"}}'), "name a model with --model-name"),
        (http('{"data": [{"id": 3}]}'), "name a model with --model-name"),
        (http("<title>x", **NOT_JSON), "502: x"),
    ],
)
def test_a_list_without_models_is_one_line(reply, shown):
    with RawServer(reply) as server, pytest.raises(ChatError) as caught:
        ServerBackend(server.url, None, None, 20)
    assert str(caught.value).startswith(f"{server.url}: ")
    assert shown in str(caught.value)


@pytest.mark.parametrize(
    ("url", "path"),
    [
        ("", "/v1/chat/completions"),
        ("/", "/v1/chat/completions"),
        ("/v1/", "/v1/chat/completions"),
        ("/api/v2", "/api/v2/chat/completions"),
        ("/v1/chat/completions", "/v1/chat/completions"),
    ],
)
def test_the_servers_address_or_its_apis_may_be_given(url, path):
    with RawServer(events(delta(content="x"), END)) as server:
        chat(server.url.removesuffix("/v1") + url)
    assert server.requests[0][0] == f"POST {path} HTTP/1.1"


@pytest.mark.parametrize("url", ["http://", "http://[::1", "http://a b", "http://\u2603\ufffe"])
def test_a_wrong_address_is_one_line(url):
    result = chat(url)
    assert result.exit_code in (1, 2)
    assert result.stderr.startswith("error: http")
    assert result.stderr.count("\n") == 1


def test_a_password_in_the_address_is_not_shown():
    result = chat(f"http://me:secret@127.0.0.1:{unused_port()}")
    assert result.exit_code == 1
    assert "refused" in result.stderr
    assert "secret" not in result.stderr


@pytest.mark.parametrize("proxy", ["http://127.0.0.1:9", "socks5://127.0.0.1:9", "nonsense://x"])
@pytest.mark.parametrize("variable", ["http_proxy", "HTTP_PROXY", "ALL_PROXY", "HTTPS_PROXY"])
def test_no_proxy_is_asked_for_this_computer(variable, proxy, monkeypatch):
    monkeypatch.setenv(variable, proxy)
    with RawServer(*[events(delta(content="x"), END)] * 3) as server:
        for host in ("127.0.0.1", "localhost", "0.0.0.0"):
            assert chat(f"http://{host}:{server.port}").stdout == "x\n"


@pytest.mark.parametrize("variable", ["SSL_CERT_FILE", "SSL_CERT_DIR", "REQUESTS_CA_BUNDLE"])
def test_what_is_not_encrypted_needs_no_certificates(variable):
    assert answered(events(delta(content="x"), END), **{variable: "/does/not/exist"}) == "x"


@pytest.mark.parametrize(
    ("environment", "shown"),
    [
        ({"SSL_CERT_FILE": "/no/file"}, "SSL_CERT_FILE=/no/file: no such file; correct it, or"),
        ({"SSL_CERT_FILE": __file__}, f"SSL_CERT_FILE={__file__}: "),
        ({"SSL_CERT_DIR": "/no/dir"}, "SSL_CERT_DIR=/no/dir: no such folder"),
        ({"https_proxy": "nonsense://x"}, "https_proxy: expected a proxy's address: "),
        ({"ALL_PROXY": "http://[::1"}, "ALL_PROXY: expected a proxy's address: "),
        ({"OPENAI_API_KEY": "kéy"}, "OPENAI_API_KEY: expected a key of printable ASCII"),
        ({"OPENAI_API_KEY": "key\r"}, "OPENAI_API_KEY: expected a key of printable ASCII"),
    ],
)
def test_a_wrong_variable_is_named(environment, shown):
    result = chat("https://cpumoe.invalid", **environment)
    assert result.exit_code == 2
    assert result.stderr.startswith(f"error: {shown}")
    assert result.stderr.count("\n") == 1
    assert "kéy" not in result.stderr


def test_a_socks_proxy_needs_a_package(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "socksio", None)
    result = chat("https://cpumoe.invalid", ALL_PROXY="socks5://127.0.0.1:9")
    said = "error: ALL_PROXY: a SOCKS proxy needs socksio: pip install socksio, or unset ALL_PROXY"
    assert (result.exit_code, result.stderr) == (2, f"{said}\n")


def test_a_proxy_that_may_be_the_reason_is_named():
    result = chat("http://cpumoe.invalid", HTTP_PROXY="http://127.0.0.1:9")
    assert result.exit_code == 1
    assert "the proxy that HTTP_PROXY names may be the cause" in result.stderr


def test_a_key_that_no_header_can_hold_is_not_shown():
    result = chat("http://127.0.0.1:9", "--api-key", "kéy")
    assert result.stderr == (
        "error: --api-key: expected a key of printable ASCII characters, "
        "got one whose character 2 is something else\n"
    )


def test_the_key_is_presented_if_there_is_one():
    reply = events(delta(content="x"), END)
    with RawServer(reply, reply) as server:
        chat(server)
        chat(server, OPENAI_API_KEY="k")
    keys = [headers.get("authorization") for _, headers, _ in server.requests]
    assert keys == [None, "Bearer k"]


@pytest.mark.parametrize("timeout", ["0", "-1", "nan", "inf"])
def test_a_timeout_must_be_a_time(timeout):
    result = chat("http://127.0.0.1:9", "--timeout", timeout)
    assert result.exit_code == 2
    assert "--timeout: expected more than 0 seconds" in result.stderr
