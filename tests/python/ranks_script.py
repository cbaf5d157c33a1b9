"""A command as one of several ranks; test_ranks.py runs this in a process for each rank.

The first argument is a fault that the rank has, the rest is the command's. If the environment has
TIMES, files in this folder get the times at which a rank joins the others, or is killed.
"""

import os
import signal
import sys
import time
from pathlib import Path

import cpumoe.distributed
from cpumoe.cli import main
from cpumoe.distributed import ranks

FAULT = sys.argv.pop(1)
CALLS = 20  # after which a fault happens


def note_time(what):
    if "TIMES" in os.environ:
        path = Path(os.environ["TIMES"]) / f"{what}-{os.environ['RANK']}"
        path.write_text(str(time.monotonic()))


def join_and_note(*arguments, **options):
    note_time("joins")
    return join(*arguments, **options)


def killed_in_call(*_):
    global CALLS
    CALLS -= 1
    if CALLS == 0:
        note_time("killed")
        os.kill(os.getpid(), signal.SIGKILL)
    return answer(*_)


def old_software():
    return {**software(), "cpumoe": "0.0.9, build 0123456789ab"}


join, cpumoe.distributed.join = cpumoe.distributed.join, join_and_note
if FAULT.startswith("--"):  # options of this rank alone
    sys.argv += FAULT.split()
if FAULT == "killed":
    answer, ranks.Ranks._answer = ranks.Ranks._answer, killed_in_call
if FAULT == "killed-0":
    answer, ranks.LedExperts.__call__ = ranks.LedExperts.__call__, killed_in_call
if FAULT == "old":
    software, ranks.software = ranks.software, old_software
if FAULT == "no-memory":

    def _made(*_):
        raise MemoryError("not enough memory for the experts")

    ranks.Ranks._made = _made
if FAULT == "packed":  # says how many bytes of experts the rank has
    answer_ready = ranks.dist.send

    def said(tensor, *arguments, **options):
        if tensor.dtype == ranks.torch.int64:
            with open(os.environ["PACKED_FILE"], "w") as file:
                file.write(str(int(tensor)))
        answer_ready(tensor, *arguments, **options)

    ranks.dist.send = said
main()
