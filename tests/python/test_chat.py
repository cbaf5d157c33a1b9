"""Conversations: the commands, the back ends, and the command line."""

import fcntl
import io
import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest
from fake_model import FakeModel
from rich.console import Console
from serving_tools import Server
from typer.testing import CliRunner

from cpumoe.cli import app, chat, console, errors
from cpumoe.cli.chat_backends import Answer, ChatError, LocalBackend
from cpumoe.cli.chat_server import ServerBackend
from cpumoe.cli.chat_session import Session
from cpumoe.text.generation import Piece, Sampling, ToolCall

PROGRAM = Path(__file__).parent / "fake_model.py"
FIVE = " 1 2 3 4 5"


class Echo:
    """A back end that answers with the question, or fails on request."""

    name = "echo"
    place = "http://echo"

    def __init__(self):
        self.asked = []
        self.samplings = []
        self.next = []

    def answer(self, messages, sampling, on_piece):
        self.asked.append([(m["role"][0], m["content"]) for m in messages])
        self.samplings.append(sampling)
        answer = self.next.pop(0) if self.next else Answer(f"<{messages[-1]['content']}>", "stop")
        if isinstance(answer, Exception):
            raise answer
        on_piece(Piece(answer.text, answer.reasoning))
        return answer


class Paper:
    """A screen that remembers what a session shows."""

    def __init__(self):
        self.said = []

    def piece(self, piece):
        self.said.append(piece.text)

    def end_answer(self, answer):
        pass

    def note(self, message):
        self.said.append(f"note: {message}")

    def error(self, message):
        self.said.append(f"error: {message}")


@pytest.fixture
def session():
    return Session(Echo(), Paper(), Sampling(), "be kind")


def enter(session, *lines):
    """Enters lines; returns what is shown for the last one."""
    for line in lines:
        session._screen.said.clear()
        assert session.enter(line)
    return "\n".join(session._screen.said)


def asked(session):
    return session._backend.asked[-1]


def test_a_conversation_goes_on(session):
    assert enter(session, "a", "  b \n") == "<b>"
    assert asked(session) == [("s", "be kind"), ("u", "a"), ("a", "<a>"), ("u", "b")]
    assert enter(session, "", "   ") == ""
    assert len(session._backend.asked) == 2


def test_undo_and_retry(session):
    assert enter(session, "a", "b", "/undo") == "note: removed: b"
    enter(session, "c")
    assert asked(session) == [("s", "be kind"), ("u", "a"), ("a", "<a>"), ("u", "c")]
    assert enter(session, "/retry") == "<c>"
    assert asked(session) == [("s", "be kind"), ("u", "a"), ("a", "<a>"), ("u", "c")]
    assert enter(session, "/undo", "/undo", "/undo") == "error: nothing has been answered yet"
    assert enter(session, "/retry") == "error: nothing has been answered yet"


def test_system_and_clear(session):
    enter(session, "a", "/system be brief", "b")
    assert asked(session)[0] == ("s", "be brief")
    enter(session, "/clear", "c")
    assert asked(session) == [("s", "be brief"), ("u", "c")]
    enter(session, "/system", "/clear", "d")
    assert asked(session) == [("u", "d")]


def test_a_failure_keeps_the_conversation(session):
    enter(session, "a")
    session._backend.next = [ChatError("no line")]
    assert enter(session, "b") == "error: no line"
    assert session.failures == 1
    assert enter(session, "/retry") == "<b>"
    assert asked(session) == [("s", "be kind"), ("u", "a"), ("a", "<a>"), ("u", "b")]
    session._backend.next = [ChatError("no line")]
    enter(session, "c", "d")
    assert asked(session)[-2:] == [("a", "<b>"), ("u", "d")]


def test_a_stopped_answer_is_kept(session):
    session._backend.next = [Answer("half", "cancelled"), Answer("", "cancelled")]
    enter(session, "a", "b", "c")
    assert asked(session) == [("s", "be kind"), ("u", "a"), ("a", "half"), ("u", "c")]


