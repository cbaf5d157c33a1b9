"""Each asv suite runs once, at toy sizes. Its measurements are not checked."""

import importlib
import inspect
import itertools
import pkgutil
from pathlib import Path

import pytest

import cpumoe

FOLDER = Path(__file__).parents[2] / "asv_benchmarks"
MODULES = [module.name for module in pkgutil.iter_modules([str(FOLDER / "benchmarks")])]
HELPERS = {"common", "peak_memory"}
# Each combination of these suites starts an interpreter, or computes at true sizes, so one is
# enough.
SLOW = {"attention", "import_time"}
TOY = {"experts": 2, "hidden": 64, "intermediate": 32}


def suites(module):
    """The module's own classes that have something to measure."""
    for name, suite in inspect.getmembers(module, inspect.isclass):
        if suite.__module__ == module.__name__ and methods(suite):
            yield name, suite


def methods(suite):
    return [name for name in dir(suite) if name.startswith(("time_", "track_", "peakmem_"))]


def parameters(suite):
    """One tuple of arguments per combination; asv also takes a plain list for one parameter."""
    params = getattr(suite, "params", ())
    if params and not isinstance(params[0], (list, tuple)):
        params = (params,)
    return itertools.product(*params)


def run(suite, arguments):
    """Runs all methods for one combination; False: the suite says that it cannot be run here."""
    instance = suite()
    try:
        if hasattr(instance, "setup"):
            instance.setup(*arguments)
    except NotImplementedError:
        return False
    assert "timer" not in vars(instance), "asv would take it for the clock to use"
    for name in methods(suite):
        getattr(instance, name)(*arguments)
    if hasattr(instance, "teardown"):
        instance.teardown(*arguments)
    return True


@pytest.mark.parametrize("name", sorted({*MODULES} - HELPERS))
def test_suites_run(name, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    monkeypatch.chdir(tmp_path)
    common = importlib.import_module("benchmarks.common")
    monkeypatch.setattr(common, "SIZES", TOY)
    ran = 0
    for _, suite in suites(importlib.import_module(f"benchmarks.{name}")):
        cached = (suite().setup_cache(),) if hasattr(suite, "setup_cache") else ()
        for arguments in itertools.islice(parameters(suite), 1 if name in SLOW else None):
            ran += run(suite, (*cached, *arguments))
    assert ran > 0


def test_unsupported_variants_are_skipped(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    common = importlib.import_module("benchmarks.common")
    monkeypatch.setattr(cpumoe, "supported_isas", list)
    with pytest.raises(NotImplementedError, match="generic cannot run here"):
        common.require("generic")
