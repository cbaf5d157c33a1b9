"""Builds cpumoe for this CPU, the C++ tests of streams, and the latency program. Downloads nothing.

All of it is in the work folder: `package` for Python, `cmake` and `latency` for C++. A second run
compiles what has changed.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

from tests.gpu.results import FAIL, PASS, SKIPPED, lack, provide, report

ROOT = Path(__file__).resolve().parents[2]
NO_GOOGLETEST = (
    "GoogleTest is not installed; install libgtest-dev or gtest-devel, or set GTest_ROOT"
)
NO_PYBIND11 = "pybind11 is not installed, which the Python module needs"
# Spellings of features: those of the compiler, and those of Linux.
SEPARATORS = re.compile(r"[-_]")


def cpu_variants() -> str:
    """Returns the CPU's best variant and that variant's parent, as CPUMOE_ISAS takes them.

    The parent is there because a virtual machine may have AMX's flags and yet not allow AMX.
    """
    found = re.search(r"^flags\s*:(.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    flags = set(SEPARATORS.sub("", found[1]).split()) if found else set()
    table = (ROOT / "cmake/Variants.cmake").read_text()
    parents: dict[str, str] = {}
    for name, rest in re.findall(r"^cpumoe_isa\((\w+) ([^)]*)\)", table, re.MULTILINE):
        parts = re.fullmatch(r"ARCHITECTURES (.*?)(?: PARENT (\w+))?(?: FEATURES (.*))?", rest)
        assert parts is not None, rest
        architectures, parent, features = parts.groups(default="")
        fits = architectures == "any" or platform.machine() in architectures.split()
        has_parent = not parent or parent in parents
        if fits and has_parent and {SEPARATORS.sub("", f) for f in features.split()} <= flags:
            parents[name] = parent
    best = list(parents)[-1]
    return ",".join(filter(None, (parents[best], best)))


def run(*command: object, seconds: float, **environment: str) -> str:
    """Runs a command and shows its output; returns the output.

    Raises:
        RuntimeError: it failed, took too long, or does not exist.
    """
    words = [str(word) for word in command]
    print("+", *words, flush=True)
    try:
        done = subprocess.run(
            words,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            timeout=seconds,
            check=False,
            env={**os.environ, **environment},
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise RuntimeError(f"{words[0]}: {error}") from error
    print(done.stdout, flush=True)
    if done.returncode:
        raise RuntimeError(f"{words[0]} failed with exit status {done.returncode}:\n{done.stdout}")
    return done.stdout


def build_latency(work: Path) -> None:
    """Compiles the latency program, with nothing but a compiler."""
    program = work / "latency"
    compiler = next(filter(shutil.which, ("c++", "g++", "clang++")), "c++")
    try:
        run(
            *(compiler, "-std=c++20", "-O2", "-Wall", "-pthread", f"-I{ROOT / 'tests'}"),
            *(ROOT / "tests/gpu/latency.cc", "-o", program, "-ldl"),
            seconds=60,
        )
    except RuntimeError as error:
        report(FAIL, "latency program", str(error).partition("\n")[0])
        return lack("latency", "the program does not compile")
    report(PASS, "latency program")
    return provide(latency=str(program))


def find_pybind11() -> str:
    """Returns the folder of pybind11's CMake files; an empty string if it is not installed."""
    try:
        import pybind11
    except ImportError:
        return ""
    return str(pybind11.get_cmake_dir())


