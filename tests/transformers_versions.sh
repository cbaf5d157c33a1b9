#!/usr/bin/env bash
# Tests the integration with the lowest and the newest transformers that pyproject.toml allows, each laid over
# the active virtual environment, in which tests/run.sh has installed cpumoe and what tests need. The version that is
# installed there is left out: tests/run.sh tests it.
#
#   bash tests/transformers_versions.sh              two minutes for each of the two
#   bash tests/transformers_versions.sh 5.24.0       other versions than these two
set -euo pipefail
cd "$(dirname "$0")/.."

tests=(tests/python/test_transformers_*.py tests/python/test_language_model.py)
range=$(sed -nE 's/^ *"transformers(>=[^"]*)",$/\1/p' pyproject.toml)
lowest=${range%%,*}

version_of() { # installs the newest transformers that a requirement admits into a folder; prints its version
    pip install --quiet --no-deps --target "$2" "transformers$1" >&2
    PYTHONPATH=$2 python -c 'import importlib.metadata as m; print(m.version("transformers"))'
}

overlays=$(mktemp -d)
trap 'rm -rf "$overlays"' EXIT
if [[ $# -gt 0 ]]; then
    wanted=("${@/#/==}")
    tested=
else
    wanted=("==${lowest#>=}" "$range")
    tested=$(python -c 'import importlib.metadata as m; print(m.version("transformers"))')
fi
for requirement in "${wanted[@]}"; do
    overlay=$(mktemp -d -p "$overlays")
    version=$(version_of "$requirement" "$overlay")
    if [[ " $tested " == *" $version "* ]]; then
        continue
    fi
    tested+=" $version"
    echo "== transformers $version"
    PYTHONPATH=$overlay${PYTHONPATH:+:$PYTHONPATH} python -m pytest -q -n 2 --dist worksteal "${tests[@]}"
done
