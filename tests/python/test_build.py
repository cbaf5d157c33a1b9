"""Compiler flags from outside do not change what arithmetic means."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest
from moe_tools import output_of

import cpumoe
from cpumoe import _core

ROOT = Path(__file__).parents[2]
COMPILER = os.environ.get("CXX") or shutil.which("c++")
NEEDS_COMPILER = pytest.mark.skipif(COMPILER is None, reason="no C++ compiler")
NEEDS_CMAKE = pytest.mark.skipif(shutil.which("cmake") is None, reason="no cmake")

PROJECT = f"""
cmake_minimum_required(VERSION 3.25)
project(probe LANGUAGES CXX)
include({ROOT}/cmake/StrictMath.cmake)
add_library(probe MODULE probe.cc)
set_target_properties(probe PROPERTIES PREFIX "")
target_compile_features(probe PRIVATE cxx_std_20)
target_include_directories(probe PRIVATE {ROOT}/cpp)
target_link_libraries(probe PRIVATE cpumoe_strict_math)
"""
PROBE = """
#include <cmath>
#include "base/float_types.h"
extern "C" bool sees_nan(float x) { return std::isnan(x); }
extern "C" float sum(float a, float b) { return (a + b) - b; }
extern "C" float quotient(float a, float b) { return a / b; }
"""
CHECK = """
import ctypes, math, sys
library = ctypes.CDLL(sys.argv[1])
library.sees_nan.argtypes, library.sees_nan.restype = [ctypes.c_float], ctypes.c_bool
for name in ("sum", "quotient"):
    function = getattr(library, name)
    function.argtypes, function.restype = [ctypes.c_float] * 2, ctypes.c_float
assert library.sees_nan(math.nan)
assert library.sum(1.0, 1e10) == 0.0
assert library.quotient(2.0**-126, 2.0) == 2.0**-127
assert float(sys.argv[2]) * 0.5 == 5e-324, "subnormal numbers are flushed to zero"
"""
FAST = (
    "-ffast-math",
    "-Ofast",
    "-funsafe-math-optimizations",
    "-ffinite-math-only",
    "-freciprocal-math",
    "-fno-signed-zeros",
    "-fassociative-math -fno-signed-zeros -fno-trapping-math",
)


@NEEDS_COMPILER
@NEEDS_CMAKE
def test_fast_math_flags_do_not_reach_what_is_built(tmp_path):
    (tmp_path / "CMakeLists.txt").write_text(PROJECT)
    (tmp_path / "probe.cc").write_text(PROBE)
    flags = " ".join(FAST)
    env = {**os.environ, "CXXFLAGS": flags, "LDFLAGS": flags}
    build = tmp_path / "build"
    release = ("-DCMAKE_BUILD_TYPE=Release", "-DCMAKE_CXX_FLAGS_RELEASE=-Ofast")
    for command in (
        ("cmake", "-S", str(tmp_path), "-B", str(build), *release),
        ("cmake", "--build", str(build)),
    ):
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stdout + done.stderr
    output_of(CHECK, str(build / "probe.so"), "1e-323")


@NEEDS_COMPILER
@pytest.mark.parametrize("flags", FAST)
def test_headers_refuse_fast_math(flags):
    command = [COMPILER, "-std=c++20", "-fsyntax-only", f"-I{ROOT}/cpp", "-x", "c++", "-"]
    source = '#include "base/float_types.h"\n'
    plain = subprocess.run(command, input=source, capture_output=True, text=True, timeout=60)
    assert plain.returncode == 0, plain.stderr
    fast = subprocess.run(
        [*command, *flags.split()], input=source, capture_output=True, text=True, timeout=60
    )
    assert fast.returncode != 0
    assert "cpumoe needs strict arithmetic" in fast.stderr


def test_our_libraries_leave_the_floating_point_modes_alone():
    names = [Path(_core.__file__).name, *(f"cpumoe_{isa}.so" for isa in cpumoe.supported_isas())]
    folder = Path(_core.__file__).parent
    assert not [name for name in names if b"set_fast_math" in (folder / name).read_bytes()]
    script = """
import sys
from cpumoe import _core
for isa in sys.argv[2:]:
    _core.open_variant(isa, "test")
assert float(sys.argv[1]) * 0.5 == 5e-324, "subnormal numbers are flushed to zero"
"""
    output_of(script, "1e-323", *cpumoe.supported_isas())
