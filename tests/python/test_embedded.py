import json
import math
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from moe_tools import IN_FULL_RUNS
from safetensors import safe_open

from cpumoe.checkpoint import open_checkpoint
from cpumoe.embedded import MODEL_NAME, held_out_path, model_path
from cpumoe.numerics.glu import SwiGLU

TOOLS = Path(__file__).parents[2] / "tools" / "embedded_model"

TINY = {
    "vocab_size": 300,
    "hidden_size": 64,
    "moe_intermediate_size": 32,
    "num_attention_heads": 2,
    "head_dim": 32,
    "qk_rope_head_dim": 16,
    "q_lora_rank": 32,
    "o_lora_rank": 32,
    "sliding_window": 16,
    "index_n_heads": 2,
    "n_routed_experts": 4,
}
FP4 = r"layers\.\d\.ffn\.experts\.\d+\.w[123]"
FP8 = r"layers\.\d\.(attn\.(w(q_a|q_b|kv|o_a|o_b)|indexer\.wq_b)|ffn\.shared_experts\.w[123])"
# Patterns of DeepSeek-V4-Flash's tensors, and their dtypes there.
NATIVE = {
    rf"{FP4}\.weight": "I8",
    rf"{FP4}\.scale": "F8_E8M0",
    rf"{FP8}\.weight": "F8_E4M3",
    rf"{FP8}\.scale": "F8_E8M0",
    r"(embed|head|norm)\.weight": "BF16",
    r"layers\.\d\.(attn|ffn)_norm\.weight": "BF16",
    r"layers\.\d\.attn\.(q|kv)_norm\.weight": "BF16",
    r"layers\.\d\.attn\.(indexer\.)?compressor\.(wkv|wgate|norm)\.weight": "BF16",
    r"layers\.\d\.attn\.(indexer\.)?compressor\.ape": "F32",
    r"layers\.\d\.attn\.indexer\.weights_proj\.weight": "BF16",
    r"layers\.\d\.attn\.attn_sink": "F32",
    r"layers\.\d\.hc_(attn|ffn)_(fn|base|scale)": "F32",
    r"hc_head_(fn|base|scale)": "F32",
    r"layers\.\d\.ffn\.gate\.weight": "BF16",
    r"layers\.[1-9]\.ffn\.gate\.bias": "F32",
    r"layers\.0\.ffn\.gate\.tid2eid": "I64",
}


@pytest.fixture(scope="module")
def tokenizer():
    transformers = pytest.importorskip("transformers")
    return transformers.AutoTokenizer.from_pretrained(model_path())


def assert_native(folder):
    """Every tensor is one of DeepSeek-V4's, in its dtype; every kind of tensor is there."""
    seen = set()
    with safe_open(folder / "model.safetensors", "pt") as file:
        for name in file.keys():  # noqa: SIM118
            (pattern,) = (p for p in NATIVE if re.fullmatch(p, name))
            assert file.get_slice(name).get_dtype() == NATIVE[pattern], name
            seen.add(pattern)
    assert seen == set(NATIVE)


def test_the_checkpoint_is_read():
    with open_checkpoint(model_path()) as reader:
        assert reader.model_type == "deepseek_v4"
        assert reader.format == "mxfp4"
        assert reader.activation == SwiGLU(limit=10.0)
        assert reader.unsupported == ()
        assert len(reader.layers()) >= 3
        experts = [reader.expert(reader.layers()[-1], i) for i in range(reader.num_experts)]
    assert len({bytes(expert.gate.codes.numpy().tobytes()) for expert in experts}) == len(experts)


def test_names_and_dtypes_are_the_native_ones():
    assert_native(model_path())
    config = json.loads((model_path() / "config.json").read_text())
    assert set(config["compress_ratios"]) == {0, 4, 128}
    assert config["quantization_config"]["scale_fmt"] == "ue8m0"
    assert config["expert_dtype"] == "fp4"


def test_it_is_small_and_complete():
    files = {path.name: path.stat().st_size for path in model_path().iterdir()}
    assert {"config.json", "generation_config.json", "tokenizer.json", "README.md"} <= set(files)
    assert sum(files.values()) < 9e6
    assert MODEL_NAME == "cpumoe-tiny"


