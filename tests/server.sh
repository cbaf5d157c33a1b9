# For scripts that start `cpumoe serve`: a temporary folder, and a server that ends with the script.
work=$(mktemp -d)
server=
finish() {
    [[ -z $server ]] || kill "$server" 2>/dev/null || true
    rm -rf "$work"
}
trap finish EXIT
# A key or a variant of the caller would change what is tested.
unset PYTHONPATH OPENAI_API_KEY CPUMOE_API_KEY

start_server() { # start_server PYTHON [OPTION...]: starts a server; sets the name of its model, and its url
    local python=$1 line=
    shift
    rm -f "$work/serving"
    "$python" -m cpumoe serve --port 0 "$@" >"$work/serving" 2>"$work/server.log" &
    server=$!
    for _ in {1..240}; do
        line=$(grep '^serving ' "$work/serving" 2>/dev/null || true)
        if [[ -n $line ]]; then
            read -r _ model _ url _ <<<"$line"
            return 0
        fi
        kill -0 "$server" 2>/dev/null || break
        sleep 0.5
    done
    cat "$work/server.log" >&2
    exit 1
}
