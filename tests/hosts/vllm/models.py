"""Tiny random models in the formats that their families publish, and the same models in fp32.

python models.py FOLDER    writes FOLDER/NAME/native and FOLDER/NAME/dense for each row of MODELS
"""

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    DeepseekV3Config,
    GptOssConfig,
    Qwen3MoeConfig,
)

sys.path.insert(0, str(Path(__file__).parents[2] / "python"))
import tiny_models
from checkpoint_tools import edit_config

from cpumoe import weight_format

HIDDEN, INNER, EXPERTS, LAYERS, VOCABULARY = 128, 128, 8, 2, 512
_COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}


def random_model(config):
    torch.manual_seed(3)
    config.initializer_range = 0.2
    return AutoModelForCausalLM.from_config(config).to(torch.bfloat16).eval()


def gpt_oss(native: Path, dense: Path) -> None:
    config = GptOssConfig(
        **_COMMON, intermediate_size=INNER, num_local_experts=EXPERTS, sliding_window=16
    )
    model = random_model(config)
    model.save_pretrained(native)
    tensors = load_file(native / "model.safetensors")
    exact = dict(model.state_dict())
    fmt = weight_format("mxfp4")
    for name in [n for n in tensors if n.endswith(("experts.gate_up_proj", "experts.down_proj"))]:
        # [experts, in, out] in memory, [experts, out, in] in the checkpoint
        codes, scales = fmt.quantize(tensors.pop(name).transpose(1, 2).float().contiguous())
        exact[name] = fmt.dequantize(codes, scales).transpose(1, 2)
        tensors[f"{name}_blocks"] = codes.view(*scales.shape, 16)
        tensors[f"{name}_scales"] = scales
    save_file(tensors, native / "model.safetensors", metadata={"format": "pt"})
    kept = ["self_attn", "mlp.router", "embed_tokens", "lm_head"]
    edit_config(
        native, quantization_config={"quant_method": "mxfp4", "modules_to_not_convert": kept}
    )
    write_dense(model, exact, dense)


def write_dense(model, exact, dense: Path) -> None:
    model = model.float()
    model.load_state_dict({name: tensor.float() for name, tensor in exact.items()})
    model.save_pretrained(dense)


def quantized(config, write):
    """A model whose experts `write` quantizes, with their exact values in the dense one."""

    def make(native: Path, dense: Path) -> None:
        model = random_model(config())
        write(native, model)
        stored = load_file(native / "model.safetensors")
        model.save_pretrained(dense)
        plain = load_file(dense / "model.safetensors")
        exact = {n: _weights(stored, n) if ".experts." in n else stored[n] for n in plain}
        exact = {name: tensor.float().contiguous() for name, tensor in exact.items()}
        save_file(exact, dense / "model.safetensors", metadata={"format": "pt"})
        edit_config(dense, dtype="float32")

    return make


def _weights(stored, name):
    """The weights of a projection, from what the checkpoint stores."""
    scales = stored.get(f"{name}_scale", stored.get(f"{name}_scale_inv"))
    if f"{name}_packed" in stored:
        codes = stored[f"{name}_packed"]
        if codes.dtype == torch.int32:
            return weight_format("int4").dequantize(codes.view(torch.uint8), scales)
        factor = stored.get(f"{name}_global_scale")
        fmt = weight_format("mxfp4" if factor is None else "nvfp4")
        return fmt.dequantize(codes, scales, None if factor is None else 1 / factor[0])
    return weight_format("fp8").dequantize(stored[name], scales)


def qwen3_moe():
    return Qwen3MoeConfig(
        **_COMMON,
        moe_intermediate_size=INNER,
        num_experts=EXPERTS,
        norm_topk_prob=True,
    )


def deepseek_v3():
    sizes = {**_COMMON, "num_key_value_heads": 4}
    del sizes["head_dim"]
    return DeepseekV3Config(
        **sizes,
        intermediate_size=2 * INNER,
        moe_intermediate_size=INNER,
        n_shared_experts=1,
        n_routed_experts=EXPERTS,
        first_k_dense_replace=1,
        n_group=1,
        topk_group=1,
        routed_scaling_factor=2.5,
        norm_topk_prob=True,
        topk_method="noaux_tc",  # vLLM then knows of the router's biases
        scoring_func="sigmoid",
        kv_lora_rank=512,
        q_lora_rank=48,
        qk_rope_head_dim=64,
        qk_nope_head_dim=128,
        v_head_dim=128,
    )


def compressed(stored):
    targets = ["re:.*\\.experts\\.[0-9]+\\..*"]
    ignore = ["lm_head", "re:.*self_attn.*", "re:.*shared_experts.*"]
    return lambda folder, model: tiny_models.compressed_tensors(
        folder, model, targets, ignore, stored
    )


def large(native: Path, dense: Path) -> None:
    """Experts of 0.8 GB in bf16, for measurements of memory. There is no dense model."""
    sizes = {**_COMMON, "num_hidden_layers": 8, "hidden_size": 512}
    config = Qwen3MoeConfig(**sizes, moe_intermediate_size=512, num_experts=64)
    random_model(config).save_pretrained(native)


def unquantized(config):
    """A model whose checkpoint is in bf16, and the same in fp32."""

    def make(native: Path, dense: Path) -> None:
        model = random_model(config())
        model.save_pretrained(native)
        model.float().save_pretrained(dense)

    return make


MODELS = {
    "gpt_oss-mxfp4": gpt_oss,
    "qwen3_moe-bf16": unquantized(qwen3_moe),
    "qwen3_moe-int4": quantized(qwen3_moe, compressed("pack-quantized")),
    "qwen3_moe-fp8": quantized(qwen3_moe, tiny_models._fp8_experts),
    "qwen3_moe-fp8-rows": quantized(qwen3_moe, compressed("float-quantized")),
    "qwen3_moe-nvfp4": quantized(qwen3_moe, compressed("nvfp4-pack-quantized")),
    "qwen3_moe-mxfp4": quantized(qwen3_moe, compressed("mxfp4-pack-quantized")),
    "large-bf16": large,
    "kimi-int4": quantized(deepseek_v3, compressed("pack-quantized")),
}


def main(folder: Path) -> None:
    for name, make in MODELS.items():
        native, dense = folder / name / "native", folder / name / "dense"
        native.mkdir(parents=True, exist_ok=True)
        dense.mkdir(parents=True, exist_ok=True)
        make(native, dense)
        for each in (native, dense):
            if not (each / "config.json").exists():
                continue
            tiny_models.byte_tokenizer(each)
            config = json.loads((each / "config.json").read_text())
            assert config["vocab_size"] == VOCABULARY
    print(f"wrote {len(MODELS)} models to {folder}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
