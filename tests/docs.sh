#!/usr/bin/env bash
# Builds the site of README, docs/, examples/ and the API into build/site. A warning is an error, and so is
# a page that loads something from another computer. The site is built without a network where the system
# allows that. cpumoe need not be installed: its sources are read.
#
#   bash tests/docs.sh               installs MkDocs first, in an environment of its own; half a minute
#   bash tests/docs.sh ENVIRONMENT   uses an environment that has the dependency group docs
set -euo pipefail
cd "$(dirname "$0")/.."

if [[ $# -gt 0 ]]; then
    environment=$(realpath "$1")
else
    work=$(mktemp -d)
    trap 'rm -rf "$work"' EXIT
    environment=$work/docs
    python3 -m venv "$environment"
    "$environment/bin/python" -m pip install --quiet "pip>=25.1"
    "$environment/bin/python" -m pip install --quiet --no-compile --group docs
fi

offline=()
if unshare --map-root-user --net true 2>/dev/null; then
    offline=(unshare --map-root-user --net)
fi
# Signatures are formatted by the environment's ruff. The other variable silences an advertisement.
export PATH=$environment/bin:$PATH NO_MKDOCS_2_WARNING=1
"${offline[@]}" mkdocs build --strict

remote='<(script|img|iframe|source)[^>]* src="(https?:)?//|<link[^>]* href="(https?:)?//|url\(["'\'']?(https?:)?//|@import'
if [[ ! -f build/site/index.html ]]; then
    echo "build/site has no index.html" >&2
    exit 1
fi
if grep -rnoE --include='*.html' --include='*.css' "$remote" build/site; then
    echo "these parts of the site come from other computers" >&2
    exit 1
fi
echo "site: build/site/index.html"
