#!/usr/bin/env bash
# Installs each documented extra into an environment of its own and runs the commands of this extra there.
# Without the extra, these commands must say how to install it. Packages of the test environment are not there.
#
#   bash tests/extras.sh            builds the package first, from what build/ has of it
#   bash tests/extras.sh WHEEL      tests a built one; needs some 2 GB of disk, and two to three minutes
set -euo pipefail
cd "$(dirname "$0")/.."

export PIP_CONSTRAINT=$PWD/constraints.txt
. tests/server.sh

if [[ $# -gt 0 ]]; then
    wheel=$(realpath "$1")
else
    pip wheel --quiet --no-deps --wheel-dir "$work" .
    wheel=$(echo "$work"/cpumoe-*.whl)
fi
# In the folder of the sources, Python would import them instead of the installed package.
cd "$work"

passed=0
failed=0

environment() { # environment EXTRAS [BASE]: hard links to an environment with some of them, and what they add
    local name=${1//,/_} base=${2:-none}
    if [[ ! -d none ]]; then
        python3 -m venv none
        none/bin/python -m pip install --quiet "$wheel"
    fi
    if [[ $name != none ]]; then
        cp -al "$base" "$name"
        "$name/bin/python" -m pip install --quiet "$wheel[$1]"
    fi
    inside=$work/$name/bin/python
    expect 0 "No broken requirements" "$inside" -m pip check
}

cpumoe() { # runs a command in the current environment
    timeout 120 "$inside" -m cpumoe "$@"
}

expect() { # expect CODE TEXT COMMAND...: the command ends with the code, and prints the text
    local wanted=$1 text=$2 code=0
    shift 2
    "$@" >output 2>&1 </dev/null || code=$?
    if [[ $code == "$wanted" ]] && grep -qF -- "$text" output; then
        passed=$((passed + 1))
    else
        failed=$((failed + 1))
        echo "FAILED in $inside: $*: expected code $wanted and '$text', got code $code and:"
        tail -n 20 output
    fi
}

ask() { # ask [URL]: a question from a pipe; says whether there is an answer
    local answer
    answer=$(echo "In the beginning" | cpumoe chat "$@" --max-tokens 8) || return
    [[ $answer != *[![:space:]]* ]] || echo "answered: $answer"
}

complete() { # complete URL: asks a server with the standard library, once for JSON
    "$inside" - "$1" <<'PYTHON'
import json, sys, urllib.request

def ask(path, body=None):
    data = None if body is None else json.dumps(body).encode()
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(f"{sys.argv[1]}/{path}", data, headers)
    return json.load(urllib.request.urlopen(request, timeout=60))

common = {"model": ask("models")["data"][0]["id"], "max_tokens": 4}
assert ask("completions", {**common, "prompt": "In the beginning"})["object"] == "text_completion"
chat = {"messages": [{"role": "user", "content": "Hello"}], "response_format": {"type": "json_object"}}
print(ask("chat/completions", {**common, **chat})["object"])
PYTHON
}

fetch() { # fetch URL
    "$inside" -c 'import sys, urllib.request as r; print(r.urlopen(sys.argv[1]).read().decode())' "$1"
}

missing() { # missing EXTRA COMMAND...: the command names the extra
    local extra=$1
    shift
    expect 2 "pip install \"cpumoe[$extra]\"" cpumoe "$@"
}

quick_bench() {
    cpumoe bench --model tiny --tokens 1 --seconds 0.01 --rounds 1 "$@"
}

echo "== no extra"
environment none
expect 0 "cpumoe " none/bin/cpumoe --version
expect 0 '"variants"' cpumoe info --json
expect 0 "mxfp4" cpumoe inspect v4-flash
expect 0 "cpumoe validate" cpumoe synth tiny --model v4-flash --layers 1 --experts 4 --hidden 64 --intermediate 32
expect 0 "generic" cpumoe validate tiny --isa generic --tokens 1
expect 0 "tokens" quick_bench
expect 0 "--kt-num-gpu-experts" cpumoe sglang v4-flash --dry-run
expect 0 "The small model cannot write here" cpumoe demo --experts 2 --hidden 64 --intermediate 32
missing plot bench --model tiny --plot plot.svg
missing transformers generate -p a
missing transformers eval
missing transformers chat
missing chat chat http://127.0.0.1:9
missing serve serve --port 0

echo "== plot"
environment plot
expect 0 "tokens" quick_bench --plot plot.svg
expect 0 "<svg" cat plot.svg

echo "== transformers"
environment transformers
expect 0 "In the beginning" cpumoe generate -p "In the beginning" --max-tokens 8
expect 0 '"completion_tokens"' cpumoe generate -p "Hello" --chat --max-tokens 4 --json
expect 0 "perplexity" cpumoe eval --max-tokens 32
expect 0 "answered: " ask
missing serve serve --port 0

echo "== serve, without a host for its model"
environment serve
missing transformers serve --port 0

echo "== serve,transformers, and chat in an environment of its own"
environment serve,transformers transformers
start_server "$inside"
expect 0 "chat.completion" complete "$url"
expect 0 "# TYPE" fetch "${url%/v1}/metrics"
environment chat
expect 0 "answered: " ask "$url"
missing transformers chat
lowest=$("$inside" -c '
import importlib.metadata as m, re
print(*(re.search(r"httpx2.*>=([0-9.]+)", r)[1] for r in m.requires("cpumoe") if "httpx2" in r))')
"$inside" -m pip install --quiet "httpx2==$lowest"
expect 0 "answered: " ask "$url"

echo "== transformers,serve,chat"
environment transformers,serve,chat serve_transformers
kill "$server"
code=0
wait "$server" || code=$?
expect 0 "ended with 0" echo "ended with $code"
start_server "$inside"
expect 0 "answered: " ask "$url"

echo "extras: $passed passed, $failed failed"
[[ $failed == 0 ]]
