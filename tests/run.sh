#!/usr/bin/env bash
# Installs what the tests need, then runs all of them: C++ (plain, then under sanitizers) and Python.
#
#   bash tests/run.sh            everything that a change needs
#   bash tests/run.sh --quick    without the sanitizer builds
#   bash tests/run.sh --full     sanitizers with all tests and variants, Python with each variant as default
#
# Uses the Python of the active virtual environment, in which cpumoe is installed.
set -euo pipefail
cd "$(dirname "$0")/.."

presets=(dev asan tsan)
full=
case "$*" in
    "") ;;
    --quick) presets=(dev) ;;
    --full) full=yes ;;
    *)
        echo "usage: bash tests/run.sh [--quick|--full]" >&2
        exit 2
        ;;
esac

has_googletest() {
    echo '#include <gtest/gtest.h>' | c++ -x c++ -fsyntax-only - 2>/dev/null
}
if ! has_googletest; then
    if [[ $EUID -eq 0 ]] && command -v apt-get >/dev/null; then
        apt-get update -q && apt-get install -q -y libgtest-dev
    else
        echo "the C++ tests need GoogleTest: install libgtest-dev (Debian, Ubuntu) or gtest-devel" >&2
        exit 1
    fi
fi
# Unlike -c, variables hold for the build environment too: the first one in old versions of pip, the second in new ones.
export PIP_CONSTRAINT=$PWD/constraints.txt PIP_BUILD_CONSTRAINT=$PWD/constraints.txt
# The first version that knows dependency groups.
python -m pip install --quiet "pip>=25.1"
python -m pip install --quiet ".[chat,plot,serve,transformers]" --group test
for tool in cmake ninja; do
    command -v "$tool" >/dev/null || pip install --quiet "$tool"
done

for preset in "${presets[@]}"; do
    echo "== C++ tests, preset $preset"
    options=()
    if [[ $preset != dev ]]; then
        # Sanitizers find what happens: variants that cannot run here would only take long to compile.
        isas=$(build/dev/lib/testable_isas)
        if [[ -z $full ]]; then
            # What threads share is the same on all variants; these two have every kind of path but AMX's.
            some='generic|avx2'
            if [[ $preset == asan ]]; then
                some+="|$(python -c 'import cpumoe; print(cpumoe.supported_isas()[-1])')"
            fi
            isas=$(tr , '\n' <<<"$isas" | grep -xE "$some" | paste -sd,)
        fi
        options=(-D CPUMOE_ISAS="$isas" -D CPUMOE_SANITIZE_ALL="${full:-no}")
    fi
    cmake --preset "$preset" "${options[@]}"
    cmake --build --preset "$preset"
    if [[ $preset == tsan && -z $full && ,$isas, == *,avx2,* ]]; then
        # avx2 has every path of generic. generic is compiled because the engine's tests use it.
        export CPUMOE_TEST_ISAS=avx2
    fi
    ctest --preset "$preset"
    unset CPUMOE_TEST_ISAS
done

echo "== Python tests"
emulator=$PWD/build/dev/lib/cpumoe_emulator.so
if [[ -e $emulator ]]; then
    export CPUMOE_EMULATOR_LIBRARY=$emulator
fi
fake_cuda=$PWD/build/dev/lib/fake_cuda/libcuda.so.1
if [[ -e $fake_cuda ]]; then
    export CPUMOE_FAKE_CUDA=$fake_cuda
fi
# Each process has PyTorch and the models of its tests in memory, so there are two on any machine.
run_pytest=(python -m pytest -n 2 --dist worksteal)
if [[ -z $full ]]; then
    "${run_pytest[@]}"
    exit
fi
for isa in $(python -c 'import cpumoe; print(*cpumoe.supported_isas())'); do
    echo "== Python tests, default variant $isa"
    CPUMOE_ISA=$isa "${run_pytest[@]}"
done
