"""Runs commands in this process."""

import json

import pytest
from typer.testing import CliRunner

import cpumoe
from cpumoe import _core
from cpumoe.cli import app, demo
from cpumoe.measure import limits

TINY_DEMO = ("--experts", "2", "--hidden", "64", "--intermediate", "32")


def make_quick(replace):
    """Makes commands measure for a very short time; `replace` is ``setattr`` or a monkeypatch's."""
    measure = limits.measure_read_bandwidth
    replace(limits, "_default_buffer_bytes", lambda: 1 << 20)
    replace(limits, "measure_read_bandwidth", lambda runtime: measure(runtime, seconds=0))
    replace(demo, "_TIMED_SECONDS", 0)


def run(*arguments):
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def succeed(*arguments):
    result = run(*arguments)
    assert result.exit_code == 0, result.output
    assert result.stderr == ""
    return result.stdout


def read(*arguments):
    return json.loads(succeed(*arguments, "--json"))


def refuse(*arguments):
    """Returns the one line with which a command refuses bad input."""
    result = run(*arguments)
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    return result.stderr


def unsupported_isa():
    built = [row.name for row in _core.known_isas() if row.built]
    missing = [isa for isa in built if cpumoe.missing_features(isa)]
    if not missing:
        pytest.skip("this CPU supports every installed variant")
    return missing[0]
