"""Packing a layer takes one copy of its weights."""

import json
import sys

import pytest
from moe_tools import output_of

from cpumoe.models import find_model
from cpumoe.synth import write_checkpoint

EXPERTS = 16

# Anonymous memory: mapped pages of a checkpoint's files do not count, the system can drop them.
WATCH = """
import json, sys, threading
import torch
from cpumoe import Experts, default_runtime

def anonymous_bytes():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("RssAnon:"))

def watch():
    global peak
    while not stop.wait(0.001):
        peak = max(peak, anonymous_bytes())

def report(load):
    global peak, stop
    default_runtime()
    before = peak = anonymous_bytes()
    stop = threading.Event()
    watcher = threading.Thread(target=watch)
    watcher.start()
    experts = load()
    stop.set()
    watcher.join()
    peak = max(peak, anonymous_bytes())
    print(json.dumps([experts.nbytes, before, peak, anonymous_bytes()]))
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
    nbytes, before, peak, after = json.loads(output_of(WATCH + script, argument))
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
