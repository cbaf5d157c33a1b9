"""Writes a trained model as a DeepSeek-V4 checkpoint folder, with its perplexity.

The names are the published checkpoint's; routed experts become MXFP4, attention and the shared
expert FP8 in blocks of 128x128, the rest bfloat16 or float32.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from architecture import QUANTIZATION, build
from chat import BOS, END, EOS, PAD
from corpus import HOLD_OUT_EVERY, excerpt
from data import save_tokenizer
from evaluate import perplexity
from quantization import as_exported, kind, quantize_fp8
from tokenizers import Tokenizer
from train import STATE, architecture, prepare
from transformers import AutoModelForCausalLM

from cpumoe.checkpoint.writer import CheckpointWriter, TensorSpec
from cpumoe.formats import QuantizedMatrix, weight_format
from cpumoe.models import find_model
from cpumoe.models.synth_layout import Piece, Sizes
from cpumoe.models.synth_layouts import DeepseekV4Layout

# transformers' names -> the published checkpoint's, applied in this order.
_RENAMES = (
    (r"^model\.", ""),
    (r"^embed_tokens\.", "embed."),
    (r"^lm_head\.", "head."),
    (r"^hc_head\.hc_", "hc_head_"),
    (r"\.(attn|ffn)_hc\.(fn|base|scale)$", r".hc_\1_\2"),
    (r"\.input_layernorm\.", ".attn_norm."),
    (r"\.post_attention_layernorm\.", ".ffn_norm."),
    (r"\.self_attn\.compressor\.indexer\.q_b_proj\.", ".attn.indexer.wq_b."),
    (r"\.self_attn\.compressor\.indexer\.scorer\.", ".attn.indexer."),
    (r"\.self_attn\.compressor\.indexer\.", ".attn.indexer.compressor."),
    (r"\.self_attn\.", ".attn."),
    (r"\.attn\.sinks$", ".attn.attn_sink"),
    (r"\.compressor\.kv_norm\.", ".compressor.norm."),
    (r"\.position_bias$", ".ape"),
    (r"\.q_a_norm\.", ".q_norm."),
    (r"\.(q_a|q_b|kv|o_a|o_b)_proj\.", r".w\1."),
    (r"\.compressor\.gate_proj\.", ".compressor.wgate."),
    (r"\.mlp\.", ".ffn."),
    (r"\.gate\.e_score_correction_bias$", ".gate.bias"),
    (r"\.shared_experts\.gate_proj\.", ".shared_experts.w1."),
    (r"\.shared_experts\.up_proj\.", ".shared_experts.w3."),
    (r"\.shared_experts\.down_proj\.", ".shared_experts.w2."),
)


def native_name(name: str) -> str:
    """Returns the published checkpoint's name of one of transformers' parameters or buffers."""
    for pattern, replacement in _RENAMES:
        name = re.sub(pattern, replacement, name)
    return name


def tensors(state: dict[str, torch.Tensor], layout: DeepseekV4Layout) -> Iterator[Piece]:
    """Yields every tensor of the checkpoint."""
    for name, value in state.items():
        stored, native = kind(name), native_name(name)
        if stored == "fp4":
            if name.endswith(".gate_up_proj"):
                down = state[name.replace("gate_up_proj", "down_proj")]
                yield from _experts(value, down, int(name.split(".")[2]), layout)
        elif stored == "fp8":
            codes, scales = quantize_fp8(value)
            yield native, 0, codes
            yield native.removesuffix(".weight") + ".scale", 0, scales
        elif native.endswith(".tid2eid"):
            yield native, 0, value
        else:
            yield native, 0, value.bfloat16() if stored == "bf16" else value.float()


def _experts(
    gate_up: torch.Tensor, down: torch.Tensor, layer: int, layout: DeepseekV4Layout
) -> Iterator[Piece]:
    fmt = weight_format("mxfp4")
    for index in range(gate_up.shape[0]):
        matrices = [*gate_up[index].chunk(2), down[index]]
        quantized = [QuantizedMatrix(*fmt.quantize(matrix)) for matrix in matrices]
        yield from layout.expert(layer, index, quantized, torch.Generator())


def write(
    folder: Path, state: dict[str, torch.Tensor], sizes: dict[str, Any], tokenizer: Tokenizer
) -> None:
    """Writes config.json and model.safetensors."""
    folder.mkdir(parents=True, exist_ok=True)
    layout = DeepseekV4Layout(
        dataclasses.replace(
            find_model("v4-flash"),
            extra={"vocab_size": sizes["vocab_size"], "num_hash_layers": sizes["num_hash_layers"]},
        ),
        Sizes(
            layers=sizes["num_hidden_layers"],
            experts=sizes["n_routed_experts"],
            hidden=sizes["hidden_size"],
            intermediate=sizes["moe_intermediate_size"],
            top_k=sizes["num_experts_per_tok"],
        ),
    )
    pieces = {name: tensor for name, _, tensor in tensors(state, layout)}
    specs = [TensorSpec(name, t.dtype, tuple(t.shape)) for name, t in pieces.items()]
    config = {**sizes, **token_ids(tokenizer), "quantization_config": QUANTIZATION}
    with CheckpointWriter(folder, specs, config, max_shard_bytes=1 << 30) as writer:
        for name, tensor in pieces.items():
            writer.write(name, tensor)


def token_ids(tokenizer: Tokenizer) -> dict[str, Any]:
    """Returns the special tokens' entries of a config; a text ends with EOS, a turn with END."""
    return {
        "bos_token_id": tokenizer.token_to_id(BOS),
        "eos_token_id": [tokenizer.token_to_id(EOS), tokenizer.token_to_id(END)],
        "pad_token_id": tokenizer.token_to_id(PAD),
    }


