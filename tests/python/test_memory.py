"""Packing a layer takes about one copy of its weights."""

import json
import sys

import pytest
from moe_tools import output_of

from cpumoe.models import find_model
from cpumoe.synth import write_checkpoint

EXPERTS = 16

PACK = """
import json, sys, threading
import safetensors.torch
from cpumoe import Experts, default_runtime

def anonymous_bytes():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("RssAnon:"))

def watch():
    global peak
    while not stop.wait(0.002):
        peak = max(peak, anonymous_bytes())

default_runtime()
before = peak = anonymous_bytes()
stop = threading.Event()
watcher = threading.Thread(target=watch)
watcher.start()
experts = Experts.from_checkpoint(sys.argv[1], layer=0)
stop.set()
watcher.join()
peak = max(peak, anonymous_bytes())
print(json.dumps([experts.nbytes, before, peak, anonymous_bytes()]))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/status")
def test_peak_memory_of_packing_a_checkpoint(tmp_path):
    folder = write_checkpoint(
        tmp_path, find_model("v4-flash"), layers=1, experts=EXPERTS, pattern="random"
    )
    nbytes, before, peak, after = json.loads(output_of(PACK, str(folder)))
    stored = EXPERTS * 3 * 4096 * 2048 * 4.25 / 8
    assert stored <= nbytes <= 1.01 * stored
    assert peak - before <= 1.2 * nbytes, f"{(peak - before) / nbytes:.2f} copies of the weights"
    assert after - before >= 0.9 * nbytes, "the weights are not in memory of their own"
