"""How cpumoe's plugin for vLLM starts: which vLLM it takes, its settings, and a worker's CPUs."""

import importlib
import os
import re
import sys
from pathlib import Path

import pytest
import vllm_tools
from moe_tools import output_with_torch, refused

from cpumoe._base import openmp
from cpumoe.integrations import vllm as plugin
from cpumoe.integrations.vllm import settings

ROOT = Path(__file__).parents[2]
CONFIGS = "cpumoe.integrations.vllm.configs"


@pytest.mark.parametrize(
    ("given", "kind", "message"),
    [
        (3, TypeError, "additional config: cpumoe: expected an object with options, got 3"),
        (
            {"threads": 3},
            ValueError,
            "additional config: cpumoe: expected options of enabled, isa, precision, "
            "batch_invariant, few_token_limit, got 'threads'",
        ),
        (
            {"enabled": "no"},
            TypeError,
            "additional config: cpumoe: enabled: expected a bool, got 'no'",
        ),
    ],
)
def test_wrong_settings(given, kind, message):
    with refused(kind, message):
        settings.Settings(given)


@pytest.mark.parametrize(
    ("variable", "value", "cpus"),
    [
        ("GOMP_CPU_AFFINITY", "3 1 2", [1, 2, 3]),
        ("KMP_AFFINITY", "granularity=fine,explicit,proclist=[4,5]", [4, 5]),
        ("OMP_PLACES", "{0,7}", [0, 7]),
        ("OMP_PLACES", "cores", None),
        ("OMP_NUM_THREADS", "4", None),
    ],
)
def test_cpus_of_a_worker(variable, value, cpus):
    assert settings.bound_cpus({variable: value}) == cpus


def test_threads_are_on_the_cpus_of_the_worker():
    script = """
import os
os.environ["OMP_PLACES"] = "{" + str(min(os.sched_getaffinity(0))) + "}"
from cpumoe.integrations.vllm.settings import worker_runtime
runtime = worker_runtime()
assert runtime is worker_runtime()
print(list(runtime.cpus) == [min(os.sched_getaffinity(0))], runtime.threads)
"""
    assert output_with_torch(script) == "True 1"


@pytest.mark.parametrize(
    ("version", "is_cpu", "switch", "reason"),
    [
        ("0.31.1", True, "", "it knows vLLM 0.32 and 0.33, and this is 0.31.1"),
        ("0.320.0", True, "", "it knows vLLM 0.32 and 0.33, and this is 0.320.0"),
        ("0.32.0", False, "", "this vLLM is not built for CPUs"),
        ("0.32.0", True, "0", "CPUMOE_VLLM=0"),
        ("0.33.1+cpu", True, "1", None),
    ],
)
def test_vllm_stays_as_it_is(monkeypatch, version, is_cpu, switch, reason):
    vllm_tools.install(monkeypatch, version=version, is_cpu=is_cpu)
    assert plugin.why_not(switch) == reason


def test_registration_never_stops_vllm(monkeypatch):
    host = vllm_tools.install(monkeypatch)
    monkeypatch.delitem(sys.modules, CONFIGS, raising=False)
    monkeypatch.delattr(sys.modules["vllm.config"], "get_current_vllm_config")
    monkeypatch.setenv(plugin.SWITCH, "1")
    plugin.register()
    (line,) = host.log.lines
    assert line.startswith("cpumoe computes nothing here: this vLLM has other classes")
    with refused(ValueError, "CPUMOE_VLLM: expected 0 or 1, got 'yes'"):
        plugin.why_not("yes")


@pytest.mark.parametrize("switch", ["0", "1"])
def test_workers_threads_spin_briefly(monkeypatch, switch):
    vllm_tools.install(monkeypatch)
    monkeypatch.setattr(openmp, "_set_by_cpumoe", set())
    for name in openmp.WAITING_VARIABLES:
        monkeypatch.setenv(name, "")  # so that the variable is restored
        monkeypatch.delenv(name)
    monkeypatch.setenv(plugin.SWITCH, switch)
    plugin.register()
    assert os.environ.get("GOMP_SPINCOUNT") == {"0": None, "1": "10000"}[switch]


def test_metadata_names_the_plugin():
    text = (ROOT / "pyproject.toml").read_text("utf-8")
    row = re.search(r'"vllm\.general_plugins"\]\ncpumoe = "([\w.]+):(\w+)"', text)
    module = importlib.import_module(row[1])
    assert getattr(module, row[2]) is plugin.register


def test_nothing_of_transformers_is_imported():
    script = """
import sys
import cpumoe.integrations.vllm.loading, cpumoe.integrations.vllm.settings
print([name for name in sys.modules if "transformers" in name.split(".")])
"""
    assert output_with_torch(script) == "[]"
