#!/usr/bin/env bash
# Checks what a release consists of. The script validates pyproject.toml, builds the source distribution, unpacks it
# elsewhere, and builds a wheel from that folder alone, with the lowest versions of the build requirements that
# pyproject.toml allows. It then installs the wheel with the lowest allowed version of each dependency into an
# environment of its own and uses it (tests/packaging/smoke.py), first without and then with all extras.
#
#   bash tests/packaging.sh           needs some 2 GB of disk
#   bash tests/packaging.sh --full    builds, installs and uses a second wheel with the newest versions
#
# Two packages are exceptions. PyTorch has the version of constraints.txt in each environment, because the other versions
# in the registry come with gigabytes of GPU libraries. compressed-tensors must fit PyTorch, so pip chooses its version.
#
# The wheels have the variant `generic` alone, which keeps compiling short.
set -euo pipefail
cd "$(dirname "$0")/.."

kinds=(lowest)
case "$*" in
    "") ;;
    --full) kinds=(lowest newest) ;;
    *)
        echo "usage: bash tests/packaging.sh [--full]" >&2
        exit 2
        ;;
esac

source=$PWD
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
torch=$(grep '^torch==' constraints.txt)

environment() { # environment NAME: a virtual environment with a pip that knows dependency groups
    python3 -m venv "$work/$1"
    "$work/$1/bin/python" -m pip install --quiet "pip>=25.1"
}

build() { # build ARGUMENTS...: runs python -m build; prints its output only if it fails
    if ! "$tools" -m build "$@" >"$work/build.log" 2>&1; then
        cat "$work/build.log"
        exit 1
    fi
}

environment tools
tools=$work/tools/bin/python
"$tools" -m pip install --quiet --group packaging

echo "== pyproject.toml and the source distribution"
"$tools" -m validate_pyproject pyproject.toml
build --sdist --outdir "$work/dist" .
tar -xzf "$work"/dist/cpumoe-*.tar.gz -C "$work"
cd "$work"/cpumoe-*/

for kind in "${kinds[@]}"; do
    echo "== wheel, $kind build requirements"
    : >"$work/build-$kind.txt"
    if [[ $kind == lowest ]]; then
        "$tools" "$source/tests/packaging/lowest.py" build pyproject.toml >"$work/build-$kind.txt"
    fi
    PIP_CONSTRAINT=$work/build-$kind.txt PIP_BUILD_CONSTRAINT=$work/build-$kind.txt \
        build --wheel --outdir "$work/dist/$kind" --config-setting cmake.define.CPUMOE_ISAS=generic .
done
"$tools" -m twine check --strict "$work"/dist/*.tar.gz "$work"/dist/*/*.whl
cd "$work"
unset PYTHONPATH CPUMOE_ISA CPUMOE_API_KEY

install() { # install KIND CONSTRAINTS [EXTRAS]: the wheel of a kind into the environment of that name
    "$work/$1/bin/python" -m pip install --quiet -c "$2" "$(echo "$work/dist/$1"/cpumoe-*.whl)${3:-}"
    "$work/$1/bin/python" -m pip check
}

constrain() { # constrain PART: writes PART.txt, the lowest versions that the wheel allows
    echo "$torch" >"$1.txt"
    "$tools" "$source/tests/packaging/lowest.py" "$1" dist/lowest/*.whl |
        grep -vE '^(torch|compressed-tensors)==' >>"$1.txt"
}

use() { # use KIND PART: tests what is installed
    "$work/$1/bin/python" "$source/tests/packaging/smoke.py" "$2"
}

extras='[chat,plot,serve,transformers]'

echo "== smoke test, lowest dependencies"
environment lowest
constrain core
install lowest core.txt
use lowest core

# Extras need newer versions of some of cpumoe's own dependencies. pip upgrades these alone.
echo "== smoke test, lowest dependencies of all extras"
constrain extras
install lowest extras.txt "$extras"
use lowest extras

if [[ " ${kinds[*]} " == *" newest "* ]]; then
    echo "== smoke test, newest dependencies"
    environment newest
    echo "$torch" >newest.txt
    install newest newest.txt "$extras"
    use newest extras
fi
echo "packaging: all passed"
