"""Runs steps one after the other, each in a process of its own with a timeout.

Whatever a step does, the next one runs, and what was found so far is in the folder of the results.
"""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tests.gpu.output import lines_of
from tests.gpu.results import (
    FACTS,
    FAIL,
    FIRST_PART,
    PART,
    PART_SECONDS,
    PASS,
    REPORTED,
    RESULT,
    SKIPPED,
)

# Time to write the results, out of what the steps share.
RESERVE = 3.0
# A step that would get less time is skipped.
LEAST = 5.0
# The most time for a part, relative to what its step has.
PART_SHARE = 0.5
HUNG = "Timeout ("  # how faulthandler begins when that time is over
TAIL_LINES = 25
POLL = 0.2


@dataclass(frozen=True)
class Step:
    """What to run.

    Attributes:
        name: short, for options.
        title: what the step checks.
        seconds: the most time that it may take.
        needs: facts that must be there.
        command: makes the command line from the facts.
        gives: facts that a successful step provides.
        environment: variables, from the facts.
    """

    name: str
    title: str
    seconds: float
    needs: tuple[str, ...]
    command: Callable[[dict[str, Any]], Sequence[str]]
    gives: tuple[str, ...] = ()
    environment: Callable[[dict[str, Any]], dict[str, str]] = lambda facts: {}


@dataclass
class Outcome:
    """What came of a step."""

    name: str
    title: str
    status: str = PASS
    reason: str = ""
    seconds: float = 0.0
    results: list[dict[str, Any]] = field(default_factory=list)
    output_tail: list[str] = field(default_factory=list)


