"""Paths for operators, load balancers, monitoring and tokenizing clients."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from fake_model import FakeModel
from serving_tools import Server, error_of, wait_for

from cpumoe import __version__
from cpumoe.text.serving import app as app_module
from cpumoe.text.serving.metrics import has_metrics

COMPLETIONS = "/v1/completions"
NAMES = (
    "request_queue_time_seconds",
    "time_to_first_token_seconds",
    "time_per_output_token_seconds",
    "e2e_request_latency_seconds",
)

needs_metrics = pytest.mark.skipif(not has_metrics(), reason="Prometheus' library is not installed")


@pytest.fixture(scope="module")
def server():
    with Server() as running:
        yield running


@pytest.mark.parametrize("path", ["/health", "/v1/health"])
def test_health(server, path):
    assert server.http.get(path).json() == {"status": "ready"}


def test_version_and_index(server):
    assert server.http.get("/version").json() == {"version": __version__}
    index = server.http.get("/").json()
    assert (index["name"], index["version"]) == ("cpumoe", __version__)
    assert {"/health", "/generate", "/tokenize", "/v1/chat/completions"} <= set(index["paths"])


@pytest.mark.parametrize("path", ["/", "/health", "/v1/health", "/version", "/v1/models/fake"])
def test_head_is_get_without_a_body(server, path):
    expected = server.http.get(path)
    reply = server.http.head(path)
    assert (reply.status_code, reply.content) == (200, b"")
    assert reply.headers["content-length"] == str(len(expected.content))
    assert server.http.head("/nowhere").status_code == 404


def test_a_path_may_end_with_a_slash(server):
    """There is no redirection, which clients would follow without body or key."""
    for path in ("/health/", "/v1/models/", "/v1/models/fake/"):
        assert server.http.get(path).status_code == 200
    assert server.http.post(f"{COMPLETIONS}/", json={"prompt": "x"}).status_code == 200


def test_wrong_methods_are_told_the_right_ones(server):
    for method, path, allowed in (
        ("POST", "/health", "GET, HEAD"),
        ("DELETE", "/v1/models/fake", "GET, HEAD"),
        ("GET", COMPLETIONS, "POST"),
        ("HEAD", "/tokenize", "POST"),
    ):
        reply = server.http.request(method, path)
        assert (reply.status_code, reply.headers["allow"]) == (405, allowed)


def test_what_needs_a_key():
    with Server(api_key="secret") as server:
        for path in ("/", "/health", "/v1/health", "/version"):
            assert server.http.get(path).status_code == 200
        assert server.http.get("/metrics").status_code in (200, 501)
        assert server.http.head("/v1/models").status_code == 401
        for path in ("/tokenize", "/detokenize"):
            assert server.refuse(path, {"prompt": "x", "tokens": [1]})[0] == 401


def test_tokenize(server):
    text = {"prompt": "ab", "model": "fake"}
    reply = server.http.post("/tokenize", json=text).json()
    expected = {"count": 2, "max_model_len": 1000, "tokens": [97, 98], "token_strs": None}
    assert reply == expected
    reply = server.http.post("/tokenize", json={**text, "return_token_strs": True}).json()
    assert reply == {**expected, "token_strs": ["a", "b"]}


def test_tokenize_a_conversation(server):
    tool = {"type": "function", "function": {"name": "f"}}
    messages = [{"role": "user", "content": [{"type": "text", "text": "hi"}]}]
    body = {"messages": messages, "tools": [tool], "chat_template_kwargs": {"a": 1}}
    reply = server.http.post("/tokenize", json={**body, "add_generation_prompt": True}).json()
    assert "".join(map(chr, reply["tokens"])) == "user: hi"
    assert server.model.chats[-1] == ([{"role": "user", "content": "hi"}], [tool], {"a": 1})


def test_detokenize(server):
    assert server.http.post("/detokenize", json={"tokens": [97, 98]}).json() == {"prompt": "ab"}
    assert server.http.post("/detokenize", json={"tokens": []}).json() == {"prompt": ""}


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/tokenize", {}, "prompt"),
        ("/tokenize", {"prompt": "x", "messages": [{"role": "user", "content": "x"}]}, "prompt"),
        ("/tokenize", {"prompt": 5}, "prompt"),
        ("/tokenize", {"messages": []}, "messages"),
        ("/tokenize", {"messages": [{"role": "assistant", "content": "x"}]}, "messages"),
        ("/tokenize", {"messages": [{"role": "user", "content": None}]}, "messages[0].content"),
        ("/tokenize", {"prompt": "x", "add_generation_prompt": False}, "add_generation_prompt"),
        ("/tokenize", {"prompt": "x", "promptt": "y"}, "promptt"),
        ("/tokenize", {"prompt": "x", "model": "other"}, "model"),
        ("/detokenize", {}, "tokens"),
        ("/detokenize", {"tokens": [-1]}, "tokens"),
        ("/detokenize", {"tokens": ["a"]}, "tokens"),
        ("/detokenize", {"tokens": [2**30]}, "tokens"),
    ],
)
def test_what_cannot_be_tokenized_is_named(server, path, body, param):
    status, error = server.refuse(path, body)
    assert (status, error["param"]) == (404 if param == "model" else 400, param)


def samples(server):
    """Values of all metrics, by name without prefix and labels."""
    parser = pytest.importorskip("prometheus_client.parser")
    reply = server.http.get("/metrics")
    assert reply.status_code == 200
    assert reply.headers["content-type"].startswith("text/plain")
    found = {}
    for family in parser.text_string_to_metric_families(reply.text):
        for sample in family.samples:
            others = {k: v for k, v in sample.labels.items() if k != "model_name"}
            found[(sample.name.removeprefix("cpumoe:"), *others.values())] = sample.value
    return found


@needs_metrics
def test_metrics_count_what_happens():
    with Server(FakeModel(end=10**6)) as server:
        before = samples(server)
        assert before["prompt_tokens_total",] == 0
        for tokens in (1, 5):
            body = {"prompt": "xyz", "max_tokens": tokens, "stream": tokens == 5}
            assert server.http.post(COMPLETIONS, json=body).status_code == 200
        server.http.post("/tokenize", json={"prompt": "xyz"})
        server.refuse(COMPLETIONS, {"prompt": "x" * 2000})
        server.refuse(COMPLETIONS, {"prompt": "x", "temperature": -1})
        server.model.fails_at = 3
        server.model.delay = 0.02
        server.http.post(COMPLETIONS, json={"prompt": "x", "stream": True})
        after = samples(server)
    assert after["prompt_tokens_total",] == 6
    assert after["generation_tokens_total",] == 6
    assert after["request_success_total", "length"] == 2
    assert after["request_errors_total", "context_length_exceeded"] == 1
    assert after["request_errors_total", "invalid_request"] == 1
    assert after["request_errors_total", "internal_error"] == 1
    counts = [after[f"{name}_count",] for name in NAMES]
    # One text has no token after its first.
    assert counts == [2, 2, 1, 2]
    assert after["process_resident_memory_bytes",] > 0


@needs_metrics
def test_metrics_say_what_runs_and_waits():
    model = FakeModel()
    may_run = threading.Event()
    model.generate = lambda *_, **__: may_run.wait(60)
    body = {"prompt": "x", "max_tokens": 2}
    with Server(model) as server, ThreadPoolExecutor(3) as pool:
        worker = server.app.state.service.worker
        for _ in range(3):
            pool.submit(server.http.post, COMPLETIONS, json=body)
        wait_for(lambda: worker.waiting == 2)
        found = samples(server)
        del model.generate
        may_run.set()
    assert (found["num_requests_running",], found["num_requests_waiting",]) == (1, 2)


def test_metrics_without_prometheus_library_say_what_is_missing(monkeypatch):
    monkeypatch.setattr(app_module, "has_metrics", lambda: False)
    with Server() as server:
        reply = server.http.get("/metrics")
        assert reply.status_code == 501
        assert "pip install" in error_of(reply)["message"]
        assert server.http.post(COMPLETIONS, json={"prompt": "x"}).status_code == 200
