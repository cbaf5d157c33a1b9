#!/usr/bin/env bash
# All that CI runs and what takes too long for it: sanitizers with every test and every variant that can run here,
# the Python tests with each of the CPU's variants as default, 100,000 calls on streams, a model compiled by
# Inductor, every MoE family of transformers, a wheel with the newest dependencies, and minutes of fuzzing.
#
#   bash tests/full.sh           one and a half to two hours on two cores
#
# Uses the Python of the active virtual environment, in which cpumoe is installed.
set -euo pipefail
cd "$(dirname "$0")/.."

export CPUMOE_TEST_EVERYTHING=1
bash tests/run.sh --full
CPUMOE_TEST_INDUCTOR=1 python -m pytest tests/python/test_transformers_compile.py -k inductor
CPUMOE_TEST_FAMILIES=1 python -m pytest tests/python/test_families_table.py
CPUMOE_TEST_STREAM_CALLS=100000 build/dev/lib/stream_test --gtest_filter='*LeaveNothingBehind'
bash tests/transformers_versions.sh
bash tests/extras.sh
bash tests/clients.sh
bash tests/docs.sh
bash tests/packaging.sh --full
bash tests/numa.sh || [[ $? -eq 77 ]]  # 77: QEMU cannot be had here
python -m tests.fuzz --minutes 10
