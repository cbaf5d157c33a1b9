"""Layouts with the bytes of a known checkpoint under other names, dtypes or shapes."""

import json

import ml_dtypes
import numpy as np
import pytest
import torch
from checkpoint_tools import edit_config, edit_tensors, rename_tensors, write_small
from safetensors.torch import load_file, save_file

import cpumoe
from cpumoe.checkpoint import CheckpointError, open_checkpoint
from cpumoe.formats import WEIGHT_FORMATS
from cpumoe.formats.e2m1 import FLOAT4

needs_float4 = pytest.mark.skipif(FLOAT4 is None, reason="needs PyTorch 2.8")
MODELS = ["v4-flash", "gpt-oss-20b", "kimi-k2"]
X = torch.randn(4, 64, generator=torch.Generator().manual_seed(2))
IDS = torch.tensor([[0, 2], [1, 0], [2, 1], [2, 0]])


def computed(folder, **kwargs):
    """The output of the folder's first layer with experts."""
    layer = open_checkpoint(folder).layers()[0]
    with cpumoe.Runtime(1) as runtime:
        experts = cpumoe.Experts.from_checkpoint(
            folder, layer, runtime=runtime, isa="generic", **kwargs
        )
        return experts(X, IDS, torch.tensor([[0.25, 0.75]]).expand(4, 2).contiguous())


def mxfp4(codes, scales):
    """Float32 ``[..., N, K]`` of bytes ``[..., N, K/2]`` and exponents, by ml_dtypes."""
    codes, scales = (tensor.contiguous().view(torch.uint8).numpy() for tensor in (codes, scales))
    nibbles = np.stack((codes & 15, codes >> 4), -1).reshape(*codes.shape[:-1], -1)
    values = nibbles.view(ml_dtypes.float4_e2m1fn).astype(np.float32)
    return torch.tensor(values * np.exp2(scales.repeat(32, -1).astype(np.float32) - 127))


def dense(matrix):
    return WEIGHT_FORMATS["mxfp4"].dequantize(matrix.codes, matrix.scales)


def tensors_of(folder):
    return load_file(folder / "model.safetensors")


# torch.float4_e2m1fn_x2, "F4" in a file


@needs_float4
@pytest.mark.parametrize(("model", "end"), [("v4-flash", ".weight"), ("gpt-oss-20b", "_blocks")])
def test_codes_may_be_float4(tmp_path, model, end):
    write_small(tmp_path, model)
    expected = computed(tmp_path)
    codes = {
        name: tensor.view(FLOAT4)
        for name, tensor in tensors_of(tmp_path).items()
        if "experts" in name and name.endswith(end)
    }
    edit_tensors(tmp_path, codes)
    assert {open_checkpoint(tmp_path).folder.info(name).dtype for name in codes} == {"F4"}
    assert torch.equal(computed(tmp_path), expected)


@needs_float4
def test_float4_codes_dequantize_as_ml_dtypes_does(v4):
    name = "layers.1.ffn.experts.2.w3"
    stored = tensors_of(v4)
    expected = mxfp4(stored[f"{name}.weight"], stored[f"{name}.scale"])
    edit_tensors(v4, {f"{name}.weight": stored[f"{name}.weight"].view(FLOAT4)})
    edit_config(v4, expert_dtype=None)  # then the tensors' dtypes decide
    assert torch.equal(dense(open_checkpoint(v4).expert(1, 2).up), expected)


@needs_float4
def test_float4_shapes_are_checked_as_pytorch_counts_them(v4):
    name = "layers.0.ffn.experts.0.w1.weight"
    edit_tensors(v4, {name: torch.zeros(96, 16, dtype=torch.uint8).view(FLOAT4)})
    message = rf"{name}: expected .* \[96, 32\], got float4_e2m1fn_x2 \[96, 16\]"
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(v4).expert(0, 0)


def test_float4_files_need_a_pytorch_that_knows_them(v4, monkeypatch):
    path = v4 / "model.safetensors"
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    entry = header["layers.0.ffn.experts.0.w1.weight"]
    entry.update(dtype="F4", shape=[entry["shape"][0], 2 * entry["shape"][1]])
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :])
    monkeypatch.delitem(cpumoe.checkpoint.header.TORCH_DTYPES, "F4", raising=False)
    with pytest.raises(CheckpointError, match=r"w1\.weight: F4 needs PyTorch 2\.8 or newer, got"):
        open_checkpoint(v4).expert(0, 0)


@needs_float4
def test_tensors_in_memory_may_be_float4():
    generator = torch.Generator().manual_seed(4)
    fmt = WEIGHT_FORMATS["mxfp4"]
    sizes = [(3, 96, 64), (3, 96, 64), (3, 64, 96)]
    stacks = [fmt.quantize(torch.randn(size, generator=generator)) for size in sizes]
    outputs = []
    for dtype in (torch.uint8, FLOAT4):
        gate, up, down = ((codes.view(dtype), scales) for codes, scales in stacks)
        experts = cpumoe.Experts.from_tensors(gate=gate, up=up, down=down, format="mxfp4")
        outputs.append(experts(X, IDS, torch.ones(4, 2)))
    assert torch.equal(*outputs)


# OpenAI's own files of gpt-oss


