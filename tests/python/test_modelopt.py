"""Checkpoints that NVIDIA's Model Optimizer has quantized."""

import json

import pytest
import torch
from checkpoint_tools import edit_config, edit_tensors, write_small
from cli_tools import succeed
from safetensors.torch import load_file, save_file

from cpumoe import GLU, Experts
from cpumoe.checkpoint import CheckpointError, UnsupportedFormatError, open_checkpoint
from cpumoe.formats import weight_format

FP8 = weight_format("fp8")
EXPERTS = "model.layers.{}.mlp.experts"


def describe(folder, algorithm, *, in_config=True):
    """Writes the description of the quantization to one of the two files."""
    if in_config:
        quantization = {"quant_method": "modelopt", "quant_algo": algorithm, "ignore": ["lm_head"]}
        quantization["config_groups"] = {"group_0": {"targets": ["Linear"]}}
        edit_config(folder, quantization_config=quantization)
        return
    quantization = {"quant_algo": algorithm, "kv_cache_quant_algo": "FP8"}
    document = {"producer": {"name": "modelopt"}, "quantization": quantization}
    (folder / "hf_quant_config.json").write_text(json.dumps(document))


def quantize_fp8(folder, layers):
    """Replaces bf16 experts of some layers by FP8 ones with a scale per matrix."""
    changes = {}
    for name, weight in load_file(folder / "model.safetensors").items():
        if any(name.startswith(f"{EXPERTS.format(layer)}.") for layer in layers):
            scale = weight.float().abs().max() / 448
            changes[name] = (weight.float() / scale).to(torch.float8_e4m3fn)
            changes[f"{name}_scale"] = scale
            changes[name.replace(".weight", ".input_scale")] = torch.tensor(0.5)
    edit_tensors(folder, changes)


@pytest.fixture
def qwen3(tmp_path):
    return write_small(tmp_path, "Qwen3-30B-A3B")


@pytest.mark.parametrize("in_config", [True, False])
def test_fp8_is_read_as_stored(qwen3, in_config):
    quantize_fp8(qwen3, [0, 1])
    describe(qwen3, "FP8", in_config=in_config)
    tensors = load_file(qwen3 / "model.safetensors")
    reader = open_checkpoint(qwen3)
    assert (reader.format, reader.unsupported) == ("fp8", ())
    for layer in (0, 1):
        reader.check_layer(layer)
        packed = Experts.from_checkpoint(reader, layer, isa="generic", progress=False)
        for index in range(3):
            expert, back = reader.expert(layer, index), packed.export(index)
            for name in ("gate", "up", "down"):
                stem = f"{EXPERTS.format(layer)}.{index}.{name}_proj.weight"
                expected = tensors[stem].float() * tensors[f"{stem}_scale"]
                for matrix in (getattr(expert, name), getattr(back, name)):
                    assert torch.equal(FP8.dequantize(matrix.codes, matrix.scales), expected)
    assert "fp8" in succeed("inspect", qwen3)
    succeed("validate", qwen3, "--isa", "generic")


def test_layers_without_scales_are_not_quantized(qwen3):
    quantize_fp8(qwen3, [1])
    describe(qwen3, "FP8")
    reader = open_checkpoint(qwen3)
    assert (reader.format, reader.unsupported) == ("bf16+fp8", ())
    assert [reader.layer_format(layer) for layer in (0, 1)] == ["bf16", "fp8"]
    stored = load_file(qwen3 / "model.safetensors")[f"{EXPERTS.format(0)}.2.up_proj.weight"]
    assert torch.equal(reader.expert(0, 2).up.codes, stored)


def test_experts_without_a_gate_have_their_up_projection_as_gate(qwen3):
    quantize_fp8(qwen3, [0, 1])
    describe(qwen3, "FP8")
    tensors = load_file(qwen3 / "model.safetensors")
    edit_tensors(qwen3, dict.fromkeys(name for name in tensors if ".gate_proj." in name))
    with pytest.raises(CheckpointError, match=r"gate_proj\.weight_scale: no such tensor"):
        open_checkpoint(qwen3).check_layer(0)
    edit_config(qwen3, model_type="nemotron_h", hidden_act=None, mlp_hidden_act="relu2")
    reader = open_checkpoint(qwen3)
    reader.check_layer(1)
    expert = reader.expert(1, 2)
    assert reader.activation == GLU("relu2", gated=False)
    assert expert.gate is expert.up
    assert "relu2(u), without a gate projection" in succeed("inspect", qwen3)
    assert torch.equal(expert.up.codes, tensors[f"{EXPERTS.format(1)}.2.up_proj.weight"])


@pytest.mark.parametrize("algorithm", ["FP8_PB_WO", "W4A8_AWQ", "INT4_AWQ", 7, None])
def test_other_algorithms_are_refused_by_name(qwen3, algorithm):
    quantize_fp8(qwen3, [0, 1])
    describe(qwen3, algorithm)
    reader = open_checkpoint(qwen3)
    assert reader.layers() == [0, 1]
    with pytest.raises(UnsupportedFormatError, match=f"quant_algo {algorithm!r} is not supported"):
        reader.check_layer(0)


def test_experts_without_a_known_name_are_refused(qwen3):
    describe(qwen3, "FP8")
    tensors = load_file(qwen3 / "model.safetensors")
    names = {name: name.replace("_proj.weight", "_proj.qweight") for name in tensors}
    save_file({names[name]: t for name, t in tensors.items()}, qwen3 / "model.safetensors")
    with pytest.raises(UnsupportedFormatError, match=r"known name that ends in \.weight_scale"):
        open_checkpoint(qwen3).check_supported()


def test_a_malformed_description_is_named(qwen3):
    quantize_fp8(qwen3, [0, 1])
    (qwen3 / "hf_quant_config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"hf_quant_config\.json: malformed JSON"):
        open_checkpoint(qwen3)
    (qwen3 / "hf_quant_config.json").write_text('{"quantization": 7}')
    assert open_checkpoint(qwen3).unsupported


def test_missing_scales_are_named(qwen3):
    quantize_fp8(qwen3, [0, 1])
    describe(qwen3, "FP8")
    name = f"{EXPERTS.format(0)}.0.gate_proj.weight_scale"
    edit_tensors(qwen3, {name: None})
    for call in (lambda r: r.check_layer(0), lambda r: r.expert(0, 0)):
        with pytest.raises(CheckpointError, match=f"^{name}: no such tensor"):
            call(open_checkpoint(qwen3))
    edit_tensors(qwen3, {name: torch.ones(2)})
    with pytest.raises(CheckpointError, match=rf"^{name}: expected float32 .* \[\], got .* \[2\]"):
        open_checkpoint(qwen3).expert(0, 0)
