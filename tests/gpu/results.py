"""How a step tells the runner what it found: lines of its standard output.

A line is a marker and a JSON document. Programs in C++ print such lines themselves. What a step has
printed counts, even if the step hangs or crashes later.
"""

from __future__ import annotations

import faulthandler
import json
import os
import sys
import traceback
from collections.abc import Callable
from typing import Any

RESULT = "@@result "
FACTS = "@@facts "
PART = "@@part "

# Variables of the environment: the first part to run, and the most seconds for a part.
FIRST_PART, PART_SECONDS = "CPUMOE_GPU_CHECK_FIRST_PART", "CPUMOE_GPU_CHECK_PART_SECONDS"
REPORTED = 76  # exit status: a part has failed and said so, and the process cannot go on

PASS, FAIL, SKIPPED = "PASS", "FAIL", "SKIPPED"


def report(status: str, name: str, reason: str = "", /, **numbers: Any) -> None:
    """Reports one check.

    Args:
        status: PASS, FAIL or SKIPPED.
        name: what was checked.
        reason: why it failed or was skipped.
        numbers: measurements; the unit is the end of a name.
    """
    result = {"status": status, "name": name, "reason": reason, "numbers": numbers}
    print(RESULT + json.dumps(result), flush=True)


def check(name: str, passed: bool, reason: str = "", /, **numbers: Any) -> None:
    """Reports a check that passed or failed; `reason` says what is wrong if it failed."""
    report(PASS if passed else FAIL, name, "" if passed else reason, **numbers)


def provide(**facts: Any) -> None:
    """Tells later steps what there is."""
    print(FACTS + json.dumps({"has": facts}), flush=True)


def lack(fact: str, reason: str) -> None:
    """Tells later steps why something is missing."""
    print(FACTS + json.dumps({"lacks": {fact: reason}}), flush=True)


def run_parts(parts: dict[str, Callable[[], None]]) -> None:
    """Runs the parts of a step; one that raises an exception has failed, and the next one runs.

    If a part hangs, crashes, or leaves CUDA unusable, the process ends, and the runner runs the
    parts behind it in a new process.
    """
    first, limit = int(os.environ.get(FIRST_PART, 0)), float(os.environ.get(PART_SECONDS, 0))
    for number, (name, part) in enumerate(parts.items()):
        if number < first:
            continue
        is_last = number == len(parts) - 1
        print(PART + json.dumps({"number": number, "name": name, "last": is_last}), flush=True)
        if limit:
            faulthandler.dump_traceback_later(limit, exit=True)
        try:
            part()
        except Exception as error:
            traceback.print_exc()
            report(FAIL, name, f"{type(error).__name__}: {error}".partition("\n")[0])
            if "CUDA error" in str(error):
                sys.stderr.flush()
                os._exit(REPORTED)
        if limit:
            faulthandler.cancel_dump_traceback_later()