def originals(folder):
    """Rewrites gpt-oss' checkpoint as OpenAI's ``original``: names, and a config of sizes only."""
    names = {
        "layers.": "block.",
        "mlp.experts.gate_up_proj_": "mlp.mlp1_weight.",
        "mlp.experts.down_proj_": "mlp.mlp2_weight.",
        "_weight.bias": "_bias",
        "router.": "gate.",
    }
    tensors = {}
    for name, tensor in tensors_of(folder).items():
        name = name.removeprefix("model.")
        for old, new in names.items():
            name = name.replace(old, new)
        tensors[name] = tensor
    save_file(tensors, folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    kept = ("num_hidden_layers", "hidden_size", "intermediate_size", "swiglu_limit", "vocab_size")
    sizes = {key: config[key] for key in kept}
    sizes |= {"num_experts": config["num_local_experts"], "experts_per_token": 2}
    (folder / "config.json").write_text(json.dumps(sizes))
    return tensors


def test_gpt_oss_original_files_are_read(gpt_oss):
    expected = computed(gpt_oss)
    stored = originals(gpt_oss)
    assert "block.1.mlp.mlp1_weight.blocks" in stored
    reader = open_checkpoint(gpt_oss)
    assert (reader.model_type, reader.format, reader.top_k) == ("gpt_oss", "mxfp4", 2)
    assert reader.layers() == [0, 1]
    assert reader.unsupported == ()
    reader.check_layer(1)
    w = reader.expert(1, 2)
    blocks, scales = (stored[f"block.1.mlp.mlp1_weight.{kind}"][2] for kind in ("blocks", "scales"))
    mlp1 = mxfp4(blocks.flatten(1), scales)  # rows: gate 0, up 0, gate 1, ...
    assert torch.equal(dense(w.gate), mlp1[0::2])
    assert torch.equal(dense(w.up), mlp1[1::2])
    assert torch.equal(w.up_bias, stored["block.1.mlp.mlp1_bias"][2, 1::2])
    assert torch.equal(w.down_bias, stored["block.1.mlp.mlp2_bias"][2])
    assert torch.equal(computed(gpt_oss), expected)


def test_gpt_oss_original_files_are_named_where_they_are_damaged(gpt_oss):
    originals(gpt_oss)
    edit_tensors(gpt_oss, {"block.0.mlp.mlp2_weight.scales": None})
    with pytest.raises(CheckpointError, match=r"^block\.0\.mlp\.mlp2_weight\.scales: no such"):
        open_checkpoint(gpt_oss).check_layer(0)


# Variants of gpt-oss: dtypes of biases, names of layers, keys of sizes in config.json.


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_biases_may_be_of_any_float(gpt_oss, dtype):
    expected = computed(gpt_oss)
    biases = {n: t.to(dtype) for n, t in tensors_of(gpt_oss).items() if n.endswith("_proj_bias")}
    for bias in biases.values():
        bias.copy_(bias.half())  # exact in all of the dtypes
    edit_tensors(gpt_oss, {name: bias.bfloat16() for name, bias in biases.items()})
    edit_tensors(gpt_oss, biases)
    reader = open_checkpoint(gpt_oss)
    reader.check_layer(0)
    weights = reader.expert(0, 1)
    assert weights.gate_bias.dtype == weights.down_bias.dtype == dtype
    assert torch.equal(computed(gpt_oss), expected)


def test_fp32_biases_are_not_rounded(gpt_oss):
    name = "model.layers.0.mlp.experts.down_proj_bias"
    bias = torch.full((3, 64), 1 + 2.0**-20)
    before = computed(gpt_oss)
    edit_tensors(gpt_oss, {name: torch.ones(3, 64)})
    ones = computed(gpt_oss)
    edit_tensors(gpt_oss, {name: 1024 * bias})
    assert not torch.equal(before, ones)
    # The weights of the two experts sum to 1 and x is fp32, so 1024 + 2^-10 is exact.
    difference = computed(gpt_oss) - ones - (1023 + 2.0**-10)
    assert difference.abs().max() < 2.0**-11


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize(
    "prefix",
    ["", "model.", "language_model.", "model.language_model.", "language_model.model."],
)
def test_layers_may_lie_in_a_greater_model(tmp_path, model, prefix):
    write_small(tmp_path, model)
    expected = computed(tmp_path)
    rename_tensors(tmp_path, "model.", "")
    rename_tensors(tmp_path, "", prefix)
    reader = open_checkpoint(tmp_path)
    reader.check_layer(reader.layers()[0])
    assert torch.equal(computed(tmp_path), expected)


def test_layers_of_two_models_in_one_file_are_not_mixed(v4):
    tensors = tensors_of(v4)
    save_file(
        tensors | {f"language_model.{name}": tensor.clone() for name, tensor in tensors.items()},
        v4 / "model.safetensors",
    )
    reader = open_checkpoint(v4)
    with pytest.raises(
        CheckpointError, match=r"layer 0: expected one prefix of experts' names, got "
    ):
        reader.expert(0, 0)


@pytest.mark.parametrize(
    "key", ["num_experts_per_tok", "num_experts_per_token", "experts_per_token"]
)
def test_the_number_of_a_tokens_experts_has_several_names(v4, key):
    edit_config(v4, num_experts_per_tok=None)
    with pytest.raises(CheckpointError, match="num_experts_per_tok: expected a positive integer"):
        open_checkpoint(v4)
    edit_config(v4, **{key: 2})
    assert open_checkpoint(v4).top_k == 2