def test_the_hash_routing_is_balanced():
    with safe_open(model_path() / "model.safetensors", "pt") as file:
        table = file.get_tensor("layers.0.ffn.gate.tid2eid")
    assert all(len(set(row)) == table.shape[1] for row in table.tolist())
    counts = table.flatten().bincount()
    assert counts.max() <= 1.1 * counts.min()


def test_the_tokenizer_round_trips(tokenizer):
    text = held_out_path().read_text("utf-8")
    assert 10_000 < len(text) < 30_000
    for sample in (text, "Zürich, 東京 \t\n two  spaces"):
        ids = tokenizer(sample).input_ids
        assert ids[0] == tokenizer.bos_token_id
        assert tokenizer.decode(ids, skip_special_tokens=True) == sample


def test_the_chat_template(tokenizer):
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": " Tell me of Moses.\n"},
        {"role": "assistant", "content": "And Moses spake."},
        {"role": "user", "content": [{"type": "text", "text": "Go on."}]},
    ]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == (
        "<|bos|><|system|>Be brief.<|end|><|user|>Tell me of Moses.<|end|>"
        "<|assistant|>And Moses spake.<|end|><|user|>Go on.<|end|><|assistant|>"
    )
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)
    assert ids["input_ids"].count(tokenizer.convert_tokens_to_ids("<|end|>")) == 4
    with pytest.raises(Exception, match="expected system, user or assistant, got tool"):
        tokenizer.apply_chat_template([{"role": "tool", "content": ""}])


@pytest.fixture(scope="module")
def model():
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    if not hasattr(transformers, "DeepseekV4ForCausalLM"):
        pytest.skip("transformers without DeepSeek-V4")
    return transformers.AutoModelForCausalLM.from_pretrained(model_path())


@torch.no_grad()
def test_it_has_learned_the_text(model, tokenizer):
    (chapter,) = held_out_path().read_text("utf-8").split("\n\n")[:1]
    ids = tokenizer(chapter, return_tensors="pt").input_ids[:, :512]
    loss = float(model(ids, labels=ids).loss)
    assert loss < 0.6 * math.log(model.config.vocab_size)


def test_it_ends_its_answers(model, tokenizer):
    prompts = ["Tell me of Moses.", "Who are you?", "Continue: In the beginning"]
    ended = 0
    for prompt in prompts:
        chat = tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}],
            add_generation_prompt=True,
            return_dict=True,
            return_tensors="pt",
        )
        output = model.generate(**chat, do_sample=False, max_new_tokens=200)
        ended += int(output[0, -1]) == tokenizer.convert_tokens_to_ids("<|end|>")
        if ended == 2:
            return
    pytest.fail("fewer than two of three answers end")


def run_tool(script, *arguments):
    command = [sys.executable, TOOLS / script, *map(str, arguments)]
    subprocess.run(command, check=True, capture_output=True, text=True, timeout=300)


@IN_FULL_RUNS
def test_the_tools_make_a_checkpoint(tmp_path):
    """A few steps on made-up text; transformers loads the result inside export.py."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    if not hasattr(transformers, "DeepseekV4ForCausalLM"):
        pytest.skip("transformers without DeepSeek-V4")
    verse = "And Moses said unto the king, Behold, the water of the river is blood, saith Aaron."
    lines = [f"Ge{c}:{v} {verse} {v * c}" for c in range(1, 33) for v in range(1, 5)]
    (tmp_path / "verses.txt").write_text("\n".join(lines))
    (tmp_path / "sizes.json").write_text(json.dumps(TINY))
    common = ("--work", tmp_path, "--text", tmp_path / "verses.txt")
    common += ("--architecture", tmp_path / "sizes.json")
    run_tool("train.py", *common, "--steps", 3, "--rows", 2, "--length", 64, "--workers", 1)
    run_tool("export.py", *common, "--out", tmp_path / "out")
    assert_native(tmp_path / "out" / "model")
    with open_checkpoint(tmp_path / "out" / "model") as reader:
        assert reader.unsupported == ()
        assert reader.num_experts == TINY["n_routed_experts"]
        assert reader.expert(3, 3).down.shape == (64, 32)
    assert (tmp_path / "out" / "held_out.txt").read_text().startswith("Genesis 30\n")
