"""Checkpoints with FP8 experts: blocks of DeepSeek-V3 and others, and compressed-tensors."""

import json

import pytest
import torch
from checkpoint_tools import SMALL, edit_config, edit_tensors, write_small
from cli_tools import succeed
from safetensors.torch import load_file, save_file

from cpumoe import Experts
from cpumoe.checkpoint import CheckpointError, UnsupportedFormatError, open_checkpoint
from cpumoe.formats import weight_format
from cpumoe.models import MODELS

FP8 = weight_format("fp8")
BLOCK_MODELS = [spec.name for spec in MODELS if spec.weight_format == "fp8"]
# More than a block of rows and columns, and a part of one.
SIZES = {"hidden": 160, "intermediate": 288}


def write(folder, model="DeepSeek-V3", **sizes):
    return write_small(folder, model, **{**SIZES, **sizes})


def compressed(folder, strategy):
    """Writes a checkpoint in compressed-tensors' ``float-quantized``."""
    write(folder, "Kimi-K2-Instruct")
    tensors = load_file(folder / "model.safetensors")
    for name in [name for name in tensors if name.endswith("_scale_inv")]:
        scales = tensors.pop(name)
        stem = name.removesuffix("_scale_inv")
        if strategy == "channel":
            weights = FP8.dequantize(tensors[stem], scales)
            tensors[stem], scales = FP8.quantize(weights, weights.shape[1])
        elif strategy == "tensor":
            scales = scales[0, :1].clone()
        tensors[f"{stem}_scale"] = scales.to(torch.bfloat16)
    save_file(tensors, folder / "model.safetensors")
    weights = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": strategy}
    if strategy == "block":
        weights["block_structure"] = [128, 128]
    groups = {
        "group_0": {
            "targets": ["Linear"],
            "weights": weights,
            "input_activations": {"dynamic": True, "num_bits": 8, "type": "float"},
        }
    }
    edit_config(
        folder,
        quantization_config={
            "quant_method": "compressed-tensors",
            "format": "float-quantized",
            "config_groups": groups,
            "ignore": ["lm_head"],
        },
    )
    return folder


def stored_weights(tensors, name):
    """The weights that transformers takes a tensor for, one block at a time."""
    codes = tensors[name].float()
    stem = name.removesuffix(".weight")
    endings = (".weight_scale_inv", ".weight_scale", ".scale")
    scales = next(tensors[stem + end] for end in endings if stem + end in tensors).float()
    if scales.numel() == 1 or scales.shape == (codes.shape[0], 1):
        return codes * scales
    weights = torch.empty_like(codes)
    for i, row in enumerate(range(0, codes.shape[0], 128)):
        for j, column in enumerate(range(0, codes.shape[1], 128)):
            block = slice(row, row + 128), slice(column, column + 128)
            weights[block] = codes[block] * scales[i, j]
    return weights


def check_experts(folder):
    """Compares all experts with the stored tensors, before and after packing."""
    tensors = load_file(folder / "model.safetensors")
    reader = open_checkpoint(folder)
    assert (reader.format, reader.unsupported) == ("fp8", ())
    for layer in reader.layers():
        experts = Experts.from_checkpoint(folder, layer)
        for index in range(SMALL["experts"]):
            expert = reader.expert(layer, index)
            exported = experts.export(index)
            for matrix, back, names in (
                (expert.gate, exported.gate, ("gate_proj", "w1")),
                (expert.up, exported.up, ("up_proj", "w3")),
                (expert.down, exported.down, ("down_proj", "w2")),
            ):
                endings = tuple(f".experts.{index}.{name}.weight" for name in names)
                name = next(
                    name
                    for name in tensors
                    if f"layers.{layer}." in name and name.endswith(endings)
                )
                expected = stored_weights(tensors, name)
                assert torch.equal(FP8.dequantize(matrix.codes, matrix.scales), expected)
                assert torch.equal(FP8.dequantize(back.codes, back.scales), expected)
                assert back.scales.dtype == matrix.scales.dtype


@pytest.mark.parametrize("model", BLOCK_MODELS)
def test_blocks_are_read_as_stored(tmp_path, model):
    check_experts(write(tmp_path, model))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e8m0fnu])
def test_scales_have_any_dtype(tmp_path, dtype):
    folder = write(tmp_path, layers=1)
    scales = {
        name: (2.0 ** tensor.log2().ceil()).to(dtype)
        for name, tensor in load_file(folder / "model.safetensors").items()
        if name.endswith("_scale_inv")
    }
    edit_tensors(folder, scales)
    check_experts(folder)


