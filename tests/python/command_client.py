"""Has `command_server.py` run a command with this process' streams, folder and environment.

    python command_client.py MODULE ARGUMENTS

It ends with the command's exit code. The command `serve` is the exception: it stays behind when the
client ends, which is when it is ready. The variables say where the server's socket is, which port
stands for the pages' 8000, and in which folder the running command has its log and process id.
"""

import json
import os
import signal
import socket
import sys
import time
from pathlib import Path

SOCKET, PORT, STATE = "DOCS_SOCKET", "DOCS_PORT", "DOCS_STATE"
_READY = ("serving ", "Uvicorn running on ")
_POLL_SECONDS = 0.02


def request(
    path, module, arguments, descriptors=(0, 1, 2), *, folder=None, environment=None, script=None
):
    """Sends a request; returns the connection, its answers to come, and the process id."""
    connection = socket.socket(socket.AF_UNIX)
    connection.connect(path)
    document = {
        "module": module,
        "script": script,
        "arguments": arguments,
        "folder": str(folder or os.getcwd()),
        "environment": environment or dict(os.environ),
    }
    data = json.dumps(document).encode() + b"\n"
    sent = socket.send_fds(connection, [data], descriptors)
    connection.sendall(data[sent:])
    answers = connection.makefile("r", encoding="utf-8")
    return connection, answers, json.loads(answers.readline())["process"]


def code_of(answers):
    """Waits for a command's end; returns its exit code."""
    line = answers.readline()
    return json.loads(line)["code"] if line else 128


def stop_server(state):
    """Ends the server that stayed behind, if any."""
    file = Path(state) / "process"
    if not file.exists():
        return
    process = int(file.read_text())
    file.unlink()
    deadline = time.monotonic() + 10
    kind = signal.SIGTERM
    try:
        while True:
            os.kill(process, kind)
            kind = 0 if time.monotonic() < deadline else signal.SIGKILL
            time.sleep(_POLL_SECONDS)
    except ProcessLookupError:
        pass


def start_server(module, arguments):
    """Starts a server in the place of an earlier one, and waits until it is ready."""
    state = Path(os.environ[STATE])
    stop_server(state)
    if "--port" not in arguments:
        arguments = [*arguments, "--port", os.environ[PORT]]
    log = state / "log"
    with open(log, "w") as output, open(os.devnull) as nothing:
        descriptors = (nothing.fileno(), output.fileno(), output.fileno())
        connection, _, process = request(os.environ[SOCKET], module, arguments, descriptors)
    (state / "process").write_text(str(process))
    connection.settimeout(_POLL_SECONDS)
    while not any(sign in log.read_text() for sign in _READY):
        try:
            ended = connection.recv(100)
        except TimeoutError:
            continue
        sys.exit(f"the server ended: {ended.decode()}\n{log.read_text()}")


if __name__ == "__main__":
    if sys.argv[2:3] == ["serve"]:
        start_server(sys.argv[1], sys.argv[2:])
    else:
        sys.exit(code_of(request(os.environ[SOCKET], sys.argv[1], sys.argv[2:])[1]))
