"""Small random models of each family, saved in the family's native checkpoint format."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from checkpoint_tools import edit_config, edit_tensors
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    DeepseekV4Config,
    DeepseekV4ForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from cpumoe.formats import weight_format
from cpumoe.numerics.glu import SwiGLU

EXPERTS, TOP_K, LAYERS, HIDDEN, INNER, VOCABULARY = 8, 2, 3, 64, 96, 288
_FP8_BLOCK = 128
# Settings with equal names in the configs of all families.
_COMMON = {
    "vocab_size": VOCABULARY,
    "num_attention_heads": 4,
    "num_experts_per_tok": TOP_K,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def deepseek_v4(folder, *, hidden=HIDDEN, inner=INNER, experts=EXPERTS):
    """MXFP4 experts, FP8 dense weights in blocks, hash and top-k routing, all attention kinds."""
    config = DeepseekV4Config(
        **_COMMON,
        hidden_size=hidden,
        moe_intermediate_size=inner,
        num_hidden_layers=5,
        num_key_value_heads=1,
        head_dim=32,
        q_lora_rank=32,
        partial_rotary_factor=0.5,
        num_local_experts=experts,
        n_routed_experts=experts,
        layer_types=["sliding_attention"]
        + 2 * ["compressed_sparse_attention", "heavily_compressed_attention"],
        compress_rates={"compressed_sparse_attention": 4, "heavily_compressed_attention": 8},
        mlp_layer_types=["hash_moe"] + 4 * ["moe"],
        hc_mult=4,
        hc_sinkhorn_iters=3,
        sliding_window=16,
        o_groups=2,
        o_lora_rank=16,
        index_n_heads=32,
        index_head_dim=32,
        index_topk=4,
    )
    model = _random(DeepseekV4ForCausalLM, config)
    for module in model.modules():
        if hasattr(module, "tid2eid"):
            keys = torch.rand(VOCABULARY, experts, generator=torch.Generator().manual_seed(5))
            module.tid2eid.copy_(keys.topk(TOP_K).indices)
    tensors = {n.removeprefix("model."): t for n, t in _saved(model, folder).items()}
    mxfp4 = weight_format("mxfp4")
    for name in [n for n in tensors if n.endswith(".weight")]:
        stem = name.removesuffix(".weight")
        if ".ffn.experts." in name:
            codes, scales = mxfp4.quantize(tensors[name].float())
            tensors[name] = codes.view(torch.int8)
            tensors[f"{stem}.scale"] = scales.view(torch.float8_e8m0fnu)
        elif _is_fp8(name):
            tensors[name], tensors[f"{stem}.scale"] = fp8_blocks(tensors[name])
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    edit_config(
        folder,
        expert_dtype="fp4",
        quantization_config={
            "activation_scheme": "dynamic",
            "fmt": "e4m3",
            "quant_method": "fp8",
            "scale_fmt": "ue8m0",
            "weight_block_size": [_FP8_BLOCK, _FP8_BLOCK],
        },
    )
    return folder


def gpt_oss(folder):
    """MXFP4 experts with biases, gate and up rows interleaved; the rest bf16."""
    config = GptOssConfig(
        **_COMMON,
        hidden_size=HIDDEN,
        intermediate_size=INNER,
        num_hidden_layers=LAYERS,
        num_key_value_heads=2,
        head_dim=16,
        num_local_experts=EXPERTS,
        sliding_window=16,
    )
    tensors = _saved(_random(GptOssForCausalLM, config), folder)
    mxfp4 = weight_format("mxfp4")
    for name in [n for n in tensors if n.endswith(("experts.gate_up_proj", "experts.down_proj"))]:
        # [experts, in, out] in memory, [experts, out, in] in the checkpoint
        weights = tensors.pop(name).transpose(1, 2).float().contiguous()
        codes, scales = mxfp4.quantize(weights)
        tensors[f"{name}_blocks"] = codes.view(*scales.shape, 16)
        tensors[f"{name}_scales"] = scales
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    dense = [
        "model.layers.*.self_attn",
        "model.layers.*.mlp.router",
        "model.embed_tokens",
        "lm_head",
    ]
    quantization = {"quant_method": "mxfp4", "modules_to_not_convert": dense}
    edit_config(folder, quantization_config=quantization)
    return folder


def kimi(folder, *, model_type="kimi_k2", stored="pack-quantized"):
    """INT4 routed experts in compressed-tensors' pack-quantized format, a dense layer before.

    If `stored` is "fp8", the experts are FP8 in blocks, as DeepSeek-V3's.
    """
    config = DeepseekV3Config(
        **_COMMON,
        hidden_size=HIDDEN,
        intermediate_size=2 * INNER,
        moe_intermediate_size=INNER,
        num_hidden_layers=LAYERS,
        num_key_value_heads=4,
        n_shared_experts=1,
        n_routed_experts=EXPERTS,
        first_k_dense_replace=1,
        n_group=1,
        topk_group=1,
        routed_scaling_factor=2.827,
        norm_topk_prob=True,
        kv_lora_rank=32,
        q_lora_rank=48,
        qk_rope_head_dim=16,
        qk_nope_head_dim=16,
        v_head_dim=16,
    )
    if stored == "fp8":
        _fp8_experts(folder, _random(DeepseekV3ForCausalLM, config))
        return folder
    compressed_tensors(
        folder,
        _random(DeepseekV3ForCausalLM, config),
        ["Linear"],
        [
            "lm_head",
            "re:.*self_attn.*",
            "re:.*shared_experts.*",
            "re:.*mlp\\.(gate|up|gate_up|down)_proj.*",
        ],
    )
    edit_config(folder, model_type=model_type)
    return folder


def int4_moe(folder, model_type, *, stored="pack-quantized", kept=None):
    """Any family whose checkpoints have tensors per expert; its routed experts quantized.

    Layer `kept` is left unquantized.
    """
    sizes = {
        **_COMMON,
        "hidden_size": HIDDEN,
        "intermediate_size": INNER,
        "moe_intermediate_size": INNER,
        "num_hidden_layers": LAYERS,
        "num_key_value_heads": 2,
        "head_dim": 16,
        **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), EXPERTS),
        **{"moe_num_experts": EXPERTS, "moe_k": TOP_K, "n_group": 1, "topk_group": 1},
    }
    config_class = CONFIG_MAPPING[model_type]
    known = config_class()
    config = config_class(**{name: n for name, n in sizes.items() if hasattr(known, name)})
    model = _random(AutoModelForCausalLM.from_config, config)
    if stored == "fp8":
        _fp8_experts(folder, model)
    else:
        ignore = ["lm_head"] if kept is None else ["lm_head", f"re:.*layers\\.{kept}\\..*"]
        compressed_tensors(folder, model, ["re:.*\\.experts\\.[0-9]+\\..*"], ignore, stored, kept)
    return folder


def _fp8_experts(folder, model):
    """Saves a model with its routed experts in blocks of FP8."""
    tensors = _saved(model, folder)
    dense = {name.removesuffix(".weight") for name in tensors if ".experts." not in name}
    for name in [n for n in tensors if ".experts." in n and n.endswith(".weight")]:
        tensors[name], scales = fp8_blocks(tensors[name])
        tensors[f"{name}_scale_inv"] = scales.float()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    edit_config(
        folder,
        quantization_config={
            "quant_method": "fp8",
            "activation_scheme": "dynamic",
            "weight_block_size": [_FP8_BLOCK, _FP8_BLOCK],
            "modules_to_not_convert": sorted(dense),
        },
    )


def compressed_tensors(folder, model, targets, ignore, stored="pack-quantized", kept=None):
    """Saves a model with its routed experts quantized in groups, or FP8 by rows.

    Layer `kept` is left unquantized.
    """
    tensors = _saved(model, folder)
    is_int4, is_fp8 = stored == "pack-quantized", stored == "float-quantized"
    is_nvfp4 = stored == "nvfp4-pack-quantized"
    fmt = weight_format(
        "int4" if is_int4 else "fp8" if is_fp8 else "nvfp4" if is_nvfp4 else "mxfp4"
    )
    for name in [n for n in tensors if ".experts." in n and n.endswith(".weight")]:
        if f"layers.{kept}." in name:
            continue
        weight = tensors.pop(name).float()
        if is_fp8:
            # Powers of two, so that code * scale is exact in bf16.
            rows = 2.0 ** torch.ceil(torch.log2(weight.abs().amax(1, keepdim=True) / 448))
            tensors[name] = (weight / rows).to(torch.float8_e4m3fn)
            tensors[f"{name}_scale"] = rows.to(torch.bfloat16)
            continue
        if is_nvfp4:
            # Powers of two, so that code * scale / number is exact in bf16.
            codes, scales = fmt.quantize_groups(
                (weight * 64).unflatten(-1, (-1, 16)), fmt.scale_storage
            )
            codes = codes.flatten(-2)
            tensors[f"{name}_packed"] = codes[:, 0::2] + 16 * codes[:, 1::2]
            tensors |= {f"{name}_scale": scales, f"{name}_global_scale": torch.tensor([64.0])}
            continue
        codes, scales = fmt.quantize(weight)
        if is_int4:
            # Four bits of significand, so that code * scale is exact in bf16, transformers' dtype.
            scales = (scales.view(torch.int16) & ~0xF).view(torch.bfloat16)
            codes = codes.view(torch.int32)
            tensors[f"{name}_shape"] = torch.tensor(weight.shape)
        tensors |= {f"{name}_packed": codes, f"{name}_scale": scales}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    weights = {
        "num_bits": fmt.code_bits,
        "type": "int" if is_int4 else "float",
        "symmetric": True,
        "strategy": "channel" if is_fp8 else "tensor_group" if is_nvfp4 else "group",
        "group_size": None if is_fp8 else fmt.group_size,
        "dynamic": False,
    }
    edit_config(
        folder,
        quantization_config={
            "quant_method": "compressed-tensors",
            "format": stored,
            "quantization_status": "compressed",
            "config_groups": {"group_0": {"targets": targets, "weights": weights}},
            "ignore": ignore,
        },
    )


class Family(NamedTuple):
    """A family: the function that writes a model, and the experts' activation."""

    write: Callable[[Path], Path]
    activation: SwiGLU


