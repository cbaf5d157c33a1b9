"""Times vLLM with experts in cpumoe and with its own, in turn. Prints medians of all rounds.

python speed.py FOLDER [ROUNDS]    FOLDER is for a made-up model of 2.4 GB, unless it is there

The model has two layers of Qwen3-30B-A3B's sizes, in bf16. A round starts each kind once, as
users start it: its worker is a process of its own, with a thread on each CPU. Seconds of CPU are
those of all processes, and say more than seconds of time on a busy machine.
"""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

KINDS = {"cpumoe": {}, "vLLM": {"VLLM_PLUGINS": "none"}}
REPEATS = 3
# Name -> number of sequences, tokens of a prompt, new tokens.
WORK = {"decode 1": (1, 8, 24), "decode 8": (8, 8, 24), "prefill 256": (1, 256, 1)}


def write(folder: Path) -> None:
    import torch
    from models import _COMMON
    from transformers import AutoModelForCausalLM, Qwen3MoeConfig

    sizes = {"hidden_size": 2048, "num_attention_heads": 32, "num_key_value_heads": 4}
    sizes |= {"head_dim": 128, "num_experts_per_tok": 8}
    config = Qwen3MoeConfig(
        **{**_COMMON, **sizes}, moe_intermediate_size=768, num_experts=128, norm_topk_prob=True
    )
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)


def measure(folder: str) -> dict:
    import psutil
    from vllm import LLM, SamplingParams

    llm = LLM(
        folder,
        dtype="bfloat16",
        max_model_len=512,
        max_num_seqs=8,
        max_num_batched_tokens=512,
        kv_cache_memory_bytes=64 << 20,
        enforce_eager=True,
        enable_prefix_caching=False,
        skip_tokenizer_init=True,
    )

    def cpu_seconds() -> float:
        myself = psutil.Process()
        times = [process.cpu_times() for process in (myself, *myself.children(recursive=True))]
        return sum(time.user + time.system for time in times)

    def seconds(sequences: int, length: int, new: int) -> tuple[float, float]:
        sampling = SamplingParams(
            temperature=0, max_tokens=new, min_tokens=new, ignore_eos=True, detokenize=False
        )
        prompts = [
            {"prompt_token_ids": [(7 * i + 31 * j) % 500 + 3 for i in range(length)]}
            for j in range(sequences)
        ]
        start, cpu = time.perf_counter(), cpu_seconds()
        llm.generate(prompts, sampling, use_tqdm=False)
        return time.perf_counter() - start, cpu_seconds() - cpu

    measured = {}
    for name, work in WORK.items():
        seconds(*work)
        measured[name] = [seconds(*work) for _ in range(REPEATS)]
    return measured


def main(folder: Path, rounds: int) -> int:
    if not (folder / "config.json").exists():
        write(folder)
    found: dict[tuple[str, str], list] = {}
    for _ in range(rounds):
        for kind, variables in KINDS.items():
            cpus = ",".join(map(str, sorted(os.sched_getaffinity(0))))
            environment = {"VLLM_CPU_OMP_THREADS_BIND": cpus, **os.environ, **variables}
            command = [sys.executable, __file__, str(folder)]
            done = subprocess.run(
                *(command,),
                env={**environment, "MEASURE": "1"},
                capture_output=True,
                text=True,
                check=False,
            )
            rows = [row for row in done.stdout.splitlines() if row.startswith("MEASURED ")]
            if not rows:
                print(done.stderr[-3000:])
                return 1
            for name, pairs in json.loads(rows[-1].removeprefix("MEASURED ")).items():
                found.setdefault((name, kind), []).extend(pairs)
    for name in WORK:
        values = {
            kind: [median(column) for column in zip(*found[name, kind], strict=True)]
            for kind in KINDS
        }
        (wall, cpu), (their_wall, their_cpu) = values["cpumoe"], values["vLLM"]
        print(
            f"{name}: cpumoe {wall:.2f} s, {cpu:.2f} s of CPU; vLLM {their_wall:.2f} s, "
            f"{their_cpu:.2f} s of CPU; ratios {wall / their_wall:.2f}, {cpu / their_cpu:.2f}"
        )
    return 0


if __name__ == "__main__":
    if "MEASURE" in os.environ:
        print("MEASURED", json.dumps(measure(sys.argv[1])))
    else:
        sys.exit(main(Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 3))
