#!/usr/bin/env bash
# Runs the clients that people use, each as they use it, against `cpumoe serve` with the model that comes with
# cpumoe, and prints how many calls passed. The clients have an environment of their own; the server is the
# active virtual environment's, in which cpumoe is installed with its extras transformers and serve.
#
#   bash tests/clients.sh               installs the clients first; about three minutes
#   bash tests/clients.sh ENVIRONMENT   uses an environment that has them
set -euo pipefail
cd "$(dirname "$0")/clients"

work=$(mktemp -d)
server=
finish() {
    [[ -z $server ]] || kill "$server" 2>/dev/null || true
    rm -rf "$work"
}
trap finish EXIT

if [[ $# -gt 0 ]]; then
    clients=$(realpath "$1")
else
    clients=$work/clients
    python3 -m venv "$clients"
    "$clients/bin/python" -m pip install --quiet -c ../../constraints.txt -r requirements.txt
fi
if "$clients/bin/python" -c "import torch" 2>/dev/null; then
    echo "the clients' environment has PyTorch, which no client here needs" >&2
    exit 1
fi

: >"$work/serving"
python -m cpumoe serve --port 0 --quiet --chat-template chat_template.jinja >"$work/serving" &
server=$!
for _ in {1..240}; do
    read -r _ CPUMOE_MODEL _ address _ <"$work/serving" || true
    [[ -z ${address:-} ]] || break
    kill -0 "$server" || exit 1
    sleep 0.5
done
export CPUMOE_MODEL CPUMOE_URL=${address%/v1}

# What lm-evaluation-harness shall find, too: a text that fits the context.
export CPUMOE_TEXT=$work/text.txt CPUMOE_EVAL=$work/eval.json CPUMOE_TOKENIZER
held_out=$(python -c 'from cpumoe import embedded; print(embedded.held_out_path())')
CPUMOE_TOKENIZER=$(python -c 'from cpumoe import embedded; print(embedded.model_path())')
head --bytes 1500 "$held_out" >"$CPUMOE_TEXT"
python -m cpumoe eval --text "$CPUMOE_TEXT" --json >"$CPUMOE_EVAL"

# Nothing is asked of anybody but the server, nor told.
export HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 HF_HOME=$work/huggingface LITELLM_LOCAL_MODEL_COST_MAP=True
export LANGSMITH_TRACING=false NO_PROXY=127.0.0.1 TOKENIZERS_PARALLELISM=false
unset PYTHONPATH OPENAI_API_KEY
"$clients/bin/python" -m pytest -q -p no:cacheprovider -W ignore "$PWD"
