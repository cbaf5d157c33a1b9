"""Prints greedy tokens of a model as JSON, with facts about its routed experts.

python generate.py host FOLDER              transformers, with dense experts in fp32
python generate.py vllm FOLDER OPTIONS      vLLM; OPTIONS is a JSON object for vllm.LLM
"""

import json
import os
import sys

PROMPTS = [[1, 17, 300, 44, 5], [9, 8, 7], list(range(40, 100)), [411]]
NEW_TOKENS = 16


def host(folder: str) -> dict:
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(1)
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    )
    tokens = []
    for prompt in PROMPTS:
        made = model.generate(
            torch.tensor([prompt]),
            do_sample=False,
            min_new_tokens=NEW_TOKENS,
            max_new_tokens=NEW_TOKENS,
            suppress_tokens=[],
            eos_token_id=None,
        )
        tokens.append(made[0, len(prompt) :].tolist())
    return {"tokens": tokens}


def vllm(folder: str, options: dict) -> dict:
    import torch
    from facts import facts

    if "HOST_WITHOUT_AMX" in os.environ:  # vLLM then takes this CPU for one without
        torch.cpu._is_amx_tile_supported = lambda: False
    from vllm import LLM, SamplingParams

    llm = LLM(
        folder,
        max_model_len=256,
        max_num_seqs=8,
        max_num_batched_tokens=256,
        kv_cache_memory_bytes=64 << 20,
        **{"dtype": "float32", "enforce_eager": True, "enable_prefix_caching": False, **options},
    )
    sampling = SamplingParams(
        temperature=0,
        max_tokens=NEW_TOKENS,
        min_tokens=NEW_TOKENS,
        ignore_eos=True,
        detokenize=False,
    )
    outputs = llm.generate(
        [{"prompt_token_ids": prompt} for prompt in PROMPTS], sampling, use_tqdm=False
    )
    tokens = [list(output.outputs[0].token_ids) for output in outputs]
    return {"tokens": tokens, "workers": llm.apply_model(facts)}


if __name__ == "__main__":
    os.environ.setdefault("VLLM_ALLOW_INSECURE_SERIALIZATION", "1")
    which, folder = sys.argv[1:3]
    result = host(folder) if which == "host" else vllm(folder, json.loads(sys.argv[3]))
    print("RESULT", json.dumps(result))
