#!/usr/bin/env bash
# Runs popular clients against `cpumoe serve`, which serves the model that comes with cpumoe, and prints how many
# calls passed. The clients have an environment of their own. The server runs in the active virtual environment,
# in which cpumoe is installed with its extras transformers and serve.
#
#   bash tests/clients.sh               installs the clients first; about three minutes
#   bash tests/clients.sh ENVIRONMENT   uses an environment that has them
set -euo pipefail
cd "$(dirname "$0")/clients"

. ../server.sh

if [[ $# -gt 0 ]]; then
    clients=$(realpath "$1")
else
    clients=$work/clients
    python3 -m venv "$clients"
    # Few of the modules are imported, once.
    "$clients/bin/python" -m pip install --quiet --no-compile -c ../../constraints.txt -r requirements.txt
fi
if "$clients/bin/python" -c "import torch" 2>/dev/null; then
    echo "the clients' environment has PyTorch, which no client here needs" >&2
    exit 1
fi

start_server python --quiet --chat-template chat_template.jinja
export CPUMOE_MODEL=$model CPUMOE_URL=${url%/v1}

# lm-evaluation-harness must find the same perplexity as `cpumoe eval`, for a text that fits the context.
export CPUMOE_TEXT=$work/text.txt CPUMOE_EVAL=$work/eval.json CPUMOE_TOKENIZER
held_out=$(python -c 'from cpumoe import embedded; print(embedded.held_out_path())')
CPUMOE_TOKENIZER=$(python -c 'from cpumoe import embedded; print(embedded.model_path())')
head --bytes 1500 "$held_out" >"$CPUMOE_TEXT"
python -m cpumoe eval --text "$CPUMOE_TEXT" --json >"$CPUMOE_EVAL"

# Clients talk to the server alone.
export HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 HF_HOME=$work/huggingface LITELLM_LOCAL_MODEL_COST_MAP=True
export LANGSMITH_TRACING=false NO_PROXY=127.0.0.1 TOKENIZERS_PARALLELISM=false
"$clients/bin/python" -m pytest -q -p no:cacheprovider -W ignore "$PWD"
