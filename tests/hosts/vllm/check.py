"""Compares what vLLM generates with cpumoe's experts with what transformers generates.

python check.py FOLDER [NAME ...]    FOLDER has the models of models.py; NAME is a row of CASES
"""

import json
import os
import subprocess
import sys
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).parent
OURS = "CpumoeExpertsMethod"
FIRST = "qwen3_moe-int4"
PROCESSES = {"VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
ONE = {**PROCESSES, "VLLM_CPU_OMP_THREADS_BIND": "0,1"}
TWO = {**PROCESSES, "VLLM_CPU_OMP_THREADS_BIND": "0|1"}


class Case(NamedTuple):
    """A run: the model, options of vllm.LLM, variables, and what it must equal."""

    model: str
    options: dict = {}  # noqa: RUF012
    environment: dict = {}  # noqa: RUF012
    ours: bool = True
    equal: bool = True  # as transformers with dense fp32 experts


CASES = {
    "gpt-oss": Case("gpt_oss-mxfp4"),
    "gpt-oss compiled": Case("gpt_oss-mxfp4", {"enforce_eager": False}),
    "gpt-oss in two ranks": Case("gpt_oss-mxfp4", {"tensor_parallel_size": 2}, TWO),
    "gpt-oss, experts in two ranks": Case(
        "gpt_oss-mxfp4", {"tensor_parallel_size": 2, "enable_expert_parallel": True}, TWO
    ),
    "int4": Case(FIRST),
    "int4 in two ranks": Case(FIRST, {"tensor_parallel_size": 2}, TWO),
    # vLLM takes no fp32 with its FP8.
    "fp8": Case("qwen3_moe-fp8", {"dtype": "bfloat16"}, equal=False),
    "fp8 rows": Case("qwen3_moe-fp8-rows", {"dtype": "bfloat16"}, equal=False),
    "nvfp4": Case("qwen3_moe-nvfp4"),
    "mxfp4": Case("qwen3_moe-mxfp4"),
    "bf16": Case("qwen3_moe-bf16"),
    "bf16 compiled": Case("qwen3_moe-bf16", {"enforce_eager": False}),
    "bf16 in two ranks": Case("qwen3_moe-bf16", {"tensor_parallel_size": 2}, TWO),
    "kimi": Case("kimi-int4", {"dtype": "bfloat16"}, equal=False),
    "a worker on two CPUs": Case("gpt_oss-mxfp4", {}, ONE),
    "disabled": Case(
        FIRST, {"additional_config": {"cpumoe": {"enabled": False}}}, ours=False, equal=False
    ),
    "no plugin": Case(FIRST, {}, {"VLLM_PLUGINS": "none"}, ours=False, equal=False),
}


def run(which: str, folder: Path, options: dict, environment: dict, log: Path) -> dict | None:
    """Returns what generate.py prints, or None if it fails."""
    command = [sys.executable, str(HERE / "generate.py"), which, str(folder), json.dumps(options)]
    path = os.pathsep.join([str(HERE), os.environ.get("PYTHONPATH", "")])  # workers import facts.py
    variables = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "PYTHONPATH": path, **environment}
    with log.open("w") as out:
        subprocess.run(
            command,
            env={**os.environ, **variables},
            stdout=out,
            stderr=subprocess.STDOUT,
            timeout=600,
            check=False,
        )
    rows = [line for line in log.read_text().splitlines() if line.startswith("RESULT ")]
    return json.loads(rows[-1].removeprefix("RESULT ")) if rows else None


def problems(case: Case, result: dict | None, expected: dict) -> list[str]:
    """Returns what is wrong with a run."""
    if result is None:
        # vLLM may refuse a model that cpumoe does not compute.
        return [] if not case.ours else ["it failed"]
    found = []
    equal = sum(
        ours == theirs
        for mine, other in zip(result["tokens"], expected["tokens"], strict=True)
        for ours, theirs in zip(mine, other, strict=True)
    )
    count = sum(map(len, expected["tokens"]))
    if case.equal and equal != count:
        found.append(f"{equal} of {count} tokens are equal")
    for worker in result["workers"]:
        methods = set(worker["methods"].values())
        if case.ours != all(OURS in method for method in methods) or not methods:
            found.append(f"experts have {methods}")
        if case.ours and worker["parameters"]:
            found.append(f"tensors of experts are left: {worker['parameters']}")
        if case.ours and not worker["calls"]:
            found.append("cpumoe computed nothing")
        cpus = worker.get("cpus")
        if case.ours and "VLLM_CPU_OMP_THREADS_BIND" in case.environment:
            bound = sorted({cpu for threads in worker["threads"].values() for cpu in threads})
            if not cpus or bound != sorted(cpus):
                found.append(f"threads run on {bound}, and vLLM gave {cpus}")
    return found


def serve(folder: Path, log: Path) -> list[str]:
    """Starts the server, and returns what is wrong with four answers at once."""
    port = "18573"
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder)]
    command += ["--port", port, "--enforce-eager", "--dtype", "float32", "--max-model-len", "256"]
    command += ["--kv-cache-memory-bytes", str(64 << 20), "--served-model-name", "tiny"]

    def ask(index: int) -> str:
        body = {"model": "tiny", "prompt": [5, 6, index], "max_tokens": 8, "temperature": 0}
        request = urllib.request.Request(
            f"http://127.0.0.1:{port}/v1/completions",
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=120) as answer:
            return json.load(answer)["choices"][0]["text"]

    with log.open("w") as out:
        server = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT)
        try:
            for _ in range(300):
                if server.poll() is not None:
                    return ["the server ended"]
                try:
                    urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5)
                    break
                except OSError:
                    time.sleep(1)
            with ThreadPoolExecutor(4) as pool:
                together = list(pool.map(ask, range(4)))
            alone = [ask(index) for index in range(4)]
            return [] if together == alone else [f"{together} together, {alone} one by one"]
        finally:
            server.terminate()
            server.wait(timeout=60)


def main(folder: Path, chosen: list[str]) -> int:
    failed = 0
    expected: dict[str, dict] = {}
    for name, case in CASES.items():
        if chosen and name not in chosen:
            continue
        log = folder / f"{name}.log"
        if case.model not in expected:
            dense = run("host", folder / case.model / "dense", {}, {}, log)
            assert dense is not None, log.read_text()[-2000:]
            expected[case.model] = dense
        options, environment = case.options, case.environment
        result = run("vllm", folder / case.model / "native", options, environment, log)
        found = problems(case, result, expected[case.model])
        print(f"{name}: {'; '.join(found) or 'passed'}", flush=True)
        if found:
            failed += 1
            print(log.read_text()[-3000:])
    if not chosen or "server" in chosen:
        found = serve(folder / FIRST / "native", folder / "server.log")
        print(f"server: {'; '.join(found) or 'passed'}", flush=True)
        failed += bool(found)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), sys.argv[2:]))
