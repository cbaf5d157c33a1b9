#!/usr/bin/env bash
# Checks cpumoe beside a real GPU: streams of CUDA, graphs, overlap, SGLang's calls. Needs an NVIDIA GPU, a C++ compiler
# and Python; CMake, pybind11, GoogleTest and a PyTorch with CUDA for most steps. Downloads and installs nothing. A step
# that cannot run says what it lacks, and the others go on.
#
#   bash tests/gpu/check.sh --out FOLDER     nine minutes at most; writes FOLDER/results.json and FOLDER/log.txt
#   bash tests/gpu/check.sh --help           other options
#
# Exit status: 0 no check has failed, 1 one has, 77 there is no GPU.
set -euo pipefail
from=$PWD
cd "$(dirname "$0")/../.."
exec "${PYTHON:-python3}" -m tests.gpu.check --relative-to "$from" "$@"
