"""What `cpumoe sglang` finds out of the machine and of the installed SGLang."""

import dataclasses
import os

import pytest
from node_tools import made_up_nodes

from cpumoe.cli import sglang_host, sglang_machine
from cpumoe.cli.sglang_host import FORK, UPSTREAM
from cpumoe.cli.sglang_machine import Gpu


@pytest.fixture
def nvidia_smi(tmp_path, monkeypatch):
    def install(text, code=0):
        program = tmp_path / "bin" / "nvidia-smi"
        program.parent.mkdir(exist_ok=True)
        program.write_text(f"#!/bin/sh\ncat <<'END'\n{text}\nEND\nexit {code}\n")
        program.chmod(0o755)
        monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")

    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return install


ROWS = "0, GPU-aa, NVIDIA GeForce RTX 5090, 32607\n1, GPU-ab, NVIDIA RTX 6000 Ada, 49140"
FIRST, SECOND = Gpu("NVIDIA GeForce RTX 5090", 32607 << 20), Gpu("NVIDIA RTX 6000 Ada", 49140 << 20)


@pytest.mark.parametrize(
    ("visible", "gpus"),
    [
        (None, (FIRST, SECOND)),
        ("1", (SECOND,)),
        ("1,0", (SECOND, FIRST)),
        ("GPU-ab", (SECOND,)),
        ("GPU-a", ()),  # ambiguous
        ("0,7,1", (FIRST,)),
        ("", ()),
    ],
)
def test_gpus_are_those_that_cuda_may_use(nvidia_smi, monkeypatch, visible, gpus):
    nvidia_smi(ROWS)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert sglang_machine.visible_gpus() == gpus


def test_a_driver_that_fails_has_no_gpus(nvidia_smi, monkeypatch):
    nvidia_smi("NVIDIA-SMI has failed", 9)
    assert sglang_machine.visible_gpus() == ()
    nvidia_smi("0, GPU-aa, A device, [N/A]")
    assert sglang_machine.visible_gpus() == ()
    monkeypatch.setenv("PATH", "")
    assert sglang_machine.visible_gpus() == ()


def test_a_containers_limit_counts_as_memory(tmp_path, monkeypatch):
    monkeypatch.setattr("cpumoe.measure.limits.available_bytes", lambda: 1000)
    limits = [tmp_path / "max", tmp_path / "word", tmp_path / "none"]
    limits[0].write_text("500\n")
    limits[1].write_text("max\n")
    monkeypatch.setattr(sglang_machine, "_LIMITS", limits)
    assert sglang_machine.this_machine().memory == 500


def test_the_installed_host_is_told_by_its_plugins(tmp_path, monkeypatch):
    package = tmp_path / "sglang"
    (package / "srt" / "plugins").mkdir(parents=True)
    (package / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    assert sglang_host.installed_host().name == UPSTREAM
    (package / "srt" / "plugins").rmdir()
    assert sglang_host.installed_host().name == FORK


def test_this_machine_has_cores_nodes_and_memory():
    machine = sglang_machine.this_machine()
    assert machine.cores >= 1
    assert machine.memory > 0
    assert set(machine.nodes) <= set(machine.cores_of_nodes)


@pytest.mark.filterwarnings("ignore:Runtime. . threads requested:RuntimeWarning")
def test_the_machines_nodes_are_those_that_experts_use(monkeypatch, tmp_path):
    made_up_nodes(monkeypatch, tmp_path, [2, 3])
    machine = sglang_machine.this_machine()
    assert (machine.cores, machine.nodes) == (5, (0, 1))
    assert machine.cores_of_nodes == {0: 2, 1: 3}
    assert machine.cores_on([1]) == 3
    assert dataclasses.replace(machine, quota=2.5).cores_on([0, 1]) == 2
    for text, cores, nodes in (("[1]", 3, (1,)), ("1", 5, ())):
        monkeypatch.setenv("CPUMOE_NODES", text)
        machine = sglang_machine.this_machine()
        assert (machine.cores, machine.nodes) == (cores, nodes)