def test_an_answer_without_text_is_a_failure_that_names_the_place(session):
    call = Piece(tool_calls=(ToolCall("look", "{}"),))
    for answer, said in (
        (Answer("", "stop", reasoning="hm"), "the model wrote reasoning, but no answer"),
        (Answer("", "length"), "the answer is empty (finish reason length)"),
        (Answer("", "stop", tools=("look",)), "the model called tools, which a chat does not"),
    ):
        session._backend.next = [answer]
        assert f"error: http://echo: {said}" in enter(session, "a")
    assert session.failures == 3
    answer.add(call)
    assert answer.lack.endswith(": look")
    assert enter(session, "/retry") == "<a>"
    assert asked(session) == [("s", "be kind"), ("u", "a")]


def test_reasoning_is_shown_to_people_but_is_no_part_of_the_conversation(session, monkeypatch):
    session._backend.next = [Answer("yes", "stop", reasoning="hm")]
    enter(session, "a", "b")
    assert asked(session) == [("s", "be kind"), ("u", "a"), ("a", "yes"), ("u", "b")]
    out = io.StringIO()
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(console, "_out", Console(force_terminal=True, color_system="standard"))
    for screen in (chat._Plain(), chat._Terminal()):
        for piece in (Piece(reasoning="h\x1bm [b]"), Piece("ye"), Piece("s")):
            screen.piece(piece)
    assert out.getvalue() == "yes" + "\x1b[2mhm [b]\x1b[0m\n\nyes"


def test_save_and_load(session, tmp_path):
    file = tmp_path / "a chat.json"
    assert enter(session, "grüße", f"/save {file}") == "note: saved 3 messages"
    assert "grüße" in file.read_text("utf-8")
    assert enter(session, "/clear", f"/load {file}", "b")
    assert asked(session) == [("s", "be kind"), ("u", "grüße"), ("a", "<grüße>"), ("u", "b")]
    for wrong in ("{", "5", "[5]", '[{"role": "user"}]', '[{"role": "cat", "content": "x"}]'):
        file.write_text(wrong)
        assert "expected a JSON list of messages" in enter(session, f"/load {file}")
    assert "No such file" in enter(session, f"/load {tmp_path / 'none'}")
    assert enter(session, "/save") == "error: expected a file, got nothing"
    enter(session, "c")
    assert len(asked(session)) == 6


def test_settings(session):
    said = enter(session, "/set temperature 0.5")
    assert said == "note: temperature 0.5, top_p default, max_tokens default, seed default"
    enter(session, "/set max_tokens 7", "/set top_p 0.9", "/set seed 3", "a")
    assert session._backend.samplings[-1] == Sampling(7, 0.5, 0.9, (), 3)
    enter(session, "/set temperature default", "/set seed", "a")
    assert session._backend.samplings[-1] == Sampling(7, None, 0.9)
    for wrong in ("top_p 2", "seed x", "max_tokens 0", "max_tokens 1.5", "wings 2"):
        assert enter(session, f"/set {wrong}").startswith("error: ")
    enter(session, "a")
    assert session._backend.samplings[-1] == Sampling(7, None, 0.9)


def test_help_stats_and_leaving(session):
    said = enter(session, "/help")
    for name in ("help", "clear", "system", "undo", "retry", "save", "load", "set", "stats"):
        assert f"/{name} " in said
    session._backend.next = [Answer("x", "stop", 11, 0.5, 2.0)]
    assert enter(session, "a", "/stats") == "note: echo: 3 messages; 1 answers, 11 tokens in 2.5 s"
    assert enter(session, "/fly") == "error: no such command: /fly; /help lists them"
    assert not session.enter("/exit")


def test_speed():
    assert Answer("x", "stop", 11, 0.5, 2.0).tokens_per_second == 5
    assert Answer("x", "stop", 1, 0.5, 2.0).tokens_per_second is None
    assert Answer("x", "stop", None, 0.5, 2.0).tokens_per_second is None
    said = chat._describe(Answer("x", "cancelled", 11, 0.5, 2.0))
    assert said == "stopped, 11 tokens, 5.00 tokens/s, first after 500 ms"


def test_the_screen_shows_no_control_sequences(monkeypatch):
    out = io.StringIO()
    monkeypatch.setattr(sys, "stdout", out)
    chat._Terminal().piece(Piece("a\x1b]0;title\x07b\x9b2J\r\n\tc\u200d"))
    assert out.getvalue() == "a]0;titleb2J\n\tc\u200d"


