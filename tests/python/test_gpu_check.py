"""The check of a machine with a GPU: its steps work on the CPU, and no step stops another one."""

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2]))

from tests.gpu import build, runner, stream_tests, torch_calls, torch_graphs, torch_overlap
from tests.gpu import torch_write_back as write_back
from tests.gpu.gpu_tools import Cpu, Sizes, difference
from tests.gpu.results import RESULT, run_parts
from tests.gpu.runner import Runner, Step

ROOT = Path(__file__).parents[2]
PASSES = """
from tests.gpu.results import provide, report
report("PASS", "sum", speed_gb_per_s=2.5)
provide(place="here")
"""


def python(code):
    return lambda facts: [sys.executable, "-c", code]


@pytest.fixture
def run(tmp_path):
    """Runs steps; returns the document that they leave."""

    def run(*steps, seconds=60.0):
        own = Runner(ROOT, tmp_path / "out", seconds, {"by": "a test"})
        for step in steps:
            own.run(step)
        return json.loads((tmp_path / "out" / "results.json").read_text())

    return run


def step(name, code, *, seconds=30.0, **options):
    return Step(name, "a title", seconds, **{"needs": (), "command": python(code), **options})


def test_results_and_facts_of_a_step_are_kept(run, capsys):
    user = step("user", PASSES, needs=("place",))
    document = run(step("maker", PASSES, gives=("place",)), user)
    assert [(s["status"], s["reason"]) for s in document["steps"]] == [("PASS", "")] * 2
    [result] = document["steps"][0]["results"]
    assert result["numbers"] == {"speed_gb_per_s": 2.5}
    assert (document["status"], document["facts"]) == ("PASS", {"place": "here"})
    assert document["about"] == {"by": "a test"}
    assert "PASS     maker: sum  speed_gb_per_s=2.5" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("ending", "reason"),
    [
        ("raise SystemExit(3)", "exit status 3"),
        ("import os; os.abort()", "ended by SIGABRT"),
        ("import time; time.sleep(60)", "not finished after 1 s"),
        # A process that the step has started, and that would outlive the step.
        ("import subprocess; subprocess.Popen(['sleep', '60'])", ""),
    ],
)
def test_a_step_that_ends_badly_keeps_its_results_and_stops_no_other(run, ending, reason):
    limit = 1.0 if "time" in ending else 30.0
    document = run(step("bad", PASSES + ending, seconds=limit), step("next", PASSES))
    bad, following = document["steps"]
    assert bad["reason"] == reason
    assert bad["status"] == ("FAIL" if reason else "PASS")
    assert len(bad["results"]) == 1
    assert following["status"] == "PASS"


def test_what_fails_is_named_and_its_output_shown(run, capsys):
    code = "from tests.gpu.results import report; report('FAIL', 'sum', 'it is 5')"
    document = run(step("bad", code), step("crash", "print('why'); 1 / 0"))
    assert document["status"] == "FAIL"
    assert [s["reason"] for s in document["steps"]] == ["sum: it is 5", "exit status 1"]
    assert "why" in document["steps"][1]["output_tail"]
    assert "| ZeroDivisionError: division by zero" in capsys.readouterr().out


PARTS = """
import os, time
from tests.gpu.results import report, run_parts

def fault():
    raise RuntimeError("CUDA error: an illegal memory access was encountered")

run_parts({
    "first": lambda: report("PASS", "1", pid=os.getpid()),
    "hangs": lambda: time.sleep(60),
    "raises": lambda: 1 / 0,
    "faults": fault,
    "crashes": os.abort,
    "last": lambda: report("PASS", "6", pid=os.getpid()),
})
"""


def test_parts_behind_one_that_hangs_or_crashes_run_in_a_new_process(run, monkeypatch):
    monkeypatch.setattr(runner, "PART_SHARE", 0.02)
    [only] = run(step("parts", PARTS, seconds=100))["steps"]
    assert [(result["name"], result["reason"]) for result in only["results"]] == [
        ("1", ""),
        ("hangs", "hung; the log says where"),
        ("raises", "ZeroDivisionError: division by zero"),
        ("faults", "RuntimeError: CUDA error: an illegal memory access was encountered"),
        ("crashes", "ended by SIGABRT"),
        ("6", ""),
    ]
    assert only["status"] == "FAIL"
    first, *_, last = only["results"]
    assert first["numbers"] != last["numbers"]


def test_a_step_that_says_nothing_or_does_not_start_has_failed(run):
    document = run(step("silent", ""), step("lost", "", command=lambda facts: ["/no/such/file"]))
    assert document["steps"][0]["reason"] == "ended without a result"
    assert document["steps"][1]["reason"].startswith("FileNotFoundError: ")


def test_what_a_step_lacks_is_said(run):
    lacks = "from tests.gpu.results import lack, report\n"
    lacks += "lack('gpu', 'none is here'); report('SKIPPED', 'GPU', 'none is here')"
    document = run(
        step("machine", lacks, gives=("gpu",)),
        step("build", "1 / 0", gives=("program",)),
        step("user", PASSES, needs=("gpu", "program")),
    )
    *_, user = document["steps"]
    assert user["status"] == "SKIPPED"
    assert user["reason"] == "gpu: none is here; program: step build: FAIL exit status 1"


