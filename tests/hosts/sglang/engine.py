"""Runs SGLang's engine on the CPU with a tiny model, and compares what it generates.

python engine.py make FOLDER           writes the model, and its experts in MXFP4 beside it
python engine.py generate FOLDER NAME  prints greedy tokens; NAME is a row of RUNS
python engine.py compare FOLDER        runs all rows, each in a process of its own
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import torch

LAYERS, EXPERTS, TOP_K, HIDDEN, INTERMEDIATE, VOCABULARY = 3, 8, 2, 256, 128, 512
HEADS, HEAD = 4, 64
PROMPTS = [[1, 17, 300, 44, 5], [9, 8, 7], list(range(40, 120)), [511]]
NEW_TOKENS = 24
HERE = Path(__file__).parent

PERMUTED = [5, 2, 7, 0, 3, 6, 1, 4]
KT = {"kt_method": "MXFP4", "kt_cpuinfer": 2, "kt_threadpool_count": 1}
MAP = json.dumps({"physical_to_logical_map": [PERMUTED] * LAYERS})
# Options of the engine, and what its tokens must equal. A row "oracle" uses oracle/kt_kernel.
RUNS = {
    "native": ({}, None),
    "all on the CPU": ({**KT, "kt_num_gpu_experts": 0}, "native"),
    "hybrid": ({**KT, "kt_num_gpu_experts": 4}, "native"),
    "permuted": ({**KT, "kt_num_gpu_experts": 4, "init_expert_location": MAP}, "native"),
    "oracle": ({**KT, "kt_num_gpu_experts": 4, "kt_max_deferred_experts_per_token": 1}, None),
    "deferral": (
        {**KT, "kt_num_gpu_experts": 4, "kt_max_deferred_experts_per_token": 1},
        "oracle",
    ),
}


def make(folder: Path) -> None:
    """Writes a Qwen3-MoE whose experts are exact in bf16 and in MXFP4."""
    from safetensors.torch import save_file

    from cpumoe import open_checkpoint, weight_format
    from cpumoe.models import find_model
    from cpumoe.models.synth import write_checkpoint

    experts, model = folder / "experts", folder / "model"
    experts.mkdir(parents=True)
    model.mkdir()
    sizes = {"hidden": HIDDEN, "intermediate": INTERMEDIATE, "top_k": TOP_K}
    write_checkpoint(experts, find_model("v4-flash"), layers=LAYERS, experts=EXPERTS, **sizes)
    config = json.loads((experts / "config.json").read_text())
    (experts / "config.json").write_text(json.dumps({**config, "swiglu_limit": None}))
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int, std: float = 0.08) -> torch.Tensor:
        return (torch.randn(shape, generator=generator) * std).bfloat16()

    # Embeddings and attention are as small as the experts' output, so that experts matter.
    tensors = {
        "model.embed_tokens.weight": normal(VOCABULARY, HIDDEN, std=0.01),
        "model.norm.weight": torch.ones(HIDDEN).bfloat16(),
        "lm_head.weight": normal(VOCABULARY, HIDDEN),
    }
    fmt = weight_format("mxfp4")
    with open_checkpoint(experts) as reader:
        for layer in range(LAYERS):
            prefix = f"model.layers.{layer}"
            for norm in ("input_layernorm", "post_attention_layernorm"):
                tensors[f"{prefix}.{norm}.weight"] = torch.ones(HIDDEN).bfloat16()
            for norm in ("q_norm", "k_norm"):
                tensors[f"{prefix}.self_attn.{norm}.weight"] = torch.ones(HEAD).bfloat16()
            for name in ("q_proj", "k_proj", "v_proj"):
                tensors[f"{prefix}.self_attn.{name}.weight"] = normal(HEADS * HEAD, HIDDEN)
            tensors[f"{prefix}.self_attn.o_proj.weight"] = normal(HIDDEN, HEADS * HEAD, std=5e-4)
            tensors[f"{prefix}.mlp.gate.weight"] = normal(EXPERTS, HIDDEN)
            for expert in range(EXPERTS):
                weights = reader.expert(layer, expert)
                for name in ("gate", "up", "down"):
                    matrix = getattr(weights, name)
                    dense = fmt.dequantize(matrix.codes, matrix.scales)
                    assert torch.equal(dense.bfloat16().float(), dense)
                    key = f"{prefix}.mlp.experts.{expert}.{name}_proj.weight"
                    tensors[key] = dense.bfloat16()
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    (model / "config.json").write_text(json.dumps(qwen_config()))


def qwen_config() -> dict[str, object]:
    return {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "vocab_size": VOCABULARY,
        "hidden_size": HIDDEN,
        "intermediate_size": 2 * HIDDEN,
        "moe_intermediate_size": INTERMEDIATE,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": HEADS,
        "head_dim": HEAD,
        "num_experts": EXPERTS,
        "num_experts_per_tok": TOP_K,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "norm_topk_prob": True,
        "hidden_act": "silu",
        "max_position_embeddings": 1024,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "attention_bias": False,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "bos_token_id": 0,
        "eos_token_id": VOCABULARY + 1,
    }


def generate(folder: Path, name: str) -> list[list[int]]:
    """Returns the greedy tokens for each prompt."""
    import sglang

    options, _ = RUNS[name]
    if options:
        options = {"kt_weight_path": str(folder / "experts"), **options}
    engine = sglang.Engine(
        model_path=str(folder / "model"),
        device="cpu",
        # Rounding to bf16 would decide between tokens that are nearly equally probable.
        dtype="float32",
        attention_backend="torch_native",
        disable_cuda_graph=True,
        skip_tokenizer_init=True,
        disable_radix_cache=True,
        mem_fraction_static=0.1,
        max_total_tokens=2048,
        log_level="warning",
        **options,
    )
    sampling = {"temperature": 0, "max_new_tokens": NEW_TOKENS, "ignore_eos": True}
    # One prompt at a time: the experts that are deferred depend on the batch.
    outputs = [engine.generate(input_ids=prompt, sampling_params=sampling) for prompt in PROMPTS]
    engine.shutdown()
    return [output["output_ids"] for output in outputs]


def compare(folder: Path) -> int:
    """Runs every row in a process of its own; returns how many differ."""
    tokens, failed = {}, 0
    for name, (_, like) in RUNS.items():
        env = dict(os.environ)
        if name == "oracle":
            path = (env["PYTHONPATH"], str(HERE / "oracle"))
            env |= {"PYTHONPATH": os.pathsep.join(path), "CPUMOE_SGLANG": "0"}
        done = subprocess.run(
            [sys.executable, __file__, "generate", str(folder), name],
            env=env,
            stdout=subprocess.PIPE,
            text=True,
            timeout=1800,
            check=False,
        )
        if done.returncode:
            print(f"FAIL {name}: exit status {done.returncode}", flush=True)
            failed += 1
            continue
        tokens[name] = json.loads(done.stdout.splitlines()[-1])
        equal = like is None or tokens[name] == tokens.get(like)
        failed += not equal
        suffix = "" if like is None else f": the tokens of {like}" if equal else f": not {like}'s"
        print(f"{'PASS' if equal else 'FAIL'} {name}{suffix}", flush=True)
    if tokens.get("oracle") == tokens.get("native"):
        print("FAIL deferral changes no token, so it was not tested")
        failed += 1
    return failed


if __name__ == "__main__":
    command, target = sys.argv[1], Path(sys.argv[2])
    if command == "make":
        make(target)
    elif command == "generate":
        print(json.dumps(generate(target, sys.argv[3])))
    else:
        sys.exit(compare(target))