def configure(folder: Path, pybind11: str) -> bool:
    """Configures with the C++ tests if GoogleTest is there; returns whether it is.

    Raises:
        RuntimeError: CMake fails.
    """
    command = ["cmake", "-S", ROOT, "-B", folder, "-DCMAKE_BUILD_TYPE=Release"]
    if shutil.which("ninja"):
        command += ["-G", "Ninja"]
    command += [f"-DCPUMOE_ISAS={cpu_variants()}", f"-DPython_EXECUTABLE={sys.executable}"]
    command += [
        f"-Dpybind11_DIR={pybind11}",
        f"-DCPUMOE_BUILD_PYTHON={'ON' if pybind11 else 'OFF'}",
    ]
    try:
        run(*command, "-DCPUMOE_BUILD_TESTS=ON", seconds=60)
    except RuntimeError as error:
        if "needs GoogleTest" not in str(error):
            raise
        run(*command, "-DCPUMOE_BUILD_TESTS=OFF", seconds=60)
        return False
    return True


def build_all(work: Path, seconds: float) -> None:
    """Compiles the package and the C++ tests, as far as their needs are there."""
    start = time.monotonic()
    folder, pybind11 = work / "cmake", find_pybind11()
    libraries = folder / "lib"
    has_tests = configure(folder, pybind11)
    targets = [f"cpumoe_variant_{isa}" for isa in cpu_variants().split(",")]
    if has_tests:
        targets.append("stream_test")
    else:
        report(SKIPPED, "C++ tests", NO_GOOGLETEST)
        lack("stream_test", NO_GOOGLETEST)
    if pybind11:
        targets.append("_core")
    else:
        report(SKIPPED, "package", NO_PYBIND11)
        lack("package", NO_PYBIND11)
    run(
        "cmake",
        "--build",
        folder,
        "--parallel",
        "--target",
        *targets,
        seconds=seconds - (time.monotonic() - start),
    )
    report(PASS, "compiled", variants=cpu_variants(), seconds=round(time.monotonic() - start, 1))
    if has_tests:
        provide(stream_test=str(libraries / "stream_test"))
    if pybind11:
        use_package(stage(work, libraries))


def stage(work: Path, libraries: Path) -> Path:
    """Copies the Python files and the libraries to one folder, and leaves the sources alone."""
    package = work / "package"
    shutil.rmtree(package, ignore_errors=True)
    ignored = shutil.ignore_patterns("__pycache__", "*.so")
    shutil.copytree(ROOT / "python/cpumoe", package / "cpumoe", ignore=ignored)
    for library in libraries.glob("*.so"):
        shutil.copy2(library, package / "cpumoe")
    return package


def use_package(package: Path) -> None:
    """Provides the package, if Python can import it."""
    code = (
        "import json, cpumoe; print(json.dumps("
        "{'version': cpumoe.__version__, 'variants': cpumoe.supported_isas()}))"
    )
    try:
        text = run(sys.executable, "-c", code, seconds=60, PYTHONPATH=str(package))
    except RuntimeError as error:
        reason = str(error).strip().rpartition("\n")[2]
        report(FAIL, "package", reason)
        return lack("package", reason)
    report(PASS, "package", **json.loads(text.splitlines()[-1]))
    return provide(package=str(package))


def main() -> None:
    """Builds what can be built."""
    parser = argparse.ArgumentParser()
    parser.add_argument("work", type=Path)
    parser.add_argument("--seconds", type=float, default=3600)
    parser.add_argument("--package", type=Path)
    parser.add_argument("--stand-in", action="store_true")
    options = parser.parse_args()
    # CMake and Ninja may be packages of this Python, whose folder PATH need not have.
    os.environ["PATH"] = os.pathsep.join([os.environ["PATH"], str(Path(sys.executable).parent)])
    if options.package:
        for program in ("latency", "stream_test"):
            lack(program, "--package: nothing is compiled")
        return use_package(options.package)
    options.work.mkdir(parents=True, exist_ok=True)
    build_latency(options.work)
    try:
        build_all(options.work, options.seconds - 20)
    except RuntimeError as error:
        report(FAIL, "build", str(error).partition("\n")[0])
    fake = options.work / "cmake/lib/fake_cuda"
    if options.stand_in and fake.exists():
        provide(driver=str(fake))
    return None


if __name__ == "__main__":
    main()
