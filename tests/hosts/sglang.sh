#!/usr/bin/env bash
# Runs SGLang and its fork sglang-kt, unmodified and without a GPU, with experts in cpumoe. Prints a line per case:
#
#   hooks.py    SGLang's own class of layers, as cpumoe's plugin changes it
#   fork.py     sglang-kt's wrapper of experts: hybrid, moved experts, experts written for the GPU, deferral
#   engine.py   SGLang's engine generates with a tiny model; the tokens must equal those of SGLang alone
#   command.py  `cpumoe sglang` prints commands that the parsers of both accept, and starts a server
#
#   bash tests/hosts/sglang.sh                      makes the environment in a temporary folder
#   bash tests/hosts/sglang.sh ENVIRONMENT          makes it there, or uses it if it exists
#   bash tests/hosts/sglang.sh ENVIRONMENT WHEEL    tests a built cpumoe instead of building one
#
# The environment needs Python 3.11, 4 GB of disk and ten minutes, the tests another ten. PyTorch for CPUs suffices:
# PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu avoids gigabytes of CUDA. SGLang's kernels exist for GPUs
# only; sglang/without_gpu and sglang/fork_shims.py say what stands in for them.
set -euo pipefail
here=$(realpath "$(dirname "$0")")/sglang

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

host=$(realpath -m "${1:-$work/sglang}")
if [[ ! -e $host/complete ]]; then
    python3.11 -m venv "$host"
    "$host/bin/python" -m pip install --quiet -r "$here/requirements.txt"
    "$host/bin/python" -m pip install --quiet --no-deps -r "$here/requirements_no_deps.txt"
    # Both have a package `sglang`.
    "$host/bin/python" -m pip install --quiet --no-deps --target "$host/sglang-kt" sglang-kt==0.7.2
    touch "$host/complete"
fi
wheel=${2:-}
if [[ -z $wheel ]]; then
    "$host/bin/python" -m pip wheel --quiet --no-deps --wheel-dir "$work" "$here/../../.."
    wheel=$(echo "$work"/cpumoe-*.whl)
fi
"$host/bin/python" -m pip install --quiet --no-deps --target "$work/cpumoe" "$wheel"

export SGLANG_USE_CPU_ENGINE=1 CPUMOE_SGLANG=1
common=$work/cpumoe:$here/without_gpu
failed=0
PYTHONPATH=$common "$host/bin/python" "$here/engine.py" make "$work/tiny"
PYTHONPATH=$common "$host/bin/python" "$here/hooks.py" "$work"/tiny/{model,experts} || failed=1
fork=$common:$work/cpumoe/cpumoe/integrations/sglang/pythonpath:$host/sglang-kt
PYTHONPATH=$fork "$host/bin/python" "$here/fork.py" || failed=1
PYTHONPATH=$common "$host/bin/python" "$here/command.py" options || failed=1
PYTHONPATH=$fork "$host/bin/python" "$here/command.py" options || failed=1
PYTHONPATH=$common "$host/bin/python" "$here/command.py" serve "$work/tiny" || failed=1
PYTHONPATH=$common "$host/bin/python" "$here/engine.py" compare "$work/tiny" || failed=1
exit $failed
