"""Checks cpumoe on a machine with a GPU; see check.sh."""

from __future__ import annotations

import argparse
import os
import platform
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tests.gpu.results import FAIL, PASS
from tests.gpu.runner import Runner, Step

ROOT = Path(__file__).resolve().parents[2]
NO_GPU = 77
MINUTES = 9.0  # for which the steps' limits are made; with more, all may take longer
BUILD_SECONDS = 200


def python(name: str, *arguments: str) -> Callable[[dict[str, Any]], Sequence[str]]:
    """Returns the command of a step that is a module of this folder."""
    return lambda facts: [sys.executable, "-m", f"tests.gpu.{name}", *arguments]


def with_package(facts: dict[str, Any]) -> dict[str, str]:
    """The environment of steps that import cpumoe."""
    paths = [facts["package"], os.environ.get("PYTHONPATH", "")]
    return {"PYTHONPATH": os.pathsep.join(filter(None, paths))}


def with_driver(facts: dict[str, Any]) -> dict[str, str]:
    """The environment of programs that load the driver library by its name."""
    paths = [facts["driver"], os.environ.get("LD_LIBRARY_PATH", "")]
    return {"LD_LIBRARY_PATH": os.pathsep.join(filter(None, paths))}


def steps(options: argparse.Namespace) -> list[Step]:
    """Returns the steps in their order: first what others need."""
    work = str(options.work)
    slower = max(options.minutes / MINUTES, 1)
    tensors = ("--without-gpu",) if options.without_gpu else ()
    build = ("--package", str(options.package)) if options.package else ()

    def tests(*more: str) -> Callable[[dict[str, Any]], Sequence[str]]:
        return lambda facts: [
            *(sys.executable, "-m", "tests.gpu.stream_tests", facts["stream_test"]),
            *(("--stand-in",) if options.without_gpu else ()),
            *more,
        ]

    def on_tensors(name: str, module: str, title: str, *, seconds: float = 90) -> Step:
        return Step(
            name,
            title,
            seconds * slower,
            ("package", "torch_device"),
            python(module, work, *tensors),
            environment=with_package,
        )

    return [
        Step(
            "machine",
            "what this machine has",
            60 * slower,
            (),
            python("machine", work, *tensors),
            ("gpu", "driver", "torch_device"),
        ),
        Step(
            "build",
            "cpumoe and the C++ programs for this CPU",
            BUILD_SECONDS * slower,
            (),
            python(
                "build",
                work,
                "--seconds",
                str(BUILD_SECONDS * slower),
                *build,
                *(("--stand-in",) if options.without_gpu else ()),
            ),
            ("package", "latency", "stream_test"),
        ),
        Step(
            "latency",
            "microseconds that a layer's submit and sync take on a stream, by mechanism",
            30 * slower,
            ("driver", "latency"),
            lambda facts: [facts["latency"], *(("2", "2") if options.without_gpu else ())],
            environment=with_driver,
        ),
        Step(
            "stream-tests",
            "the C++ tests of streams on the driver",
            90 * slower,
            ("driver", "stream_test"),
            tests(),
            environment=with_driver,
        ),
        on_tensors("calls", "torch_calls", "tensors of the GPU give the bits of CPU tensors"),
        on_tensors("graphs", "torch_graphs", "CUDA graphs of 8 layers, replayed 1,000 times"),
        on_tensors(
            "overlap", "torch_overlap", "experts on the CPU beside a kernel on the GPU", seconds=60
        ),
        on_tensors(
            "write-back", "torch_write_back", "experts written into page-locked memory", seconds=60
        ),
        on_tensors("sglang", "sglang_method", "KTEPWrapperMethod of the installed SGLang"),
        Step(
            "sanitizer",
            "the C++ tests of streams under compute-sanitizer",
            90 * slower,
            ("driver", "stream_test", "gpu"),
            tests("--sanitizer"),
            environment=with_driver,
        ),
    ]


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(prog="check.sh", description=__doc__)
    parser.add_argument(
        "--out",
        type=Path,
        default=Path(os.environ.get("CPUMOE_GPU_CHECK_OUT") or ROOT / "build/gpu/results"),
        help="folder for results.json and log.txt; default: $CPUMOE_GPU_CHECK_OUT, or else "
        "build/gpu/results of the repository",
    )
    parser.add_argument(
        "--work",
        type=Path,
        default=ROOT / "build/gpu",
        help="folder for what is built; default: build/gpu of the repository",
    )
    parser.add_argument(
        "--minutes", type=float, default=MINUTES, help="time for all steps; default: 9"
    )
    parser.add_argument(
        "--only", metavar="STEPS", default="", help="run these steps alone, comma separated"
    )
    parser.add_argument("--skip", metavar="STEPS", default="", help="leave these steps out")
    parser.add_argument(
        "--package",
        type=Path,
        metavar="FOLDER",
        help="use this folder's package cpumoe, with its libraries, and compile nothing",
    )
    parser.add_argument(
        "--without-gpu",
        action="store_true",
        help="try the steps themselves: with CPU tensors, and the driver library of "
        "tests/fake_cuda",
    )
    parser.add_argument(
        "--relative-to",
        type=Path,
        metavar="FOLDER",
        default=Path.cwd(),
        help="the folder of relative paths; default: the current one",
    )
    options = parser.parse_args(arguments)
    for name in ("out", "work", "package"):
        path = getattr(options, name)
        setattr(options, name, path and (options.relative_to / path).resolve())
    return options


def chosen(options: argparse.Namespace, every: list[Step]) -> set[str]:
    """Returns the steps that the options name, and those that provide what others need."""
    names = {step.name for step in every}
    only, skip = (set(filter(None, text.split(","))) for text in (options.only, options.skip))
    if unknown := sorted((only | skip) - names):
        sys.exit(f"error: no step {', '.join(unknown)}; there are {', '.join(sorted(names))}")
    if not only:
        return names - skip
    return (only | {step.name for step in every if step.gives}) - skip


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the steps; returns the exit status."""
    options = parse(arguments)
    every = steps(options)
    selected = chosen(options, every)
    about = {
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "without_gpu": options.without_gpu,
        "python": platform.python_version(),
        "arguments": list(sys.argv[1:] if arguments is None else arguments),
    }
    runner = Runner(ROOT, options.out, options.minutes * 60, about)
    if options.without_gpu:
        print("This run is on the CPU alone. It says nothing about a GPU.", flush=True)
    for step in every:
        if step.name in selected:
            runner.run(step)
        else:
            runner.leave_out(step)
    statuses = [outcome.status for outcome in runner.outcomes]
    print(
        f"{runner.status}: {statuses.count(PASS)} of {len(statuses)} steps passed, "
        f"{statuses.count(FAIL)} failed; see {options.out / 'results.json'}"
    )
    if runner.status == FAIL:
        return 1
    return 0 if options.without_gpu or "gpu" in runner.facts else NO_GPU


if __name__ == "__main__":
    sys.exit(main())
