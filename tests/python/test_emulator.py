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

LIBRARY = os.environ.get("CPUMOE_EMULATOR_LIBRARY", "")
VDPBF16PS = 0  # cpumoe::emulator::Instruction

RUN_TESTS = """
import ctypes, json, os, sys
import pytest
status = pytest.main(sys.argv[1:])
library = ctypes.CDLL(os.environ["CPUMOE_EMULATOR_LIBRARY"])
library.cpumoe_emulator_count.restype = ctypes.c_uint64
print()
print(json.dumps([int(status), library.cpumoe_emulator_count(int({vdpbf16ps}))]))
"""


def emulated_isas() -> list[str]:
    """Variants that lack here nothing but what the emulator supplies."""
    missing = {isa: set(cpumoe.missing_features(isa)) for isa in cpumoe.known_isas()}
    return [isa for isa, lacks in missing.items() if lacks and lacks <= EMULATED_FEATURES]


@pytest.mark.skipif(not LIBRARY, reason="CPUMOE_EMULATOR_LIBRARY does not name the emulator")
@pytest.mark.skipif("CPUMOE_TEST_EMULATOR" in os.environ, reason="runs under the emulator already")
def test_numerics_under_the_emulator():
    isas = emulated_isas()
    if not isas:
        pytest.skip("this CPU has all that the emulator supplies, or lacks more")
    for isa in isas:
        env = {
            **os.environ,
            "CPUMOE_TEST_EMULATOR": "1",
            "CPUMOE_ISA": isa,
            "LD_PRELOAD": LIBRARY,
        }
        chosen = f"{isa} and (error_bound and deepseek_v4 or any_size)"
        numerics = str(Path(__file__).with_name("test_experts.py"))
        script = RUN_TESTS.format(vdpbf16ps=VDPBF16PS)
        arguments = ("-q", "-p", "no:cacheprovider", "-k", chosen, numerics)
        output = output_of(script, *arguments, env=env, timeout=600)
        status, count = json.loads(output.splitlines()[-1])
        assert status == pytest.ExitCode.OK, output
        assert count > 0, f"{isa}: no instruction was emulated\n{output}"
