"""Packing a layer takes one copy of its weights."""

import json
import sys

import pytest
from moe_tools import PEAK_MEMORY, output_with_torch

from cpumoe.models import find_model
from cpumoe.models.synth import write_checkpoint

EXPERTS = 8

REPORT = """
import json, sys
import torch
from cpumoe import Experts, default_runtime

def report(load):
    default_runtime()
    with PeakMemory() as peak:
        experts = load()
    print(json.dumps([experts.nbytes, peak.before, peak.bytes, anonymous_bytes()]))
"""

FROM_CHECKPOINT = """
report(lambda: Experts.from_checkpoint(sys.argv[1], layer=0))
"""

FROM_TENSORS = """
def stack(n, k):
    codes = torch.randint(256, (int(sys.argv[1]), n, k // 2), dtype=torch.uint8)
    return codes, torch.full((int(sys.argv[1]), n, k // 32), 127, dtype=torch.uint8)

gate, up, down = stack(2048, 4096), stack(2048, 4096), stack(4096, 2048)
report(lambda: Experts.from_tensors(gate=gate, up=up, down=down, format="mxfp4"))
"""


def assert_one_copy(script, argument):
    whole = PEAK_MEMORY + REPORT + script
    nbytes, before, peak, after = json.loads(output_with_torch(whole, argument))
    stored = EXPERTS * 3 * 4096 * 2048 * 4.25 / 8
    assert stored <= nbytes <= 1.01 * stored
    assert peak - before <= 1.1 * nbytes, f"{(peak - before) / nbytes:.2f} copies of the weights"
    assert after - before >= 0.9 * nbytes, "the weights are not in memory of their own"


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/status")
def test_peak_memory_of_packing_a_checkpoint(tmp_path):
    folder = write_checkpoint(
        tmp_path, find_model("v4-flash"), layers=1, experts=EXPERTS, pattern="random"
    )
    assert_one_copy(FROM_CHECKPOINT, str(folder))


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/status")
def test_peak_memory_of_packing_tensors():
    assert_one_copy(FROM_TENSORS, str(EXPERTS))