def test_errors_hold_no_control_sequences(capsys, monkeypatch):
    monkeypatch.setattr(console, "_err", Console(stderr=True))
    chat._Terminal().error("a\x1b]0;title\x07b\x9b2J\nc")
    assert capsys.readouterr().err == "error: a]0;titleb2J c\n"


def ask(backend, *contents, **sampling):
    pieces = []
    messages = [
        {"role": ("user", "assistant")[i % 2], "content": c} for i, c in enumerate(contents)
    ]
    answer = backend.answer(messages, Sampling(**sampling), pieces.append)
    assert "".join(piece.text for piece in pieces) == answer.text
    return answer


def test_both_back_ends_give_the_same():
    sampling = {"temperature": 0.5, "top_p": 0.5, "seed": 4, "max_new_tokens": 3, "stop": ("z",)}
    answers, samplings = [], []
    with Server() as server:
        for backend in (LocalBackend(server.model), ServerBackend(server.url, None, None, 20)):
            assert backend.name == "fake"
            answers.append(ask(backend, "a", "b", "c", **sampling))
            samplings.append(server.model.samplings.pop())
            assert server.model.prompts.pop() == "user: a\nassistant: b\nuser: c"
    for answer in answers:
        assert (answer.text, answer.finish_reason, answer.tokens) == (" 1 2 3", "length", 3)
    assert samplings == [Sampling(**sampling)] * 2


def test_what_a_model_here_thinks_is_kept_apart():
    model = FakeModel()
    model.reply = [Piece(reasoning="h"), Piece(reasoning="m"), Piece("yes")]
    answer = ask(LocalBackend(model), "a")
    assert (answer.reasoning, answer.text, answer.lack) == ("hm", "yes", None)
    model.reply = [Piece(reasoning="hm"), Piece(tool_calls=(ToolCall("look", "{}"),))]
    session = Session(LocalBackend(model), Paper(), Sampling(), None)
    said = enter(session, "a")
    assert said.endswith("error: fake: the model called tools, which a chat does not have: look")
    assert (session.messages, session.failures) == ([], 1)


def test_a_local_model_refuses():
    backend = LocalBackend(FakeModel())
    with pytest.raises(ChatError, match="the assistant spoke last"):
        ask(backend, "a", "b")
    assert ask(backend, "a").text == FIVE


def test_a_servers_errors_are_one_line():
    with Server(api_key="right") as server:
        with pytest.raises(ChatError, match=r"/v1: 401: the API key is wrong$"):
            ServerBackend(server.url, "wrong", None, 20)
        backend = ServerBackend(f"{server.url}/v1/", "right", "other", 20)
        with pytest.raises(ChatError, match=r"/v1: 404: the model 'other' does not exist"):
            ask(backend, "a")
        backend = ServerBackend(server.url, "right", None, 20)
        with pytest.raises(ChatError, match=r"400: .* context length is 1000"):
            ask(backend, "a" * 2000)
        server.model.fails_at, server.model.delay = 3, 0.02
        with pytest.raises(ChatError, match="failed to answer"):
            ask(backend, "a")
    with pytest.raises(ChatError, match=r"^http://127.0.0.1:\d+/v1: .*[Cc]onnection refused"):
        ask(backend, "a")


def run(*arguments, **options):
    return CliRunner().invoke(app, ["chat", *arguments], **options)


def test_from_a_pipe(monkeypatch):
    model = FakeModel()
    monkeypatch.setattr(chat, "load_text_model", lambda *_, **__: model)
    result = run("--system", "be kind", "--max-tokens", "2", input="hi\n\n/system\nho")
    assert (result.exit_code, result.stdout, result.stderr) == (0, " 1 2\n 1 2\n", "")
    assert model.prompts == ["system: be kind\nuser: hi", "user: hi\nassistant:  1 2\nuser: ho"]
    result = run(input=f"{'x' * 2000}\nhi\n")
    assert (result.exit_code, result.stdout) == (1, f"{FIVE}\n")
    assert result.stderr.startswith("error: ")


