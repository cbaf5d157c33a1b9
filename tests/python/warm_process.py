"""Runs scripts in processes that have imported PyTorch already.

Importing PyTorch takes seconds of CPU time. One process for all tests of a pytest process imports
it once, and each script runs in a fork of that process. PyTorch has no threads there, and cpumoe is
not imported. A script needs an interpreter of its own nevertheless if it tests how PyTorch is
imported or how the interpreter exits.
"""

import functools
import os
import subprocess
import tempfile
from pathlib import Path

import command_client
from page_runner import CommandServer


@functools.cache
def _server():
    """The process to fork from. It ends with this process."""
    # As in commands of several ranks, which set this before they import PyTorch.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "FATAL")
    folder = tempfile.TemporaryDirectory(prefix="cpumoe-warm-")
    return CommandServer(Path(folder.name), "torch").__enter__(), folder


def run(script, *arguments, env=None, timeout=120):
    """Runs a script as ``python -c`` does; returns a `subprocess.CompletedProcess`.

    Raises:
        TimeoutError: the script did not end in time.
    """
    server, _ = _server()
    with tempfile.TemporaryFile("w+") as output, tempfile.TemporaryFile("w+") as errors:
        with open(os.devnull) as nothing:
            connection, answers, _ = command_client.request(
                server.socket,
                None,
                list(arguments),
                (nothing.fileno(), output.fileno(), errors.fileno()),
                environment=dict(os.environ if env is None else env),
                script=script,
            )
        with connection, answers:
            connection.settimeout(timeout)
            code = command_client.code_of(answers)
        for file in (output, errors):
            file.seek(0)
        return subprocess.CompletedProcess(arguments, code, output.read(), errors.read())
