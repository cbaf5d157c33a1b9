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
SERVED = "qwen3_moe-int4"
PROCESSES = {"VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
ONE = {**PROCESSES, "VLLM_CPU_OMP_THREADS_BIND": "0,1"}
TWO = {**PROCESSES, "VLLM_CPU_OMP_THREADS_BIND": "0|1"}
ALONE = {"VLLM_PLUGINS": "none"}
WITHOUT_AMX = {"HOST_WITHOUT_AMX": "1"}
IN_TWO = {"tensor_parallel_size": 2}
COMPILED = {"enforce_eager": False}
BF16 = {"dtype": "bfloat16"}
OFF = {"additional_config": {"cpumoe": {"enabled": False}}}


class Case(NamedTuple):
    """A run: the model, options of vllm.LLM, variables, and what it must equal."""

    model: str
    options: dict = {}  # noqa: RUF012
    environment: dict = {}  # noqa: RUF012
    ours: bool = True
    equal: int = 64  # tokens that must be equal
    to: str = "host"  # transformers with dense fp32 experts; or vllm: these in vLLM without cpumoe
    refusal: str = ""  # what vLLM must say if it refuses the model


CASES = {
    "gpt-oss": Case("gpt_oss-mxfp4"),
    "gpt-oss without AMX": Case("gpt_oss-mxfp4", {}, WITHOUT_AMX),
    "gpt-oss without AMX and cpumoe": Case(
        *("gpt_oss-mxfp4", BF16, {**WITHOUT_AMX, **ALONE}),
        ours=False,
        refusal="No MXFP4 MoE backend supports the deployment configuration",
    ),
    "gpt-oss compiled": Case("gpt_oss-mxfp4", COMPILED),
    "gpt-oss in two ranks": Case("gpt_oss-mxfp4", IN_TWO, TWO),
    "gpt-oss, experts in two ranks": Case(
        "gpt_oss-mxfp4", {**IN_TWO, "enable_expert_parallel": True}, TWO
    ),
    "int4": Case("qwen3_moe-int4"),
    "int4 in two ranks": Case("qwen3_moe-int4", IN_TWO, TWO),
    # vLLM takes no fp32 with its FP8. In bf16, a token may have other experts.
    "fp8": Case("qwen3_moe-fp8", BF16, equal=32),
    "fp8 rows": Case("qwen3_moe-fp8-rows", BF16, equal=32),
    "nvfp4": Case("qwen3_moe-nvfp4"),
    "mxfp4": Case("qwen3_moe-mxfp4"),
    "bf16": Case("qwen3_moe-bf16"),
    "bf16 compiled": Case("qwen3_moe-bf16", COMPILED),
    "bf16 in two ranks": Case("qwen3_moe-bf16", IN_TWO, TWO),
    "bf16, experts in two ranks": Case(
        "qwen3_moe-bf16", {**IN_TWO, "enable_expert_parallel": True}, TWO
    ),
    # This model departs from transformers as the context grows, in vLLM alone as well.
    "kimi": Case("kimi-int4", to="vllm"),
    "kimi without cpumoe": Case(
        *("kimi-int4", {}, ALONE), ours=False, refusal="No WNA16 MoE backend supports"
    ),
    "a worker on two CPUs": Case("gpt_oss-mxfp4", {}, ONE),
    "disabled": Case("qwen3_moe-bf16", OFF, ours=False),
    "no plugin": Case("qwen3_moe-bf16", {}, ALONE, ours=False),
}


def run(which: str, folder: Path, options: dict, environment: dict, log: Path) -> dict | None:
    """Returns what generate.py prints, or None if it fails."""
    command = [sys.executable, str(HERE / "generate.py"), which, str(folder), json.dumps(options)]
    path = os.pathsep.join([str(HERE), os.environ.get("PYTHONPATH", "")])  # workers import facts.py
    variables = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "PYTHONPATH": path, **environment}
    variables["TORCH_LOGS"] = "graph_breaks"
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


def problems(case: Case, result: dict | None, expected: dict | None, log: str) -> list[str]:
    """Returns what is wrong with a run."""
    if case.refusal:
        refused = result is None and case.refusal in log
        return [] if refused else [f"vLLM did not refuse it with {case.refusal!r}"]
    if result is None:
        return ["it failed"]
    if expected is None:
        return ["there is nothing to compare it with"]
    found = []
    if "graph break in" in log.lower():  # as TORCH_LOGS=graph_breaks has it
        found.append("the compiler broke its graph")
    equal = equal_tokens(result, expected)
    if equal < case.equal:
        found.append(f"{equal} of 64 tokens are equal")
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


def equal_tokens(one: dict, other: dict) -> int:
    """Returns how many tokens are equal, each sequence up to its first difference."""
    count = 0
    for mine, theirs in zip(one["tokens"], other["tokens"], strict=True):
        equal = [ours == other for ours, other in zip(mine, theirs, strict=True)]
        count += [*equal, False].index(False)
    return count


def memory(folder: Path) -> list[str]:
    """Compares the greatest memory of a process with vLLM's alone, for 0.8 GB of experts."""
    peaks = {}
    for name, environment in (("cpumoe", {}), ("vLLM", ALONE)):
        log = folder / f"memory {name}.log"
        result = run("vllm", folder / "large-bf16" / "native", BF16, environment, log)
        if result is None:
            return [f"{name} failed: {log.read_text()[-2000:]}"]
        peaks[name] = max(worker["peak"] for worker in result["workers"]) >> 20
    print(f"memory at most: {peaks} MiB", flush=True)
    # cpumoe's libraries and threads take ten MiB.
    return [] if peaks["cpumoe"] <= peaks["vLLM"] + 32 else [f"{peaks} MiB"]


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
    references: dict[tuple[str, str], dict | None] = {}
    for name, case in CASES.items():
        if chosen and name not in chosen:
            continue
        log = folder / f"{name}.log"
        key = (case.model, case.to)
        if not case.refusal and key not in references:
            dense = folder / case.model / "dense"
            references[key] = run(case.to, dense, {}, ALONE, folder / f"{' '.join(key)}.log")
        native = folder / case.model / "native"
        result = run("vllm", native, case.options, case.environment, log)
        found = problems(case, result, references.get(key), log.read_text())
        print(f"{name}: {'; '.join(found) or 'passed'}", flush=True)
        if found:
            failed += 1
            print(log.read_text()[-3000:])
    if not chosen or "memory" in chosen:
        found = memory(folder)
        print(f"memory: {'; '.join(found) or 'passed'}", flush=True)
        failed += bool(found)
    if not chosen or "server" in chosen:
        found = serve(folder / SERVED / "native", folder / "server.log")
        print(f"server: {'; '.join(found) or 'passed'}", flush=True)
        failed += bool(found)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), sys.argv[2:]))
