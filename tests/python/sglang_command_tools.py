"""Command lines that `cpumoe sglang` makes, for the tests of that command."""

import shlex
import sys

from cli_tools import run

from cpumoe.cli.sglang_machine import Gpu, Machine

GIB = 1 << 30
LARGE = Machine(96, (0, 1), 256 * GIB, (Gpu("a GPU", 32 * GIB),), {0: 48, 1: 48})
MODEL = "DeepSeek-V4-Flash"


def dry_run(*arguments):
    """Returns the server's arguments, its variables, and what standard error says."""
    result = run("sglang", *arguments, "--dry-run")
    assert result.exit_code == 0, result.output
    words = shlex.split(result.stdout.replace("\\\n", ""))
    start = words.index("sglang.launch_server")
    assert words[start - 2 : start] == [sys.executable, "-m"]
    variables = dict(word.split("=", 1) for word in words[: start - 2])
    return words[start + 1 :], variables, result.stderr


def options(*arguments):
    """Option -> values, of the printed command."""
    found = {}
    for word in dry_run(*arguments)[0]:
        if word.startswith("--"):
            assert word not in found
            values = found[word] = []
        else:
            values.append(word)
    return {name: " ".join(values) for name, values in found.items()}


def problems(*arguments):
    """What a run says instead of starting a server; a dry run warns of it."""
    result = run("sglang", *arguments)
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    found = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    said = dry_run(*arguments)[2]
    assert all(line.replace("error: ", "warning: ") in said for line in found)
    return "\n".join(found)