FAMILIES = {
    "deepseek_v4": Family(deepseek_v4, SwiGLU(limit=10.0)),
    "gpt_oss": Family(gpt_oss, SwiGLU(alpha=1.702, limit=7.0, up_offset=1.0)),
    "kimi": Family(kimi, SwiGLU()),
}


CHAT_TEMPLATE = (
    "{% for m in messages %}{% if m.role not in ('system', 'user', 'assistant') %}"
    "{{ raise_exception('unknown role ' + m.role) }}{% endif %}"
    "<|{{ m.role }}|>{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def byte_tokenizer(folder, chat_template=CHAT_TEMPLATE):
    """A tokenizer with one token per byte, after the special tokens."""
    special = ["<pad>", "<s>", "</s>", "<|system|>", "<|user|>", "<|assistant|>"]
    symbols = special + sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({symbol: i for i, symbol in enumerate(symbols)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        additional_special_tokens=special[3:],
    )
    fast.chat_template = chat_template
    fast.save_pretrained(folder)
    return fast


def without_experts(folder):
    """A dense model of the host. Returns the names of its weights that are FP8 in blocks."""
    config = Qwen2Config(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
    )
    model = Qwen2ForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(folder)
    quantization = {"quant_method": "fp8", "weight_block_size": [_FP8_BLOCK, _FP8_BLOCK]}
    edit_config(folder, quantization_config=quantization)
    weights = {n: p.detach() for n, p in model.named_parameters() if "proj.weight" in n}
    changes = {}
    for name, weight in weights.items():
        codes, scales = fp8_blocks(weight)
        changes |= {name: codes, f"{name}_scale_inv": scales.float()}
    edit_tensors(folder, changes)
    return list(weights)


def fp8_blocks(weight):
    """float8_e4m3fn ``[N, K]`` and float8_e8m0fnu ``[ceil(N/128), ceil(K/128)]``."""
    n, k = weight.shape
    grid = [range(0, size, _FP8_BLOCK) for size in (n, k)]
    codes = torch.empty(n, k, dtype=torch.float8_e4m3fn)
    scales = torch.empty(*map(len, grid))
    for i, row in enumerate(grid[0]):
        for j, column in enumerate(grid[1]):
            block = slice(row, row + _FP8_BLOCK), slice(column, column + _FP8_BLOCK)
            values = weight[block].float()
            scales[i, j] = 2.0 ** torch.ceil(torch.log2(values.abs().max() / 448))
            codes[block] = (values / scales[i, j]).to(torch.float8_e4m3fn)
    return codes, scales.to(torch.float8_e8m0fnu)


def _is_fp8(name):
    dense = ("attn.wq_a", "attn.wq_b", "attn.wkv", "attn.wo_a", "attn.wo_b", "indexer.wq_b")
    return any(f"{part}." in name for part in dense) or ".shared_experts." in name


def _random(model_class, config):
    torch.manual_seed(3)
    # Small random weights give logits near zero, whose order is decided by rounding.
    config.initializer_range = 0.2
    return model_class(config).to(torch.bfloat16).eval()


def _saved(model, folder: Path):
    model.save_pretrained(folder)
    return load_file(folder / "model.safetensors")
