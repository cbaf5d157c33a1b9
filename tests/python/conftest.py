"""Set-up of all tests."""

import ctypes
import gc
import json
import os
from collections import Counter

import pytest

# Test processes outnumber the cores together with PyTorch's threads. An OpenMP thread that waits by
# spinning would keep the thread that it waits for from running. OpenMP reads this while PyTorch is
# imported; tests see the environment as it was.
_SPINNING = os.environ.get("GOMP_SPINCOUNT")
os.environ["GOMP_SPINCOUNT"] = "0"
import torch  # noqa: E402

if _SPINNING is None:
    del os.environ["GOMP_SPINCOUNT"]
else:
    os.environ["GOMP_SPINCOUNT"] = _SPINNING
from checkpoint_tools import write_small  # noqa: E402

from cpumoe import _core  # noqa: E402

# Tests, and the processes that they start, must not depend on a developer's proxies, terminal and
# preferences. The modules that read these variables are imported later.
for _name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
    os.environ.pop(_name, None)
    os.environ.pop(_name.upper(), None)
for _name in ("COLUMNS", "LINES", "TRANSFORMERS_VERBOSITY"):
    os.environ.pop(_name, None)

# The reference runs on small tensors in tests, for which a barrier per operation costs more than
# threads save.
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _one_thread_of_pytorch():
    """Undoes what a command that ran in this process has chosen."""
    yield
    if torch.get_num_threads() != 1:
        torch.set_num_threads(1)


# The features that tests/emulator emulates. Under the emulator, variants run on any CPU that has
# their other features. This must happen before test modules ask for the supported variants.
EMULATED_FEATURES = {"avxvnni", "avx512bf16", "amx-tile", "amx-bf16", "amx-int8"}
UNDER_EMULATOR = os.environ.get("CPUMOE_TEST_EMULATOR") == "1"

if UNDER_EMULATOR:
    _core.assume_features(EMULATED_FEATURES)


@pytest.fixture
def v4(tmp_path):
    return write_small(tmp_path / "v4", "v4-flash")


@pytest.fixture
def kimi(tmp_path):
    return write_small(tmp_path, "kimi-k2")


@pytest.fixture
def gpt_oss(tmp_path):
    return write_small(tmp_path, "gpt-oss-20b")


@pytest.fixture
def quick_commands(monkeypatch):
    """Sets small buffers and no forced variant, whatever the environment says."""
    from cli_tools import make_quick

    make_quick(monkeypatch.setattr)
    monkeypatch.delenv("CPUMOE_ISA", raising=False)
    monkeypatch.delenv("CPUMOE_TRACEBACK", raising=False)
    monkeypatch.setenv("COLUMNS", "120")


@pytest.fixture
def no_downloads(monkeypatch, tmp_path):
    """Hides the models that this machine has downloaded."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))


@pytest.fixture
def use_host(monkeypatch):
    """Sets the SGLang that `cpumoe sglang` finds; a test may set another one, or None."""
    from cpumoe.cli import sglang_host

    def use(name, version=None):
        host = None
        if name is not None:
            host = sglang_host.Host(name, version or sglang_host.TESTED[name])
        monkeypatch.setattr(sglang_host, "installed_host", lambda: host)

    use(sglang_host.UPSTREAM)
    return use


@pytest.fixture
def use_machine(monkeypatch):
    """Sets the machine that `cpumoe sglang` finds; a test may set another one."""
    from sglang_command_tools import LARGE

    from cpumoe.cli import sglang_machine

    def use(machine):
        monkeypatch.setattr(sglang_machine, "this_machine", lambda: machine)

    use(LARGE)
    return use


def pytest_collection_finish():
    """Exempts what is imported from garbage collections, which take a second each otherwise."""
    gc.collect()
    gc.freeze()


def emulated_instructions():
    """Rows of tests/emulator/instructions.h, with counts; the emulator must be preloaded."""
    report = ctypes.CDLL(None).cpumoe_emulator_report
    report.restype = ctypes.c_char_p
    return json.loads(report())


# Counts of pytest-xdist's workers, in the process that prints the summary.
_of_workers = Counter()


def _emulated_counts():
    return Counter({row["name"]: row["count"] for row in emulated_instructions()})


def pytest_sessionfinish(session):
    if UNDER_EMULATOR and hasattr(session.config, "workeroutput"):
        session.config.workeroutput["emulated"] = dict(_emulated_counts())


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node):
    # A worker that crashed has no output.
    _of_workers.update(getattr(node, "workeroutput", {}).get("emulated", {}))


def pytest_terminal_summary(terminalreporter):
    if UNDER_EMULATOR:
        counts = [f"{name} {count}" for name, count in (_emulated_counts() + _of_workers).items()]
        terminalreporter.write_line(f"emulated: {', '.join(counts) or 'nothing'}")