@pytest.mark.parametrize("strategy", ["channel", "block", "tensor"])
def test_compressed_tensors_are_read_as_stored(tmp_path, strategy):
    check_experts(compressed(tmp_path, strategy))


@pytest.mark.parametrize("shape", [(), (1,)])
@pytest.mark.parametrize("name", ["weight_scale_inv", "weight_scale"])
@pytest.mark.parametrize("scheme", ["dynamic", "static"])
def test_a_matrix_may_have_one_scale(tmp_path, scheme, name, shape):
    folder = write(tmp_path, layers=1)
    tensors = load_file(folder / "model.safetensors")
    for old in [name for name in tensors if name.endswith("_scale_inv")]:
        scale = tensors.pop(old)[0, 0].reshape(shape).clone()
        tensors[old.replace("weight_scale_inv", name)] = scale
        tensors[old.replace("weight_scale_inv", "activation_scale")] = torch.ones(())
    save_file(tensors, folder / "model.safetensors")
    edit_config(folder, quantization_config={"quant_method": "fp8", "activation_scheme": scheme})
    check_experts(folder)
    reader = open_checkpoint(folder)
    assert reader.expert(3, 0).gate.scale_grid == (1, 160)
    assert reader.group_size(3, 160) == 160


def test_commands_know_of_fp8(tmp_path):
    folder = write(tmp_path, "MiniMax-M2", layers=1)
    assert "fp8" in succeed("inspect", folder)
    succeed("validate", folder, "--isa", "generic")
    assert json.loads(succeed("inspect", "DeepSeek-V3", "--json"))["supported"]


GATE = "model.layers.3.mlp.experts.0.gate_proj"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({f"{GATE}.weight_scale_inv": None}, rf"{GATE}.weight_scale_inv: .*"),
        (
            {f"{GATE}.weight_scale_inv": torch.ones(3, 3)},
            rf"{GATE}.weight_scale_inv: expected .* \[3, 2\], got .* \[3, 3\]",
        ),
        (
            {f"{GATE}.weight_scale_inv": torch.ones(3, 2, dtype=torch.float16)},
            rf"{GATE}.weight_scale_inv: expected float32 or bfloat16 or float8_e8m0fnu or uint8",
        ),
        (
            {f"{GATE}.weight": torch.ones(288, 160, dtype=torch.bfloat16)},
            rf"{GATE}.weight: expected float8_e4m3fn",
        ),
    ],
)
def test_tensors_that_do_not_fit_are_refused(tmp_path, changes, message):
    folder = write(tmp_path, layers=1)
    edit_tensors(folder, changes)
    reader = open_checkpoint(folder)
    with pytest.raises(CheckpointError, match=message):
        reader.expert(3, 0)
    with pytest.raises(CheckpointError, match=message):
        Experts.from_checkpoint(folder, 3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"weight_block_size": [64, 64]},
            r"weight_block_size \[64, 64\] is not supported, only \[128, 128\]",
        ),
        ({"weight_block_size": "128"}, "weight_block_size '128' is not supported"),
    ],
)
def test_other_kinds_of_fp8_are_refused_by_name(tmp_path, changes, message):
    folder = write(tmp_path, layers=1)
    quantization = json.loads((folder / "config.json").read_text())["quantization_config"]
    edit_config(folder, quantization_config={**quantization, **changes})
    with pytest.raises(UnsupportedFormatError, match=message):
        open_checkpoint(folder).expert(3, 0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"strategy": "group"},
            r"block_structure None of strategy 'group' is not supported, only \[128, 128\] of "
            "'block', and strategies 'channel' and 'tensor'",
        ),
        (
            {"strategy": "block", "block_structure": [64, 128]},
            r"block_structure \[64, 128\] of strategy 'block' is not supported",
        ),
        ({"num_bits": 4}, "num_bits 4 is not supported, only 8"),
    ],
)
def test_other_compressed_tensors_are_refused_by_name(tmp_path, changes, message):
    folder = compressed(tmp_path, "channel")
    quantization = json.loads((folder / "config.json").read_text())["quantization_config"]
    quantization["config_groups"]["group_0"]["weights"] |= changes
    edit_config(folder, quantization_config=quantization)
    with pytest.raises(UnsupportedFormatError, match=message):
        open_checkpoint(folder).expert(1, 0)


def test_scales_of_another_name_are_refused(tmp_path):
    folder = write(tmp_path, layers=1)
    tensors = load_file(folder / "model.safetensors")
    renamed = {name.replace("_scale_inv", "_scale"): t for name, t in tensors.items()}
    save_file(renamed, folder / "model.safetensors")
    reader = open_checkpoint(folder)
    with pytest.raises(UnsupportedFormatError, match="no expert has weight_scale_inv"):
        reader.expert(3, 0)
