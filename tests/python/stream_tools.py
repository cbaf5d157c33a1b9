"""Commands in processes whose standard streams are closed, full, or of another encoding.

Importing PyTorch and transformers takes seconds, a command milliseconds. So a server that has
imported both forks a process for each command, which then makes its streams what Python's start
makes of its descriptors.
"""

import io
import multiprocessing
import os
import sys
import traceback

from cli_tools import make_quick

CLOSED = None
FULL = "/dev/full"
GONE = "| head -0"

_MODULES = (
    *("torch", "transformers", "cpumoe.integrations.transformers", "cpumoe.measure.validation"),
    *("cpumoe.text.serving.app", "fake_model", "stream_tools"),
)
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(list(_MODULES))


def start(arguments, *, stdin=os.devnull, stdout, stderr, encoding="utf-8", fake=False):
    """Starts ``cpumoe`` with some arguments; returns the process.

    Args:
        arguments: arguments of the command line.
        stdin: a path, or `CLOSED`.
        stdout: likewise, or `GONE`: a pipe that nobody reads.
        stderr: as `stdout`.
        encoding: encoding of all three streams.
        fake: answer with a `FakeModel`.
    """
    process = _context.Process(
        target=_run, args=(arguments, (stdin, stdout, stderr), encoding, fake)
    )
    process.start()
    return process


def finish(process, seconds=60):
    """Waits for a process; returns its exit code."""
    process.join(seconds)
    if process.is_alive():
        process.kill()
        raise AssertionError("the command does not end")
    return process.exitcode


def _run(arguments, paths, encoding, fake):
    from fake_model import use_fake_model

    from cpumoe import cli

    for descriptor, path in enumerate(paths):
        _open(descriptor, path)
    sys.stdin, sys.stdout, sys.stderr = (
        None if path is CLOSED else _text(descriptor, encoding)
        for descriptor, path in enumerate(paths)
    )
    make_quick(setattr)
    if fake:
        use_fake_model()
    sys.argv = ["cpumoe", *map(str, arguments)]
    os._exit(_end(cli.main))


def _open(descriptor, path):
    os.close(descriptor)
    if path == GONE:
        reading, writing = os.pipe()
        os.dup2(writing, descriptor)
        for end in {reading, writing} - {descriptor}:
            os.close(end)
    elif path is not CLOSED:
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC if descriptor else os.O_RDONLY
        opened = os.open(path, flags, 0o600)
        if opened != descriptor:
            os.dup2(opened, descriptor)
            os.close(opened)


def _text(descriptor, encoding):
    raw = io.FileIO(descriptor, "w" if descriptor else "r", closefd=False)
    buffered = io.BufferedWriter(raw) if descriptor else io.BufferedReader(raw)
    return io.TextIOWrapper(buffered, encoding)


def _end(command):
    """The exit code of a program that runs a command and then ends, as Python ends one."""
    try:
        command()
        code = 0
    except SystemExit as error:
        code = error.code or 0
    except BaseException:
        traceback.print_exc()
        code = 1
    for stream in (sys.stdout, sys.stderr):
        try:
            if stream is not None:
                stream.flush()
        except OSError:
            code = 120
    return code