def test_with_a_server():
    with Server(api_key="k") as server:
        result = run(server.url, input="hi\n", env={"OPENAI_API_KEY": "k"})
        assert (result.exit_code, result.stdout) == (0, f"{FIVE}\n")
        result = run(server.url, "--api-key", "x", input="hi\n")
        assert (result.exit_code, result.stdout) == (2, "")
        assert result.stderr == f"error: {server.url}/v1: 401: the API key is wrong\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--top-p", "3"], "top_p: expected above 0"),
        (
            ["http://x", "--precision", "int8"],
            "--precision applies only to a model in this process",
        ),
        (
            ["http://x", "--chat-template", "t"],
            "--chat-template applies only to a model in this process",
        ),
        (["--model-name", "x"], "--model-name applies only to a server"),
        (["--timeout", "3"], "--timeout applies only to a server"),
        (["--api-key", "k"], "--api-key applies only to a server"),
    ],
)
def test_bad_options_are_one_line(arguments, message):
    result = run(*arguments)
    assert (result.exit_code, result.stderr.count("\n")) == (2, 1)
    assert message in result.stderr


def test_a_key_in_the_environment_does_not_keep_a_model_from_chatting(monkeypatch):
    monkeypatch.setattr(chat, "load_text_model", lambda *_: FakeModel())
    result = run(input="hi\n", env={"OPENAI_API_KEY": "k"})
    assert (result.exit_code, result.stdout) == (0, f"{FIVE}\n")


def test_a_missing_package_is_one_line(monkeypatch):
    monkeypatch.setattr(errors.importlib.util, "find_spec", lambda name: None)
    result = run("http://x")
    assert 'needs httpx2, which is not installed: pip install "cpumoe[chat]"' in result.stderr


class Screen:
    """A process on a terminal of its own."""

    def __init__(self, *command):
        self._master, slave = pty.openpty()
        environment = {**os.environ, "TERM": "dumb", "NO_COLOR": "1", "COLUMNS": "100"}
        self.process = subprocess.Popen(
            command,
            stdin=slave,
            stdout=slave,
            stderr=slave,
            env=environment,
            start_new_session=True,
            preexec_fn=self._own_terminal,
        )
        os.close(slave)
        self.shown = ""

    @staticmethod
    def _own_terminal():
        """Makes the terminal the process's own, so that Ctrl-C reaches it, and is heard there.

        A shell that runs the tests in the background has them ignore it.
        """
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    def type(self, text):
        self.shown = ""
        os.write(self._master, text.encode())

    def interrupt_line(self):
        """Ctrl-C at the prompt; Python's line editor may miss one that comes between two keys."""
        for _ in range(10):
            self.type("\x03")
            if self.shows("> ", seconds=2):
                return
        raise AssertionError(self.shown)

    def wait(self, *texts):
        """Waits until the texts are shown, in this order."""
        assert self.shows(*texts, seconds=20), self.shown

    def shows(self, *texts, seconds):
        end = time.monotonic() + seconds
        pattern = re.compile(".*".join(map(re.escape, texts)), re.DOTALL)
        while not pattern.search(self.shown):
            if time.monotonic() > end:
                return False
            if select.select([self._master], [], [], 0.1)[0]:
                self.shown += os.read(self._master, 4096).decode()
        return True


def terminal(*arguments):
    return Screen(sys.executable, PROGRAM, "0.02", "1000", "chat", *arguments)


def test_on_a_terminal():
    with Server(FakeModel(delay=0.02, end=1000)) as server:
        for screen in (terminal(), terminal(server.url)):
            screen.wait("> ")
            screen.type("hello\n")
            screen.wait(" 3")
            screen.type("\x03")
            screen.wait("stopped", "> ")
            screen.type("/stats\n")
            screen.wait("2 messages; 1 answers", "> ")
            screen.type("half a line")
            screen.wait("half a line")
            screen.interrupt_line()
            screen.type("/save /nowhere/x\n")
            screen.wait("error: ", "> ")
            screen.type("\x04")
            assert screen.process.wait(10) == 0


def test_saved_file_is_openais_format(session, tmp_path):
    enter(session, "a", f"/save {tmp_path / 'chat'}")
    assert json.loads((tmp_path / "chat").read_text())[1] == {"role": "user", "content": "a"}
