"""Runs the C++ tests of streams, and goes on behind a test that hangs or crashes.

The program is linked with the stand-in for the driver library (tests/fake_cuda), but takes the
library of LD_LIBRARY_PATH. Tests that need the stand-in are skipped on a real one.
"""

from __future__ import annotations

import argparse
import os
import queue
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

from tests.gpu.output import lines_of
from tests.gpu.results import FAIL, SKIPPED, check, report

# A test that skips itself on a real driver library. It shows which library was used.
ASKS_THE_STAND_IN = "CudaStreamTest.ARefusalOfTheDriverLeavesNoHalfCall"
# These use every operation of the driver, and none of them provokes its errors.
SANITIZED = "*StreamCallTest.*Types*:*StreamCallTest.TwoStreams*:*StreamGraphTest.Replays*"
SILENCE = 30.0  # seconds without output after which a test hangs
LINE = re.compile(r"\[ +(RUN|OK|FAILED|SKIPPED) +\] ([\w/]+\.[\w/]+)")


class Tests:
    """Runs of the test program, until every test has run or the time is up."""

    def __init__(self, command: list[str], filter_: str, end: float) -> None:
        """Prepares.

        Args:
            command: the test program, and what comes before it.
            filter_: GoogleTest's filter.
            end: by `time.monotonic`, when no further test may begin.
        """
        self.status: dict[str, str] = {}  # by name: OK, FAILED, SKIPPED, RUN
        self.faults: dict[str, str] = {}  # why a test did not end by itself
        self.codes: list[int] = []
        self._command = command
        self._filter = filter_
        self._end = end

    def run(self) -> None:
        """Runs all tests. Each run leaves out those that have run."""
        while time.monotonic() < self._end:
            before = len(self.status)
            why = self._run_once()
            running = [name for name, status in self.status.items() if status == "RUN"]
            for name in running:
                self.status[name] = "FAILED"
                self.faults[name] = why or "did not end"
            if not running or len(self.status) == before:
                return

    def _run_once(self) -> str:
        done = ":".join(self.status)
        process = subprocess.Popen(
            [*self._command, f"--gtest_filter={self._filter}-{done}", "--gtest_color=no"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
        )
        lines = lines_of(process)
        try:
            while True:
                left = min(SILENCE, self._end - time.monotonic())
                line = lines.get(timeout=max(left, 0))
                if line is None:
                    break
                print(line, end="", flush=True)
                if match := LINE.match(line):
                    self.status[match[2]] = match[1]
            code = process.wait(10)
        except (queue.Empty, subprocess.TimeoutExpired):
            os.killpg(process.pid, signal.SIGKILL)
            return f"hung for {left:.0f} s"
        self.codes.append(code)
        return f"ended by signal {-code}" if code < 0 else f"ended with exit status {code}"


def run_tests(program: str, stand_in: bool) -> None:
    """Runs all tests, and reports one result for all that passed and one for each that failed."""
    tests = Tests([program], "*", time.monotonic() + 80)
    tests.run()
    names = list(tests.status)
    failed = [name for name in names if tests.status[name] == "FAILED"]
    for name in failed:
        report(FAIL, name, tests.faults.get(name, "see the log"))
    passed, skipped = (
        sum(status == kind for status in tests.status.values()) for kind in ("OK", "SKIPPED")
    )
    check("tests", passed > 0, "no test has passed", passed=passed, failed=len(failed))
    if skipped:
        report(SKIPPED, "tests that need the stand-in", number=skipped)
    used_stand_in = tests.status.get(ASKS_THE_STAND_IN) == "OK"
    check(
        "driver library",
        used_stand_in == stand_in,
        f"expected {'the stand-in' if stand_in else 'a real one'}, got the other",
        library="tests/fake_cuda" if used_stand_in else os.environ.get("LD_LIBRARY_PATH", ""),
    )


def run_sanitizer(program: str) -> None:
    """Runs some tests under compute-sanitizer, which also sees errors of the driver."""
    tool = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    if not Path(tool).exists():
        return report(SKIPPED, "compute-sanitizer", "it is not installed")
    command = [tool, "--error-exitcode", "86", "--report-api-errors", "explicit", program]
    tests = Tests(command, SANITIZED, time.monotonic() + 80)
    tests.run()
    if not tests.status:
        return report(SKIPPED, "compute-sanitizer", "it does not run here; see the log")
    failed = [name for name, status in tests.status.items() if status == "FAILED"]
    reason = f"failed: {', '.join(failed)}" if failed else f"exit status {tests.codes}; see the log"
    return check("compute-sanitizer", tests.codes == [0], reason, tests=len(tests.status))


def main() -> None:
    """Runs the tests."""
    parser = argparse.ArgumentParser()
    parser.add_argument("program")
    parser.add_argument("--stand-in", action="store_true")
    parser.add_argument("--sanitizer", action="store_true")
    options = parser.parse_args()
    if options.sanitizer:
        run_sanitizer(options.program)
    else:
        run_tests(options.program, options.stand_in)


if __name__ == "__main__":
    main()
