"""Standard streams of daemons, pipes and old terminals: commands work, or say why not."""

import json
import os
import signal
import subprocess
import sys
import urllib.request

import pytest
from checkpoint_tools import write_small
from cli_tools import TINY_DEMO
from ports import unused_port
from serving_tools import wait_for
from stream_tools import CLOSED, FULL, GONE, finish, start

SIZES = ("--layers", 1, "--experts", 2, "--hidden", 64, "--intermediate", 32)
COMMANDS = {
    "info": (),
    "inspect": ("v4-flash",),
    "synth": ("OUT", "--model", "gpt-oss-20b", *SIZES),
    "validate": ("MODEL", "--isa", "generic", "--tokens", 1),
    "bench": ("--model", "MODEL", "--tokens", 1, "--seconds", 0, "--rounds", 1),
    "generate": ("-p", "café …", "--max-tokens", 2),
    "bench-model": ("--contexts", 4, "--new-tokens", 1, "--rounds", 1),
    "eval": ("--text", "TEXT"),
    "chat": ("--max-tokens", 2),
    "demo": TINY_DEMO,
}
FAILED = 2
READER_GONE = 1
every_command = pytest.mark.parametrize("command", COMMANDS)
# The demo runs several commands, and takes as long as all of them.
most_commands = pytest.mark.parametrize("command", [name for name in COMMANDS if name != "demo"])


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_small(tmp_path_factory.mktemp("streams") / "model", "v4-flash")


@pytest.fixture
def run(model, tmp_path):
    """Runs a command; returns its exit code and what it wrote to standard output and error."""

    def run(command, *more, **streams):
        question = tmp_path / "question"
        question.write_bytes("café?\n".encode())
        places = {"MODEL": model, "OUT": tmp_path / "synth", "TEXT": question}
        arguments = [places.get(argument, argument) for argument in COMMANDS[command]]
        files = {"stdout": tmp_path / "out", "stderr": tmp_path / "err"}
        streams = {"stdin": question, **files, **streams}
        process = start([command, *arguments, *more], **streams)
        code = finish(process)
        return code, *(file.read_bytes() if file.exists() else b"" for file in files.values())

    return run


@most_commands
def test_a_closed_input_and_closed_messages_change_nothing(command, run):
    code, out, err = run(command, stdin=CLOSED, stderr=CLOSED)
    assert (code, err) == (0, b"")
    # Without an input there is no question.
    assert bool(out) == (command != "chat")


@every_command
@pytest.mark.parametrize(
    ("stdout", "why"), [(CLOSED, " is closed"), (FULL, ": No space left on device")]
)
def test_a_result_that_has_no_place_is_one_line(command, stdout, why, run):
    code, _, err = run(command, stdout=stdout)
    assert code == FAILED
    *_, last = err.decode().splitlines()
    assert last.startswith(f"error: standard output{why}"), err
    assert b"Traceback" not in err


@every_command
def test_a_reader_that_has_gone_ends_a_command_without_a_word(command, run):
    code, _, err = run(command, stdout=GONE)
    assert code == READER_GONE
    assert b"rror" not in err


@every_command
def test_no_streams_at_all_are_no_accident(command, run):
    expected = 0 if command == "chat" else FAILED
    assert run(command, stdin=CLOSED, stdout=CLOSED, stderr=CLOSED)[0] == expected


@pytest.mark.parametrize("command", ["inspect", "generate", "chat"])
@pytest.mark.parametrize("stderr", [FULL, GONE])
def test_messages_that_nobody_takes_are_dropped(command, stderr, run):
    code, out, _ = run(command, stderr=stderr)
    assert code == 0
    assert out


@most_commands
def test_an_ascii_terminal_gets_all_there_is(command, run):
    code, out, err = run(command, encoding="ascii")
    assert code == 0, err
    assert out.isascii()
    assert err.isascii()
    if command == "generate":
        assert out.startswith(rb"caf\xe9 \u2026")


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_json_stays_json(encoding, run):
    code, out, _ = run("generate", "--json", encoding=encoding)
    assert code == 0
    assert json.loads(out)["prompt"] == "café …"


def test_a_question_is_read_as_utf8_by_an_ascii_terminal(run, tmp_path):
    saved = tmp_path / "saved"
    question = tmp_path / "questions"
    question.write_bytes(f"café …\n/save {saved}\n".encode())
    assert run("chat", stdin=question, encoding="ascii", fake=True)[0] == 0
    assert json.loads(saved.read_text("utf-8"))[0]["content"] == "café …"


@pytest.mark.parametrize("arguments", [["--version"], ["generate", "--help"]])
def test_help_is_a_result(arguments, tmp_path):
    for stdout, code in ((CLOSED, FAILED), (FULL, FAILED), (GONE, READER_GONE)):
        assert finish(start(arguments, stdout=stdout, stderr=tmp_path / "err")) == code
        assert b"Traceback" not in (tmp_path / "err").read_bytes()
    out = tmp_path / "out"
    assert finish(start(arguments, stdout=out, stderr=CLOSED, encoding="ascii")) == 0
    assert out.read_bytes().isascii()


@pytest.mark.parametrize("stderr", [CLOSED, FULL, GONE])
def test_bad_input_keeps_its_exit_code_where_nobody_hears_of_it(stderr, tmp_path):
    for arguments in (["inspect", "nonsense"], ["nonsense"]):
        assert finish(start(arguments, stdout=tmp_path / "out", stderr=stderr)) == FAILED


@pytest.mark.parametrize("place", [CLOSED, FULL, GONE])
def test_a_server_needs_no_streams(place):
    port = unused_port()
    process = start(["serve", "--port", port], stdin=CLOSED, stdout=place, stderr=place, fake=True)
    wait_for(lambda: process.exitcode is not None or _answers(port), 20)
    assert _answers(port)
    os.kill(process.pid, signal.SIGTERM)
    assert finish(process) == 0


def _answers(port):
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5) as reply:
            return reply.status == 200
    except OSError:
        return False


def started(redirection, *arguments, **environment):
    """A command in its own process, which the tests above imitate by forking."""
    return subprocess.run(
        ["sh", "-c", f'exec "$@" {redirection}', "sh", sys.executable, "-m", "cpumoe", *arguments],
        capture_output=True,
        env={**os.environ, **environment},
        check=False,
    )


def test_a_process_may_start_without_streams():
    ended = started("<&- 2>&-", "--version")
    assert (ended.returncode, ended.stdout[:7]) == (0, b"cpumoe ")
    ended = started(">&-", "--version")
    assert ended.returncode == FAILED
    assert ended.stderr.startswith(b"error: standard output is closed")
    assert started("<&- >&- 2>&-", "--version").returncode == FAILED


@pytest.mark.parametrize(
    "environment",
    [
        {"PYTHONIOENCODING": "ascii"},
        {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
    ],
)
def test_a_process_with_an_ascii_terminal_writes_escapes(environment):
    ended = started("", "generate", "--help", **environment)
    assert (ended.returncode, ended.stderr) == (0, b"")
    assert rb"norms, \u2026" in ended.stdout
