"""Runs the blocks of Markdown pages, as a reader would who has checked out the repository."""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import command_client
from markdown_pages import ROOT
from ports import unused_port

from cpumoe import embedded

RUN = ("sh", "python")
BLOCK_SECONDS = 600
_HERE = Path(__file__).parent
# What lies in the folder in which blocks run. A page may write over it.
_COPIED = ("constraints.txt", "docs", "examples", "tools")
# What path/to/... stands for: texts, and other files. All other names are checkpoints.
_TEXTS = ("text", "text.txt")
_TEXT_CHARACTERS = 2000
_FILES = {"chat_template.jinja": embedded.model_path() / "chat_template.jinja"}
_PLACEHOLDER = re.compile(r"\bpath/to/([\w.-]*\w)")
_PAGES_PORT = re.compile(r"(?<=:)8000\b|(?<=--port )8000\b|(?<=--port=)8000\b")
# What would change the machine that runs the tests, or needs the network.
_REFUSED = ("pip", "pip3", "hf", "git", "apt", "apt-get", "sudo")
_REFUSAL = "a test runs no such command: mark the block with <!-- not run: why -->"
# The first line of a script has no other use: no block begins in a page's first line.
_ON_ERROR = """trap 'echo "$PAGE:$LINENO: failed: $BASH_COMMAND" >&2' ERR"""


class BlockError(Exception):
    """A block of a page failed."""


class CommandServer:
    """A process of command_server.py, for as long as the context lasts."""

    def __init__(self, folder, *arguments):
        self.socket = str(folder / "socket")
        self._arguments = arguments
        self._log = folder / "server.log"

    def __enter__(self):
        with open(self._log, "w") as log:
            self._process = subprocess.Popen(
                [sys.executable, _HERE / "command_server.py", self.socket, *self._arguments],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env=_environment(),
                text=True,
                start_new_session=True,
            )
        assert self._process.stdout.readline() == "ready\n", self._log.read_text()
        return self

    def __exit__(self, *_):
        try:
            self._process.communicate(timeout=20)
        finally:
            # Commands that a page gave up waiting for may still run.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)


class PageRunner:
    """Runs a page's blocks in a folder of their own; servers end with the context."""

    def __init__(self, page, folder, server):
        self._page = page
        self._folder = folder / "checkout"
        self._state = folder / "state"
        self._scripts = folder / "scripts"
        self._bin = folder / "bin"
        self._port = unused_port()
        self._environment = {
            **_environment(),
            "PATH": f"{self._bin}:{os.environ['PATH']}",
            "HOME": str(folder),
            "PAGE": page.path.name,
            command_client.SOCKET: server.socket,
            command_client.PORT: str(self._port),
            command_client.STATE: str(self._state),
        }
        self._python = None

    def __enter__(self):
        for folder in (self._folder, self._state, self._scripts, self._bin):
            folder.mkdir(parents=True)
        for name in _COPIED:
            source = ROOT / name
            copy = shutil.copytree if source.is_dir() else shutil.copy
            copy(source, self._folder / name)
        self._write_commands()
        self._log = open(self._state / "python.log", "w+")
        return self

    def __exit__(self, *_):
        command_client.stop_server(self._state)
        if self._python is not None:
            self._python.close()
        self._log.close()

    def run(self):
        """Runs the page's blocks in their order.

        Raises:
            BlockError: one failed; the message has the page's line, and what the block printed.
        """
        for block in self._page.blocks:
            if block.reason is None and block.language in RUN:
                text = _PAGES_PORT.sub(str(self._port), block.text)
                self._provide(text)
                run = self._run_shell if block.language == "sh" else self._run_python
                run(block.line, text)

    def _provide(self, text):
        """Puts a file, or the small model, where a block says path/to/..."""
        for name in _PLACEHOLDER.findall(text):
            path = self._folder / "path" / "to" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            if name in _TEXTS:
                path.write_text(embedded.held_out_path().read_text("utf-8")[:_TEXT_CHARACTERS])
            elif not path.exists():
                path.symlink_to(_FILES.get(name, embedded.model_path()))

    def _run_shell(self, line, text):
        script = self._scripts / f"{line}.sh"
        script.write_text(f"{_ON_ERROR}\n" + "\n" * (line - 2) + text, "utf-8")
        with open(self._state / "output", "w+") as output:
            with subprocess.Popen(
                ["bash", "-Eeuo", "pipefail", script],
                cwd=self._folder,
                env=self._environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
            ) as shell:
                try:
                    code = shell.wait(BLOCK_SECONDS)
                except subprocess.TimeoutExpired:
                    shell.kill()
                    code = f"none after {BLOCK_SECONDS} s"
            output.seek(0)
            if code:
                raise BlockError(f"{output.read()}\n{self._page.path}:{line}: exit code {code}")

    def _run_python(self, line, text):
        if self._python is None:
            self._start_python()
        block = {"file": str(self._page.path), "line": line, "text": text}
        self._python.sendall(json.dumps(block).encode() + b"\n")
        try:
            answer = self._answers.readline()
        except TimeoutError:
            error = f"no end after {BLOCK_SECONDS} s"
        else:
            error = json.loads(answer)["error"] if answer else "the process ended"
        if error:
            self._log.seek(0)
            raise BlockError(f"{self._log.read()}\n{error}\n{self._page.path}:{line}")

    def _start_python(self):
        descriptors = (self._log.fileno(),) * 3
        self._python, self._answers, _ = command_client.request(
            self._environment[command_client.SOCKET],
            None,
            [],
            descriptors,
            folder=self._folder,
            environment=self._environment,
        )
        self._python.settimeout(BLOCK_SECONDS)

    def _write_commands(self):
        """Puts commands first on the path, so that the server runs what imports much."""
        client = f'exec "{sys.executable}" -IS "{_HERE / "command_client.py"}"'
        refuse = f'echo "{_REFUSAL}" >&2; exit 1'
        python = f"""
            case "$*" in
                "-m pip "*) {refuse} ;;
                "-m cpumoe.integrations.transformers "*)
                    shift 2; {client} cpumoe.integrations.transformers "$@" ;;
                *) exec "{sys.executable}" "$@" ;;
            esac"""
        commands = {"cpumoe": f'{client} cpumoe "$@"', "python": python}
        for name, text in {**commands, **dict.fromkeys(_REFUSED, refuse)}.items():
            file = self._bin / name
            file.write_text(f"#!/usr/bin/env bash\n{text}\n", "utf-8")
            file.chmod(0o755)


def _environment():
    """This process' variables, without those that change what a command does."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("CPUMOE_")}
    # One thread for small tensors, and nothing from the network.
    return {**kept, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "COLUMNS": "120"}
