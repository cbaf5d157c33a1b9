"""``cpumoe serve`` as a process: its command line, what it prints, and how it ends."""

import os
import re
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
from serving_tools import wait_for
from typer.testing import CliRunner

from cpumoe.cli import app, errors, serve
from cpumoe.cli.text_model import LoadingOptions, load_text_model
from cpumoe.text.serving.listening import open_sockets

PROGRAM = Path(__file__).parent / "fake_model.py"
COMPLETIONS = "/v1/completions"
SLOW = {"delay": 0.02, "end": 10**6}


class Process:
    def __init__(self, popen):
        self.popen = popen
        line = popen.stdout.readline()
        assert line.startswith("serving fake at http://"), line + popen.stderr.read()
        self.greeting = line
        self.url = re.search(r"http://\S+", line)[0].removesuffix("/v1")
        self.http = httpx.Client(base_url=self.url, timeout=20)

    def texts(self, state):
        """The number of texts that are ``running`` or ``waiting``."""
        metrics = httpx.get(f"{self.url}/metrics").text
        return float(re.search(rf"num_requests_{state}{{.*}} (\S+)", metrics)[1])

    def end(self, number):
        self.popen.send_signal(number)
        return self.finish()

    def finish(self):
        """Returns exit status, the rest of standard output, and standard error."""
        output, errors = self.popen.communicate(timeout=20)
        return self.popen.returncode, output, errors


@contextmanager
def serving(*options, delay=0.0, end=5, descriptors=None, **environment):
    command = [sys.executable, PROGRAM, str(delay), str(end), "serve", "--port", "0", *options]
    if descriptors is not None:
        command = ["sh", "-c", f'ulimit -n {descriptors}; exec "$@"', "sh", *command]
    popen = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **environment},
    )
    try:
        process = Process(popen)
        with process.http:
            yield process
    finally:
        popen.kill()
        popen.wait()


def complete(process, **fields):
    return process.http.post(COMPLETIONS, json={"prompt": "x", **fields})


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_an_idle_server(number):
    with serving() as process:
        assert process.http.get("/health").status_code == 200
        assert complete(process).json()["choices"][0]["text"] == " 1 2 3 4 5"
        status, output, errors = process.end(number)
    assert (status, errors) == (0, "")
    # Only an access log is printed.
    assert [line.split('"')[1] for line in output.splitlines()] == [
        "GET /health HTTP/1.1",
        "POST /v1/completions HTTP/1.1",
    ]


def test_a_signal_lets_the_running_answer_finish_and_refuses_others():
    with serving("--grace", "inf", "--quiet", **SLOW) as process:
        with (
            ThreadPoolExecutor(1) as pool,
            process.http.stream(
                "POST", COMPLETIONS, json={"prompt": "x", "stream": True, "max_tokens": 60}
            ) as reply,
        ):
            lines = (line for line in reply.iter_lines() if line)
            first = next(lines)
            waiting = pool.submit(complete, process)
            wait_for(lambda: process.texts("waiting") == 1)
            process.popen.send_signal(signal.SIGTERM)
            wait_for(lambda: httpx.get(f"{process.url}/health").status_code == 503)
            assert complete(process).json()["error"]["code"] == "stopping"
            *texts, last, done = [first, *lines]
        assert waiting.result().status_code == 503
        assert (len(texts), done) == (60, "data: [DONE]")
        assert '"length"' in last
        assert process.finish() == (0, "", "")


@pytest.mark.parametrize("stream", [True, False])
def test_a_signal_cancels_what_takes_longer_than_the_grace_period(stream):
    fields = {"stream": stream, "max_tokens": 900}
    with serving("--grace", "0.1", "--quiet", **SLOW) as process, ThreadPoolExecutor(1) as pool:
        asked = pool.submit(complete, process, **fields)
        wait_for(lambda: process.texts("running") == 1)
        assert process.end(signal.SIGTERM) == (0, "", "")
        reply = asked.result()
        assert "the server is stopping" in reply.text
        assert reply.status_code == (200 if stream else 503)


def test_a_prompt_that_cannot_be_interrupted_does_not_keep_the_server():
    # One token takes longer than the test waits.
    with (
        serving("--grace", "0", "--quiet", delay=60) as process,
        ThreadPoolExecutor(1) as pool,
    ):
        asked = pool.submit(complete, process)
        wait_for(lambda: process.texts("running") == 1)
        assert process.end(signal.SIGTERM) == (0, "", "")
        assert asked.result().status_code == 503


def test_a_second_signal_ends_it_at_once():
    with serving("--quiet", **SLOW) as process:
        fields = {"prompt": "x", "stream": True, "max_tokens": 900}
        with process.http.stream("POST", COMPLETIONS, json=fields):
            process.popen.send_signal(signal.SIGINT)
            wait_for(lambda: httpx.get(f"{process.url}/health").status_code == 503)
            process.popen.send_signal(signal.SIGINT)
            assert process.popen.wait(2) == 128 + signal.SIGINT


def test_the_key_comes_from_the_environment_and_stays_out_of_the_log():
    with serving("--host", "0.0.0.0", CPUMOE_API_KEY="s3cret") as process:
        assert complete(process).status_code == 401
        headers = {"Authorization": "Bearer s3cret"}
        assert process.http.get("/v1/models", headers=headers).status_code == 200
        _, output, errors = process.end(signal.SIGTERM)
    assert "401" in output
    assert "s3cret" not in output
    # With a key, there is no warning that others can reach the server.
    assert errors == ""


def test_other_addresses_are_warned_of():
    with serving("--host", "0.0.0.0") as process:
        status, _, errors = process.end(signal.SIGTERM)
    assert status == 0
    assert errors.startswith("warning: 0.0.0.0 can be reached from other computers")


def refuse(*arguments):
    result = CliRunner().invoke(app, ["serve", *arguments])
    assert result.exit_code == 2, result.output
    assert result.stderr.count("\n") == 1
    return result.stderr


@pytest.fixture
def no_model(monkeypatch):
    def load(*_, **__):
        raise AssertionError("loaded a model for nothing")

    monkeypatch.setattr(serve, "load_text_model", load)


@pytest.mark.usefixtures("no_model")
def test_mistakes_are_one_line():
    (listener,) = open_sockets("127.0.0.1", 0)
    with listener:
        port = str(listener.getsockname()[1])
        assert f"127.0.0.1 port {port}: Address already in use" in refuse("--port", port)
    # An address that is reserved for documentation.
    assert "192.0.2.1 port 1: Cannot assign" in refuse("--host", "192.0.2.1", "--port", "1")
    assert "api key: expected" in refuse("--api-key", " ")


@pytest.mark.usefixtures("no_model")
def test_a_missing_package_is_one_line(monkeypatch):
    monkeypatch.setattr(errors.importlib.util, "find_spec", lambda name: None)
    assert 'needs fastapi, which is not installed: pip install "cpumoe[serve]"' in refuse()


def test_options_reach_model_and_server(monkeypatch):
    calls = {}

    def load(*arguments):
        calls["load"] = arguments
        raise OSError("no such folder: somewhere")

    monkeypatch.setattr(serve, "load_text_model", load)
    options = ("--threads", "2", "--precision", "int8", "--isa", "generic", "--dtype", "float32")
    assert refuse("somewhere", "--port", "0", *options) == "error: no such folder: somewhere\n"
    assert calls["load"] == ("somewhere", LoadingOptions(2, "int8", "generic", "float32"))
    with pytest.raises(
        ValueError, match="--dtype: expected one of bfloat16, float32, auto, got 'int4'"
    ):
        load_text_model(None, LoadingOptions(dtype="int4"))
