"""``cpumoe bench`` with toy sizes and times."""

import dataclasses
import json

import cli_tools

from cpumoe import models
from cpumoe.measure import benchmark, limits, write_back
from cpumoe.measure.timing import Limits

QUICK = ("--seconds", 0, "--rounds", 2)
HIDDEN, INNER = 64, 96


def quicken(monkeypatch):
    """Makes measurements short, and independent of the machine and its environment."""
    monkeypatch.setattr(limits, "_default_buffer_bytes", lambda: 1 << 20)
    monkeypatch.setattr(limits, "_TASKS_PER_THREAD", 4)
    monkeypatch.setattr(benchmark, "_LIMIT_SECONDS", 0)
    monkeypatch.setattr(write_back, "_COPY_SECONDS", 0)
    # The tests do not depend on a quiet machine.
    monkeypatch.setattr(Limits, "steady", True)
    monkeypatch.delenv("CPUMOE_ISA", raising=False)
    monkeypatch.delenv("CPUMOE_TRACEBACK", raising=False)


def use_small_model(monkeypatch):
    """Gives the registry's model sizes for a test, and returns it."""
    spec = models.find_model("v4-flash")
    small = dataclasses.replace(spec, hidden_size=HIDDEN, moe_intermediate_size=INNER)
    monkeypatch.setattr(models, "find_model", lambda _name: small)
    return small


def run(*arguments):
    return cli_tools.run("bench", *QUICK, *arguments)


def succeed(*arguments):
    result = run(*arguments)
    assert result.exit_code == 0, result.output
    return result.stdout


def measure(*arguments):
    return json.loads(succeed(*arguments, "--json", "-"))


def refuse(*arguments):
    return cli_tools.refuse("bench", *QUICK, *arguments)
