"""Errors that the worker's thread survives, and the end of the thread."""

import threading

import pytest
from fake_model import FakeModel
from serving_tools import Server, wait_for
from typer.testing import CliRunner

from cpumoe.cli import app, serve
from cpumoe.text.serving import server as server_module
from cpumoe.text.serving import worker as worker_module

COMPLETIONS = "/v1/completions"


class Panic(BaseException):
    """The kind of exception that pyo3 raises for a panic of Rust code."""


def raising(error):
    def fail(*_, **__):
        raise error

    return fail


@pytest.mark.parametrize(
    "error", [Panic, SystemExit, KeyboardInterrupt, GeneratorExit, MemoryError]
)
@pytest.mark.parametrize("method", ["encode", "generate"])
def test_whatever_a_request_raises_the_next_one_is_served(method, error, capsys):
    model = FakeModel()
    with Server(model) as server:
        setattr(model, method, raising(error("index out of range")))
        for stream in (True, False):
            status, answer = server.refuse(COMPLETIONS, {"prompt": "x", "stream": stream})
            assert (status, answer["code"]) == (500, "internal_error")
        delattr(model, method)
        assert server.http.get("/health").json() == {"status": "ready"}
        assert server.http.post(COMPLETIONS, json={"prompt": "x"}).status_code == 200
    log = capsys.readouterr().err
    assert log.count("a request failed") == 2
    assert "index out of range" in log


@pytest.fixture
def no_reports(monkeypatch):
    """Failures that cannot even be logged, as when there is no memory left at all."""
    monkeypatch.setattr(worker_module.logger, "exception", raising(MemoryError()))
    monkeypatch.setattr(threading, "excepthook", lambda _: None)


@pytest.mark.usefixtures("no_reports")
def test_a_server_that_can_answer_nothing_any_more_ends_at_once():
    model = FakeModel()
    model.generate = raising(MemoryError())
    with Server(model, grace_seconds=60) as server:
        status, answer = server.refuse(COMPLETIONS, {"prompt": "x"})
        assert (status, answer["code"]) == (500, "internal_error")
        wait_for(lambda: not server.running, 10)
        assert server.broken


@pytest.mark.usefixtures("no_reports")
def test_health_says_that_the_worker_has_failed(monkeypatch):
    monkeypatch.setattr(server_module.Server, "on_tick", server_module.uvicorn.Server.on_tick)
    model = FakeModel()
    model.generate = raising(MemoryError())
    with Server(model) as server:
        server.refuse(COMPLETIONS, {"prompt": "x"})
        wait_for(lambda: server.app.state.service.worker.broken)
        reply = server.http.get("/health")
        assert (reply.status_code, reply.json()) == (503, {"status": "failed"})
        assert server.refuse(COMPLETIONS, {"prompt": "x"})[0] == 503


def test_the_command_says_why_and_exits_with_a_status_of_its_own(monkeypatch):
    monkeypatch.setattr(serve, "load_text_model", lambda *_, **__: FakeModel())
    lost = server_module.WorkerError("the thread has ended")
    monkeypatch.setattr(server_module, "serve", raising(lost))
    result = CliRunner().invoke(app, ["serve", "--port", "0"])
    assert (result.exit_code, result.stderr) == (1, "error: the thread has ended\n")
