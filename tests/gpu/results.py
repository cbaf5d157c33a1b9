"""How a step tells the runner what it found: lines of its standard output.

A line is a marker and a JSON document. Programs in C++ print such lines themselves. What a step has
printed counts, even if the step hangs or crashes later.
"""

from __future__ import annotations

import json
import traceback
from collections.abc import Callable
from typing import Any

RESULT = "@@result "
FACTS = "@@facts "

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
    """Runs the parts of a step; one that raises an exception has failed, and the next one runs."""
    for name, part in parts.items():
        try:
            part()
        except Exception as error:
            traceback.print_exc()
            report(FAIL, name, f"{type(error).__name__}: {error}".partition("\n")[0])