class Runner:
    """Runs steps, prints a line for each result, and writes ``results.json`` and ``log.txt``."""

    def __init__(self, folder: Path, out: Path, seconds: float, about: dict[str, Any]) -> None:
        """Starts the clock.

        Args:
            folder: the current folder of all steps.
            out: the folder for the results. A missing one is made.
            seconds: the time for all steps together.
            about: what else the document of the results says.
        """
        out.mkdir(parents=True, exist_ok=True)
        self.facts: dict[str, Any] = {}
        self.lacks: dict[str, str] = {}
        self.outcomes: list[Outcome] = []
        self._part: dict[str, Any] | None = None  # the part that runs, of a step with parts
        self._hung = False
        self._folder = folder
        self._out = out
        self._about = about
        self._end = time.monotonic() + seconds
        self._log = (out / "log.txt").open("w", encoding="utf-8", errors="replace")

    def run(self, step: Step) -> Outcome:
        """Runs a step, unless something that it needs is missing or the time is up."""
        outcome = Outcome(step.name, step.title)
        self.outcomes.append(outcome)
        self._say(f"== {step.name}: {step.title}")
        missing = [
            f"{fact}: {self.lacks.get(fact, 'unknown')}"
            for fact in step.needs
            if fact not in self.facts
        ]
        left = self._end - time.monotonic() - RESERVE
        if missing:
            outcome.status, outcome.reason = SKIPPED, "; ".join(missing)
        elif left < min(LEAST, step.seconds):
            outcome.status, outcome.reason = SKIPPED, "the time of --minutes is up"
        else:
            self._execute(step, outcome, min(step.seconds, left))
        for fact in step.gives:
            if fact not in self.facts:
                self.lacks.setdefault(
                    fact, f"step {step.name}: {outcome.status} {outcome.reason}".rstrip()
                )
        results = "" if outcome.status == FAIL or not outcome.results else _count(outcome.results)
        self._say(f"{outcome.status:8} {step.name}: {outcome.reason or results}")
        self.write()
        return outcome

    def leave_out(self, step: Step) -> None:
        """Notes that nobody provides what the step would."""
        self.lacks |= dict.fromkeys(step.gives, f"step {step.name} was left out")

    def write(self) -> None:
        """Writes the results so far; a reader never sees half of them."""
        document = {
            "about": self._about,
            "facts": self.facts,
            "lacks": self.lacks,
            "status": self.status,
            "steps": [asdict(outcome) for outcome in self.outcomes],
        }
        path = self._out / "results.json"
        unfinished = path.with_suffix(".tmp")
        unfinished.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
        unfinished.replace(path)

    @property
    def status(self) -> str:
        """FAIL if a step failed, SKIPPED if all were skipped."""
        statuses = {outcome.status for outcome in self.outcomes}
        return FAIL if FAIL in statuses else PASS if PASS in statuses else SKIPPED

    def _execute(self, step: Step, outcome: Outcome, seconds: float) -> None:
        start = time.monotonic()
        try:
            first: int | None = 0
            while first is not None:
                first = self._run_from(first, step, outcome, start + seconds)
        except Exception as error:
            outcome.status, outcome.reason = FAIL, f"{type(error).__name__}: {error}"
        outcome.seconds = round(time.monotonic() - start, 1)

    def _run_from(self, first: int, step: Step, outcome: Outcome, end: float) -> int | None:
        """Runs a step from its part `first` on; returns the part to go on with, if there is one."""
        self._part, self._hung = None, False
        outcome.output_tail = []
        seconds = end - time.monotonic()
        process = self._start(step, first, seconds)
        lines = lines_of(process)
        finished = self._collect(process, lines, outcome, end)
        code = process.returncode
        if finished and not code and outcome.results:
            outcome.output_tail = []
            _summarize(outcome)
            return None
        if code != REPORTED:
            for line in outcome.output_tail:
                self._say(f"        | {line}", log=False)
        reason = (
            f"not finished after {seconds:.0f} s"
            if not finished
            else "hung; the log says where"
            if self._hung
            else _describe(code)
            if code
            else "ended without a result"
        )
        part = self._part
        if part is None:
            outcome.status, outcome.reason = FAIL, reason
            return None
        if code != REPORTED:
            self._add({"status": FAIL, "name": part["name"], "reason": reason}, outcome)
        _summarize(outcome)
        goes_on = finished and not part["last"] and end - time.monotonic() > LEAST
        return int(part["number"]) + 1 if goes_on else None

    def _start(self, step: Step, first: int, seconds: float) -> subprocess.Popen[str]:
        environment = {
            **os.environ,
            "PYTHONUNBUFFERED": "1",
            FIRST_PART: str(first),
            PART_SECONDS: str(seconds * PART_SHARE),
            **step.environment(self.facts),
        }
        return subprocess.Popen(
            [str(part) for part in step.command(self.facts)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=environment,
            cwd=self._folder,
            start_new_session=True,
            text=True,
            errors="replace",
        )

    def _collect(
        self,
        process: subprocess.Popen[str],
        lines: queue.Queue[str | None],
        outcome: Outcome,
        end: float,
    ) -> bool:
        """Takes lines until the process has ended; returns False if it had to be killed."""
        complete = False
        try:
            complete = self._take_until(lines, outcome, end, lambda: process.poll() is not None)
            process.wait(max(end - time.monotonic(), 0))
            return True
        except subprocess.TimeoutExpired:
            return False
        finally:
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)  # also what the step has started
            # A process that waits for a broken driver cannot even be killed.
            with suppress(subprocess.TimeoutExpired):
                process.wait(5)
            if not complete:
                self._take_until(lines, outcome, time.monotonic() + 1, lambda: False)

    def _take_until(
        self,
        lines: queue.Queue[str | None],
        outcome: Outcome,
        end: float,
        ended: Callable[[], bool],
    ) -> bool:
        """Takes lines until there are no more, `ended` returns True, or it is `end`.

        Returns whether there are no more.
        """
        while (left := end - time.monotonic()) > 0:
            try:
                line = lines.get(timeout=min(left, POLL))
            except queue.Empty:
                # A process that the step has started may keep the pipe open.
                if ended():
                    return False
                continue
            if line is None:
                return True
            self._take(line.rstrip("\n"), outcome)
        return False

    def _take(self, line: str, outcome: Outcome) -> None:
        try:
            if line.startswith(RESULT):
                return self._add(json.loads(line.removeprefix(RESULT)), outcome)
            if line.startswith(PART):
                self._part = json.loads(line.removeprefix(PART))
                return None
            if line.startswith(FACTS):
                facts = json.loads(line.removeprefix(FACTS))
                self.facts |= facts.get("has", {})
                self.lacks |= facts.get("lacks", {})
                return None
        except (KeyError, ValueError):
            pass  # A process that was killed ends in half a line.
        self._hung = self._hung or line.startswith(HUNG)
        print(line, file=self._log, flush=True)
        outcome.output_tail = [*outcome.output_tail, line][-TAIL_LINES:]
        return None

    def _add(self, result: dict[str, Any], outcome: Outcome) -> None:
        """Adds a result to those of a step, and prints it."""
        text = f"{result['status']:8} {outcome.name}: {result['name']}"
        numbers = result.setdefault("numbers", {})
        reason = result.setdefault("reason", "")
        outcome.results.append(result)
        self._say("  ".join([text, *([reason] if reason else []), *_pairs(numbers)]))

    def _say(self, line: str, *, log: bool = True) -> None:
        print(line, flush=True)
        if log:
            print(line, file=self._log, flush=True)


def _pairs(numbers: dict[str, Any]) -> list[str]:
    return [
        f"{name}={value:.4g}" if isinstance(value, float) else f"{name}={value}"
        for name, value in numbers.items()
    ]


def _count(results: list[dict[str, Any]]) -> str:
    statuses = [result["status"] for result in results]
    counts = ((status, statuses.count(status)) for status in (PASS, SKIPPED))
    return ", ".join(f"{count} {status}" for status, count in counts if count)


def _summarize(outcome: Outcome) -> None:
    statuses = {result["status"] for result in outcome.results}
    outcome.status = FAIL if FAIL in statuses else PASS if PASS in statuses else SKIPPED
    if outcome.status == PASS:
        return
    outcome.reason = "; ".join(
        ": ".join(filter(None, (result["name"], result["reason"])))
        for result in outcome.results
        if result["status"] == outcome.status
    )


def _describe(code: int) -> str:
    if code >= 0:
        return f"exit status {code}"
    try:
        return f"ended by {signal.Signals(-code).name}"
    except ValueError:
        return f"ended by signal {-code}"