def write_companions(folder: Path, tokenizer: Tokenizer, context: int) -> None:
    """Writes the tokenizer, the chat template and the generation defaults."""
    save_tokenizer(tokenizer, folder, context)
    generation = {
        **token_ids(tokenizer),
        "do_sample": True,
        "temperature": 0.7,
        "top_k": 50,
        "top_p": 0.95,
        "max_new_tokens": 200,
    }
    text = json.dumps(generation, indent=2) + "\n"
    (folder / "generation_config.json").write_text(text, encoding="utf-8")


def evaluate(
    state: dict[str, Any], folder: Path, texts: dict[str, list[str]], tokenizer: Tokenizer
) -> list[str]:
    """Returns and prints rows of a table: perplexity before and after export."""
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    sizes = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    context = sizes["max_position_embeddings"]
    model = build({k: v for k, v in sizes.items() if k != "quantization_config"}, 0)
    model.load_state_dict(state["model"])
    rows = []
    for name, chapters in texts.items():
        results = [perplexity(model, tokenizer, chapters, context)]
        with as_exported(model):
            results.append(perplexity(model, tokenizer, chapters, context))
        results.append(perplexity(loaded, tokenizer, chapters, context))
        cells = [f"{ppl:.2f} ({bits:.3f})" for ppl, bits in results]
        rows.append(f"| {' | '.join([name, *cells])} |")
        print(rows[-1], flush=True)
    return rows


def write_card(folder: Path, state: dict[str, Any], rows: list[str]) -> None:
    """Writes the model's README.md."""
    card = (Path(__file__).parent / "model_card.md").read_text(encoding="utf-8")
    values = {
        "STEPS": f"{state['step']:,}",
        "TOKENS": f"{state['tokens'] / 1e6:.1f}",
        "MINUTES": f"{state['seconds'] / 60:.0f}",
        "PERPLEXITIES": "\n".join(rows),
    }
    for key, value in values.items():
        card = card.replace(key, value)
    (folder / "README.md").write_text(card, encoding="utf-8")


def main() -> None:
    """Exports and evaluates."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True, help="train.py's folder")
    parser.add_argument("--out", type=Path, required=True, help="the folder cpumoe/embedded")
    parser.add_argument("--text", type=Path, help="as given to train.py")
    parser.add_argument("--architecture", type=Path, help="as given to train.py")
    options = parser.parse_args()
    sizes = architecture(options.architecture)
    tokenizer, train, held_out = prepare(options)
    state = torch.load(options.work / STATE)
    folder = options.out / "model"
    write(folder, state["model"], sizes, tokenizer)
    write_companions(folder, tokenizer, sizes["max_position_embeddings"])
    (options.out / "held_out.txt").write_text(excerpt(held_out), encoding="utf-8")
    texts = {
        "trained on (every 50th chapter)": [chapter.text for chapter in train[::HOLD_OUT_EVERY]],
        "held out (all of it)": [chapter.text for chapter in held_out],
        "held_out.txt": excerpt(held_out).strip().split("\n\n"),
    }
    write_card(folder, state, evaluate(state, folder, texts, tokenizer))


if __name__ == "__main__":
    main()
