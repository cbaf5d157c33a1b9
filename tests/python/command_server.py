"""Runs commands, each in a process of its own that has imported everything slow already.

    python command_server.py SOCKET [torch]

The server imports PyTorch, transformers and cpumoe once, or PyTorch alone, and forks for each
request. A request is a line of JSON, with the descriptors of standard input, output and error. The
answers are lines of JSON, too: the process id, and at the end the exit code.

Whatever sizes a command asks for, it computes a small layer and measures for a moment. Answers are
short, and so is the text that comes with cpumoe.
"""

import importlib
import json
import linecache
import os
import runpy
import selectors
import signal
import socket
import sys
import traceback
from dataclasses import replace
from pathlib import Path

LARGEST_REQUEST = 1 << 20
_TOKENS = 16
_TEXT_CHARACTERS = 2000
_SMALL = {"hidden_size": 64, "moe_intermediate_size": 32}
_PRELOADED = (
    "cpumoe.cli",
    "cpumoe.integrations.transformers",
    "cpumoe.text.serving.app",
    "cpumoe.text.serving.server",
    "transformers.models.deepseek_v4.modeling_deepseek_v4",
    "uvicorn",
)


def main():
    if sys.argv[2:] == ["torch"]:
        importlib.import_module("torch")
    else:
        preload()
    # Children are never waited for.
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    with socket.socket(socket.AF_UNIX) as listener, selectors.DefaultSelector() as selector:
        listener.bind(sys.argv[1])
        listener.listen()
        selector.register(listener, selectors.EVENT_READ)
        selector.register(sys.stdin, selectors.EVENT_READ)
        print("ready", flush=True)
        # Standard input ends when the process that started the server does.
        while all(key.fileobj is listener for key, _ in selector.select()):
            connection, _ = listener.accept()
            if os.fork() == 0:
                listener.close()
                answer(connection)
            connection.close()
    # Nothing here has to be taken down, which takes seconds.
    os._exit(0)


def preload():
    from cli_tools import make_quick

    for name in _PRELOADED:
        importlib.import_module(name)
    from cpumoe import embedded, models
    from cpumoe.integrations.transformers import LanguageModel
    from cpumoe.measure import benchmark, tuning

    make_quick(setattr)
    for spec in models.MODELS:
        for name, size in _SMALL.items():
            object.__setattr__(spec, name, size)
    LanguageModel.generate = _brief(LanguageModel.generate)
    text = Path(sys.argv[1]).with_name("held_out.txt")
    text.write_text(embedded.held_out_path().read_text("utf-8")[:_TEXT_CHARACTERS], "utf-8")
    embedded.held_out_path = lambda: text
    benchmark._LIMIT_SECONDS = 0
    benchmark.run = _short(benchmark.run)
    tuning.measure_crossover = _short(tuning.measure_crossover)


def _short(measure):
    def run(*arguments, **options):
        return measure(*arguments, **{**options, "seconds": 0.001, "rounds": 1})

    return run


def _brief(generate):
    def run(self, prompt, sampling, **options):
        asked = sampling.max_new_tokens
        brief = replace(sampling, max_new_tokens=_TOKENS if asked is None else min(asked, _TOKENS))
        return generate(self, prompt, brief, **options)

    return run


def answer(connection):
    """Does in a forked process what a request asks for, and ends the process."""
    code = 1
    try:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        request, descriptors = _receive(connection)
        for number, descriptor in enumerate(descriptors):
            os.dup2(descriptor, number)
            os.close(descriptor)
        os.chdir(request["folder"])
        os.environ.clear()
        os.environ.update(request["environment"])
        connection.sendall(json.dumps({"process": os.getpid()}).encode() + b"\n")
        if request["script"] is not None:
            code = run_script(request)
        elif request["module"] is not None:
            code = run_module(request)
        else:
            code = run_blocks(connection)
    except BaseException:
        traceback.print_exc()
    finally:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        connection.sendall(json.dumps({"code": code}).encode() + b"\n")
        os._exit(code)


def _receive(connection):
    data, descriptors, _, _ = socket.recv_fds(connection, LARGEST_REQUEST, 3)
    while not data.endswith(b"\n"):
        more = connection.recv(LARGEST_REQUEST)
        if not more:
            os._exit(1)  # The client has ended in the middle of its request.
        data += more
    return json.loads(data), descriptors


def run_module(request):
    """Runs ``python -m MODULE ARGUMENTS``; returns the exit code."""
    sys.argv = [request["module"], *request["arguments"]]
    return _code_of(
        lambda: runpy.run_module(request["module"], run_name="__main__", alter_sys=True)
    )


def run_script(request):
    """Runs ``python -c SCRIPT ARGUMENTS``; returns the exit code."""
    sys.argv = ["-c", *request["arguments"]]
    code = compile(request["script"], "<string>", "exec")
    return _code_of(lambda: exec(code, {"__name__": "__main__"}))


def _code_of(program):
    try:
        program()
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
            return 1
        return end.code or 0
    return 0


def run_blocks(connection):
    """Runs a page's Python blocks, which share their names, as they come."""
    names = {"__name__": "__main__"}
    with connection.makefile("r", encoding="utf-8") as blocks:
        for line in blocks:
            block = json.loads(line)
            # Errors then show the page's line.
            linecache.checkcache(block["file"])
            source = "\n" * (block["line"] - 1) + block["text"]
            error = None
            try:
                exec(compile(source, block["file"], "exec"), names)
            except BaseException:
                error = traceback.format_exc()
            sys.stdout.flush()
            connection.sendall(json.dumps({"error": error}).encode() + b"\n")
    return 0


if __name__ == "__main__":
    main()
