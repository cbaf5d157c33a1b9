"""Each target of tests/fuzz stands a few inputs, and the runner finds faults."""

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
