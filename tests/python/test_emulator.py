"""The numerics tests again, on a variant that this CPU lacks, under the instruction emulator.

`CPUMOE_EMULATOR_LIBRARY` names the emulator built as a library (tests/emulator/preload.cc).
"""

import json
import os
from pathlib import Path

import pytest
from conftest import EMULATED_FEATURES
from moe_tools import output_of

import cpumoe
from cpumoe import _core

TILE_INSTRUCTIONS = ("ldtilecfg", "tileloadd", "tilestored", "tilerelease")
LIBRARY = os.environ.get("CPUMOE_EMULATOR_LIBRARY", "")

# Prints pytest's exit code, and rows of tests/emulator/instructions.h for the tests of each format.
RUN_TESTS = """
import json, sys
import pytest

class Counts:
    def __init__(self):
        self.rows = {}

    @pytest.hookimpl(hookwrapper=True)
    def pytest_runtest_protocol(self, item):
        from conftest import emulated_instructions
        before = emulated_instructions()
        yield
        after = emulated_instructions()
        rows = self.rows.setdefault(item.callspec.params["fmt"], [{**r, "count": 0} for r in after])
        for row, start, end in zip(rows, before, after, strict=True):
            row["count"] += end["count"] - start["count"]

counts = Counts()
status = pytest.main(sys.argv[1:], plugins=[counts])
print()
print(json.dumps([int(status), counts.rows]))
"""


def emulated_isas() -> list[str]:
    """Installed variants for which this CPU lacks only emulated features."""
    built = [row.name for row in _core.known_isas() if row.built]
    missing = {isa: set(cpumoe.missing_features(isa)) for isa in built}
    return [isa for isa, lacks in missing.items() if lacks and lacks <= EMULATED_FEATURES]


# Without such variants there are no parameters, and pytest skips.
@pytest.mark.parametrize("isa", emulated_isas())
@pytest.mark.skipif(not LIBRARY, reason="CPUMOE_EMULATOR_LIBRARY does not name the emulator")
@pytest.mark.skipif("CPUMOE_TEST_EMULATOR" in os.environ, reason="runs under the emulator already")
def test_numerics_under_the_emulator(isa):
    env = {**os.environ, "CPUMOE_TEST_EMULATOR": "1", "CPUMOE_ISA": isa, "LD_PRELOAD": LIBRARY}
    formats = " or ".join(f"{isa}-{fmt}" for fmt in cpumoe.WEIGHT_FORMATS)
    chosen = f"({formats}) and (error_bound and deepseek_v4 or any_size)"
    numerics = str(Path(__file__).with_name("test_experts.py"))
    arguments = ("-q", "-p", "no:cacheprovider", "-k", chosen, numerics)
    output = output_of(RUN_TESTS, *arguments, env=env, timeout=600)
    status, instructions = json.loads(output.splitlines()[-1])
    assert status == pytest.ExitCode.OK, output
    assert set(instructions) == set(cpumoe.WEIGHT_FORMATS)
    for fmt, rows in instructions.items():
        check_counts(isa, fmt, rows)


def check_counts(isa, fmt, instructions):
    """Checks that the variant used its best dot product, and no instruction of others."""
    assert {row["feature"] for row in instructions} == EMULATED_FEATURES
    needed = next(row.features for row in _core.known_isas() if row.name == isa)
    evidence = [row for row in instructions if row["is_evidence"] and row["feature"] in needed]
    expected = {evidence[-1]["name"]: evidence[-1]["feature"]}
    if "avxvnni" in expected.values() and fmt not in ("mxfp4", "int4"):
        expected = {}  # it multiplies bytes, and these weights are no small integers times a scale
    if fmt == "fp16":
        expected = {}  # every variant multiplies fp16 weights in fp32
    elif "amx-tile" in needed:
        expected |= dict.fromkeys(TILE_INSTRUCTIONS, "amx-tile")
    counts = {row["name"]: row["count"] for row in instructions}
    for name, feature in expected.items():
        if feature in cpumoe.missing_features(isa):
            assert counts[name] > 0, f"{isa}: {name} was not emulated"
    beyond = [row for row in instructions if row["count"] and row["feature"] not in needed]
    assert not beyond, f"{isa}: uses what it may not: {beyond}"
