"""Each target of tests/fuzz stands a few inputs, and the runner finds faults."""

import pickle
import sys
from pathlib import Path

import pytest
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).parents[2]))

from tests.fuzz import __main__ as fuzz
from tests.fuzz.target import Target


@pytest.mark.parametrize("name", fuzz.TARGETS)
def test_nearly_right_inputs_end_as_documented(name, tmp_path):
    faults, count = fuzz.run(name, tmp_path, examples=25, rounds=1)
    assert faults == []
    assert count >= 10
    assert list(tmp_path.iterdir()) == []


class Sums(Target):
    """A reader that fails for large and for negative numbers."""

    def strategy(self):
        return st.integers(-1000, 1000)

    def check(self, data):
        if data >= 100:
            raise KeyError(data)
        if data < 0:
            raise IndexError(data)


def test_each_fault_is_told_once_by_its_simplest_input(tmp_path, monkeypatch):
    monkeypatch.setitem(fuzz.TARGETS, "sums", Sums)
    faults, _ = fuzz.run("sums", tmp_path, examples=300, rounds=4)
    assert len(faults) == 2
    assert sum("data=-1," in fault for fault in faults) == 1
    assert sum("data=100," in fault for fault in faults) == 1
    assert len(list(tmp_path.glob("sums-*.fault"))) == 2


def test_time_that_is_up_loses_no_fault(tmp_path, monkeypatch):
    now = 0.0

    class Late(Sums):
        def check(self, data):
            nonlocal now
            try:
                super().check(data)
            except LookupError:
                now = 2.0  # the time is up before Hypothesis repeats the fault
                raise

    monkeypatch.setitem(fuzz.TARGETS, "late", Late)
    monkeypatch.setattr(fuzz.time, "monotonic", lambda: now)
    faults, _ = fuzz.run("late", tmp_path, seconds=1)
    (fault,) = faults
    assert "Error: " in fault.splitlines()[-1]
    assert "Flaky" not in fault
    (file,) = tmp_path.glob("late-*.fault")
    assert repr(pickle.loads(file.read_bytes())) in fault.splitlines()[-1]
