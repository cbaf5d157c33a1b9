"""Runtimes on CPUs that the caller names."""

import os
import threading

import pytest
import torch
from moe_tools import inputs, layer, output_with_torch, refused

from cpumoe import Runtime
from cpumoe._engine import cpus as placement

USABLE = placement._usable_cpus()

# A host whose main thread is bound to one CPU, as OpenMP does it with OMP_PROC_BIND.
BOUND = """
import os, sys
import torch
sys.path.insert(0, sys.argv[1])
from moe_tools import inputs, layer
import cpumoe

cpus = [int(cpu) for cpu in sys.argv[2].split(",")]
weights = layer("mxfp4")
args = inputs(weights, tokens=20)
expected = weights.pack(runtime=cpumoe.Runtime(1))(*args)
os.sched_setaffinity(0, {cpus[0]})
before = set(os.listdir("/proc/self/task"))
runtime = cpumoe.Runtime(cpus=cpus)
experts = weights.pack(runtime=runtime)
assert torch.equal(experts(*args), expected)
assert torch.equal(experts.submit(*args).result(), expected)
assert os.sched_getaffinity(0) == {cpus[0]}
masks = [os.sched_getaffinity(int(t)) for t in set(os.listdir("/proc/self/task")) - before]
print(sorted(map(list, masks)))
"""


def test_threads_run_on_exactly_these_cpus_whatever_the_callers_mask():
    cpus = ",".join(map(str, USABLE))
    printed = output_with_torch(BOUND, os.path.dirname(__file__), cpus)
    assert printed == str([[cpu] for cpu in USABLE])


def test_the_callers_thread_keeps_its_mask_and_others_are_asked_in_vain():
    before = os.sched_getaffinity(0)
    threads = threading.active_count()
    with Runtime(cpus=USABLE[:1]) as runtime:
        assert runtime.threads == 1
        assert runtime.cpus == (USABLE[0],)
        assert os.sched_getaffinity(0) == before
        assert threading.active_count() == threads
        assert repr(runtime) == f"Runtime(cpus=[{USABLE[0]}])"
    assert repr(runtime) == f"Runtime(cpus=[{USABLE[0]}], closed)"
    assert Runtime(1).cpus is None


def test_results_are_those_of_other_runtimes():
    weights = layer("mxfp4")
    args = inputs(weights, tokens=20)
    with Runtime(cpus=USABLE[-2:]) as runtime, Runtime(1) as other:
        named = weights.pack(runtime=runtime)
        assert torch.equal(named(*args), weights.pack(runtime=other)(*args))
        with pytest.raises(IndexError):
            named(args.hidden_states, torch.full_like(args.topk_ids, 99), args.topk_weights)


def test_errors_name_what_is_wrong_with_the_cpus():
    first = USABLE[0]
    absent = USABLE[-1] + 1
    for cpus, options, kind, message in (
        (first, {}, TypeError, f"cpus must be a sequence of ints, got {first}"),
        ("01", {}, TypeError, "cpus must be a sequence of ints, got '01'"),
        ([0.0], {}, TypeError, "cpus must be a sequence of ints, got 0.0 in it"),
        ([True], {}, TypeError, "cpus must be a sequence of ints, got True in it"),
        ([], {}, ValueError, "cpus must name at least one CPU, got none"),
        (
            [first, first],
            {},
            ValueError,
            f"cpus must name each CPU once, got [{first}, {first}]",
        ),
        (
            [first, absent, -1],
            {},
            ValueError,
            "cpus must be CPUs that are online and in this process's cpuset, "
            f"{placement._ranges(USABLE)}; got [{absent}, -1]",
        ),
        (
            [first],
            {"pin": True},
            ValueError,
            "cpus places every thread on a CPU, so leave out pin",
        ),
        (
            [first],
            {"threads": 2},
            ValueError,
            "cpus has 1 CPUs, for one thread each, but threads is 2; leave out threads",
        ),
    ):
        with refused(kind, f"Runtime: {message}"):
            Runtime(cpus=cpus, **options)


def test_a_system_that_does_not_place_threads_is_named(monkeypatch):
    def refuse(*_):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "sched_setaffinity", refuse)
    with pytest.raises(OSError, match="Runtime: the system refuses to place threads on CPUs"):
        Runtime(cpus=[0])


def test_ranges_of_cpus_are_written_as_linux_writes_them():
    assert placement._ranges([0]) == "0"
    assert placement._ranges([0, 1, 2, 5, 7, 8]) == "0-2,5,7-8"
