"""Fuzzes each target for a while: ``python -m tests.fuzz --minutes 10``.

Each target runs in a process of its own, under a limit of memory, and ends with a traceback if an
input takes longer than `HANG_SECONDS`. The input at hand is in a file, so that one that kills or
hangs the process is found there. Hypothesis draws inputs, and shrinks those that fail.
"""

import argparse
import contextlib
import faulthandler
import itertools
import math
import pickle
import resource
import subprocess
import sys
import time
import traceback
from pathlib import Path

from hypothesis import HealthCheck, Phase, given, seed, settings

from .targets import TARGETS

HANG_SECONDS = 5
# In addition to the process's memory when a target begins.
MEMORY_BYTES = 2 << 30
_ROUND = 200


def run(
    name, folder, *, first_seed=0, examples=_ROUND, rounds=None, seconds=math.inf, hang_seconds=None
):
    """Fuzzes a target in this process.

    Args:
        name: name of the target.
        folder: for the input at hand, and for those that are at fault.
        first_seed: seed of the first round.
        examples: inputs of a round.
        rounds: after which to end; None: as many as there is time for.
        seconds: after which to end.
        hang_seconds: ends the process if an input takes longer; None: never.

    Returns:
        A text for each fault, and how many inputs there were.
    """
    target, faults, count = TARGETS[name](), {}, 0
    last = None  # the fault that this round shrinks, and its input
    at_hand = folder / f"{name}.input"
    end = time.monotonic() + seconds

    def check(data):
        nonlocal count, last
        if time.monotonic() > end:
            return
        count += 1
        content = pickle.dumps(data)
        at_hand.write_bytes(content)
        if hang_seconds is not None:
            faulthandler.dump_traceback_later(hang_seconds, exit=True)
        try:
            target.check(data)
        except Exception as error:
            place = _place(error)
            if place in faults:  # one of each kind is enough
                return
            last = error, content
            raise
        finally:
            faulthandler.cancel_dump_traceback_later()

    with contextlib.closing(target):
        for number in itertools.islice(itertools.count(first_seed), rounds):
            fuzz = settings(
                max_examples=examples,
                deadline=None,
                database=None,
                report_multiple_bugs=False,  # the others are found in a later round
                print_blob=False,  # seed and input suffice; the default is True if CI is set
                suppress_health_check=list(HealthCheck),
                phases=(Phase.generate, Phase.shrink),
            )(seed(number)(given(target.strategy())(check)))
            last = None
            try:
                fuzz()
            except Exception as error:
                # If time is up, Hypothesis cannot repeat the fault, and complains of that instead.
                cause, content = last or (error, at_hand.read_bytes())
                faults[_place(cause)] = f"{name}: seed {number}: {_told(cause)}"
                (folder / f"{name}-{len(faults)}.fault").write_bytes(content)
            if time.monotonic() > end:
                break
    at_hand.unlink(missing_ok=True)
    return list(faults.values()), count


def _place(error):
    """Returns what distinguishes faults: the error's type, and where it was raised."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__} at {frame.filename}:{frame.lineno}"


def _told(error):
    """Returns the error, where it came from, and the simplest input that causes it."""
    text = "".join(traceback.format_exception(error, limit=-8, chain=False))
    return text if len(text) < 6000 else f"{text[:3000]}\n...\n{text[-3000:]}"


def _limit_memory():
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY_BYTES, hard))


def _child(name, seconds, folder, first_seed):
    _limit_memory()
    faults, count = run(
        name, folder, seconds=seconds, first_seed=first_seed, hang_seconds=HANG_SECONDS
    )
    print(f"{name}: {count} inputs, {len(faults)} faults", flush=True)
    for fault in faults:
        print(fault, flush=True)
    return bool(faults)


def _spawn(name, seconds, folder, first_seed):
    command = [sys.executable, "-m", "tests.fuzz", "--target", name, "--seed", str(first_seed)]
    command += ["--folder", str(folder), "--seconds", str(seconds), "--child"]
    return subprocess.run(command, check=False).returncode


def main():
    """Runs the command; returns its exit code."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--minutes", type=float, default=10, help="in all")
    parser.add_argument("--target", choices=TARGETS, action="append", help="default: all")
    parser.add_argument("--seed", type=int, default=0, help="of the first round of each target")
    parser.add_argument("--folder", type=Path, default=Path("fuzz-found"), help="for faults")
    parser.add_argument("--seconds", type=float, help=argparse.SUPPRESS)
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    given_options = parser.parse_args()
    folder, names = given_options.folder, given_options.target or list(TARGETS)
    folder.mkdir(exist_ok=True)
    if given_options.child:
        return _child(names[0], given_options.seconds, folder, given_options.seed)
    failed = []
    for name in names:
        seconds = given_options.minutes * 60 / len(names)
        at_hand = folder / f"{name}.input"
        at_hand.unlink(missing_ok=True)
        code = _spawn(name, seconds, folder, given_options.seed)
        if at_hand.exists():  # A process that comes to its end removes the file.
            print(f"{name}: ended with {code}: its input is in {at_hand}", flush=True)
        failed += [name] if code else []
    with contextlib.suppress(OSError):
        folder.rmdir()  # if it is empty
    print(f"failed: {', '.join(failed)}" if failed else "nothing found")
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