def test_no_step_begins_when_the_time_is_up(run):
    [only] = run(step("late", PASSES), seconds=3.0)["steps"]
    assert (only["status"], only["reason"]) == ("SKIPPED", "the time of --minutes is up")


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_without_a_gpu_all_steps_are_skipped(tmp_path):
    done = subprocess.run(
        ["bash", ROOT / "tests/gpu/check.sh", "--out", "out", "--skip", "build"],
        cwd=tmp_path,
        env={**os.environ, "PYTHON": sys.executable},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 77, done.stdout + done.stderr
    document = json.loads((tmp_path / "out" / "results.json").read_text())
    machine, *others = document["steps"]
    assert machine["name"] == "machine"
    assert {step["status"] for step in others} == {"SKIPPED"}
    assert all("gpu" in s["reason"].lower() or "step build" in s["reason"] for s in others)
    assert len(others) >= 8


def test_steps_that_do_not_exist_are_refused(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "tests.gpu.check", "--only", "walls", "--out", tmp_path],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert done.stderr.startswith("error: no step walls; there are build, calls, ")


def test_the_variants_to_build_are_known_ones_with_their_parent():
    table = (ROOT / "cmake/Variants.cmake").read_text()
    for name in build.cpu_variants().split(","):
        assert f"cpumoe_isa({name} " in table


FAKE_TESTS = """
import os, sys, time
[skipped] = [a for a in sys.argv if a.startswith("--gtest_filter=")]
for name in ("A.One", "A.Crashes", "B/A.Two/0", "B.Hangs", "B.Three", "B.Skips"):
    if name in skipped.partition("-")[2].split(":"):
        continue
    print(f"[ RUN      ] {name}", flush=True)
    if name == "A.Crashes":
        os.abort()
    if name == "B.Hangs":
        time.sleep(60)
    print(f"[{'  SKIPPED ' if name == 'B.Skips' else '       OK '}] {name} (0 ms)", flush=True)
print("[  SKIPPED ] 1 test, listed below:")
"""


def test_cpp_tests_go_on_behind_one_that_crashes_or_hangs(monkeypatch, tmp_path):
    monkeypatch.setattr(stream_tests, "SILENCE", 2.0)
    program = tmp_path / "tests.py"
    program.write_text(FAKE_TESTS)
    tests = stream_tests.Tests([sys.executable, str(program)], "*", float("inf"))
    tests.run()
    assert tests.status == {
        "A.One": "OK",
        "A.Crashes": "FAILED",
        "B/A.Two/0": "OK",
        "B.Hangs": "FAILED",
        "B.Three": "OK",
        "B.Skips": "SKIPPED",
    }
    assert tests.faults == {"A.Crashes": "ended by signal 6", "B.Hangs": "hung for 2 s"}


SMALL = Sizes(layers=1, experts=8, hidden=64, intermediate=128)


@pytest.mark.parametrize("name", ["calls", "graphs", "overlap", "write_back"])
def test_steps_with_tensors_work_on_the_cpu(name, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch_calls, "CALLS", 4)
    monkeypatch.setattr(torch_graphs, "INPUTS", 2)
    monkeypatch.setattr(torch_graphs, "TIMED", 2)
    for step in (torch_calls, torch_graphs):
        monkeypatch.setattr(step, "SIZES", replace(SMALL, layers=2))
    monkeypatch.setattr(write_back, "ROUNDS", 1)
    make = {
        "calls": lambda: torch_calls.Calls(tmp_path, Cpu(), (0, 1, 9)),
        "graphs": lambda: torch_graphs.Graphs(tmp_path, Cpu(), replays=4),
        "overlap": lambda: torch_overlap.Overlap(tmp_path, Cpu(), SMALL, repetitions=1),
        "write_back": lambda: write_back.WriteBack(tmp_path, Cpu(), SMALL),
    }
    parts = make[name]().parts()
    run_parts(parts)
    lines = capsys.readouterr().out.splitlines()
    results = [json.loads(x.removeprefix(RESULT)) for x in lines if x.startswith(RESULT)]
    assert len(results) >= len(parts)
    failed = [result for result in results if result["status"] == "FAIL"]
    if name == "overlap":  # whose times depend on what else the machine does
        failed = [result for result in failed if "step_ms" not in result["numbers"]]
    assert failed == []


def test_a_part_that_raises_has_failed_and_the_next_one_runs(capsys):
    def fail():
        raise ValueError("too cold\nand dark")

    run_parts({"first": fail, "second": lambda: print("ran")})
    out = capsys.readouterr().out
    assert json.loads(re.search(f"{RESULT}(.*)", out)[1])["reason"] == "ValueError: too cold"
    assert out.endswith("ran\n")


def test_differences_are_counted():
    x = torch.tensor([1.0, 2.0, 3.0])
    assert difference(x.clone(), x) == ""
    assert difference(x + torch.tensor([0, 0.5, 0]), x).startswith("1 of 3 numbers differ, at most")
    assert difference(torch.full((3,), float("nan")), x).startswith("3 of 3 numbers differ")
    assert difference(x.half(), x) == "expected torch.float32 [3], got torch.float16 [3]"
