"""Checkpoints whose layers differ in format."""

import json

import pytest
import torch
from checkpoint_tools import a_call, edit_config, edit_tensors, write_small
from cli_tools import succeed
from safetensors.torch import load_file

from cpumoe import Experts
from cpumoe.checkpoint import CheckpointError, UnsupportedFormatError, open_checkpoint
from cpumoe.formats import weight_format
from cpumoe.reference import experts_forward

INT4, FP8 = weight_format("int4"), weight_format("fp8")
PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
EXPERTS = "model.layers.{}.mlp.experts"


def weights_of(folder, layer):
    """The dense weights of a layer's projections, by the names of their modules."""
    reader = open_checkpoint(folder)
    fmt = weight_format(reader.layer_format(layer))
    return {
        f"{EXPERTS.format(layer)}.{index}.{name}_proj": fmt.dequantize(matrix.codes, matrix.scales)
        for index in range(reader.num_experts)
        for name in ("gate", "up", "down")
        for matrix in (getattr(reader.expert(layer, index), name),)
    }


def leave_unquantized(folder, layer):
    """Replaces a layer's quantized experts by bf16 ones, which it returns."""
    weights = {name: w.bfloat16() for name, w in weights_of(folder, layer).items()}
    stored = load_file(folder / "model.safetensors")
    removed = [n for n in stored if n.startswith(f"{EXPERTS.format(layer)}.")]
    changes = dict.fromkeys(removed) | {f"{name}.weight": w for name, w in weights.items()}
    edit_tensors(folder, changes)
    return weights


def edit_quantization(folder, **changes):
    quantization = json.loads((folder / "config.json").read_text())["quantization_config"]
    edit_config(folder, quantization_config={**quantization, **changes})


def check_computed(reader, layer):
    """Compares a layer with the reference, and its export with what was read."""
    call = a_call(experts=reader.num_experts, top_k=2)
    packed = Experts.from_checkpoint(reader, layer, isa="generic", progress=False)
    assert packed.format == reader.layer_format(layer)
    experts = [reader.expert(layer, index) for index in range(reader.num_experts)]
    matrices = ([getattr(e, name) for e in experts] for name in ("gate", "up", "down"))
    expected = experts_forward(*call, *matrices, format=packed.format, activation=reader.activation)
    assert (packed(*call) - expected).norm() < 1e-5 * expected.norm()
    assert torch.equal(packed.export(1).down.codes, experts[1].down.codes)


@pytest.fixture(params=["pattern", "names", "no group"])
def mixed(tmp_path, request):
    """INT4 in layer 1, bf16 in layer 2."""
    folder = write_small(tmp_path, "kimi-k2")
    weights = leave_unquantized(folder, 2)
    if request.param == "no group":
        group = {"targets": ["re:.*layers\\.1\\..*experts.*"]}
        groups = json.loads((folder / "config.json").read_text())["quantization_config"]
        group = groups["config_groups"]["group_0"] | group
        edit_quantization(folder, config_groups={"group_0": group})
    else:
        pattern = "re:.*layers\\.2\\.mlp\\.experts\\."
        ignore = [pattern] if request.param == "pattern" else list(weights)
        edit_quantization(folder, ignore=["lm_head", *ignore])
    return folder


def test_layers_that_are_not_quantized_are_read_beside_others(mixed):
    stored = load_file(mixed / "model.safetensors")
    reader = open_checkpoint(mixed)
    assert (reader.format, reader.unsupported) == ("int4+bf16", ())
    assert reader.layers() == [1, 2]
    assert [reader.layer_format(layer) for layer in (1, 2)] == ["int4", "bf16"]
    assert [reader.group_size(layer, 64) for layer in (1, 2)] == [32, 0]
    names = reader.tensor_names()
    experts = sorted(name for name in stored if ".experts." in name)
    assert sorted(names[1] + names[2]) == experts
    for index in range(3):
        expert = reader.expert(2, index)
        for name in ("gate", "up", "down"):
            weight = stored[f"{EXPERTS.format(2)}.{index}.{name}_proj.weight"]
            assert torch.equal(getattr(expert, name).codes, weight)
    for layer in reader.layers():
        reader.check_layer(layer)
        check_computed(reader, layer)


def test_layers_that_a_mixed_checkpoint_lacks_are_refused(mixed):
    reader = open_checkpoint(mixed)
    for call in (reader.layer_format, reader.check_layer, lambda layer: reader.expert(layer, 0)):
        with pytest.raises(IndexError, match=r"layer 3 has no routed experts .*layers 1\.\.2 have"):
            call(3)
    with pytest.raises(TypeError, match="layer: expected an int"):
        reader.layer_format("1")


def test_commands_show_the_format_of_each_layer(mixed):
    assert "int4 in 1 layer (1), bf16 in 1 layer (2)" in succeed("inspect", mixed)
    document = json.loads(succeed("inspect", mixed, "--json"))
    assert document["supported"]
    assert document["layer_formats"] == {"int4": [1], "bf16": [2]}
    layers = {"int4": 3 * 3 * 64 * 96 * 9 // 16, "bf16": 3 * 3 * 64 * 96 * 2}
    shapes = 3 * 3 * 16  # weight_shape
    assert document["bytes"]["experts"] == sum(layers.values()) + shapes
    assert document["bytes"]["token"] == (sum(layers.values()) + shapes) // 3 * 2
    for layer, name in ((1, "int4"), (2, "bf16")):
        said = succeed("validate", mixed, "--isa", "generic", "--layer", str(layer))
        assert f"3 {name} experts" in said


def test_groups_may_differ_between_layers(tmp_path):
    folder = write_small(tmp_path, "kimi-k2", layers=3, hidden=128, intermediate=256)
    changes = {}
    for module, weight in weights_of(folder, 2).items():  # INT4 with a scale per row
        codes, scales = INT4.quantize(weight, weight.shape[1])
        changes[f"{module}.weight_packed"] = codes.view(torch.int32)
        changes[f"{module}.weight_scale"] = scales
    for module, weight in weights_of(folder, 3).items():  # FP8 with a scale per block
        codes, scales = FP8.quantize(weight)
        changes |= {f"{module}.weight_packed": None, f"{module}.weight_shape": None}
        changes |= {f"{module}.weight": codes, f"{module}.weight_scale": scales}
    edit_tensors(folder, changes)
    quantization = json.loads((folder / "config.json").read_text())["quantization_config"]
    group = quantization["config_groups"]["group_0"]
    rows = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "channel"}
    blocks = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "block"}
    blocks["block_structure"] = [128, 128]
    groups = {
        "group_0": {**group, "format": "pack-quantized"},
        "group_1": {
            "targets": ["re:.*layers\\.2\\."], "weights": rows, "format": "pack-quantized"
        },
        "group_2": {
            "targets": ["re:.*layers\\.3\\."], "weights": blocks, "format": "float-quantized"
        },
    }  # fmt: skip
    edit_quantization(folder, config_groups=groups, format="mixed-precision")
    reader = open_checkpoint(folder)
    assert (reader.format, reader.unsupported) == ("int4+fp8", ())
    assert [reader.layer_format(layer) for layer in (1, 2, 3)] == ["int4", "int4", "fp8"]
    assert [reader.group_size(layer, 256) for layer in (1, 2, 3)] == [32, 256, 128]
    for layer in (1, 2, 3):
        packed = Experts.from_checkpoint(reader, layer, isa="generic", progress=False)
        assert torch.equal(packed.export(2).up.codes, reader.expert(layer, 2).up.codes)
        assert torch.equal(packed.export(2).up.scales, reader.expert(layer, 2).up.scales)


def test_projections_of_a_layer_have_one_form(tmp_path):
    folder = write_small(tmp_path, "kimi-k2")
    quantization = json.loads((folder / "config.json").read_text())["quantization_config"]
    group = quantization["config_groups"]["group_0"]
    other = {**group, "weights": {**group["weights"], "group_size": 64}}
    other["targets"] = ["re:.*layers\\.2\\..*down_proj"]
    edit_quantization(folder, config_groups={"group_0": group, "group_1": other})
    reader = open_checkpoint(folder)
    assert reader.layers() == [1, 2]
    message = "all experts of a layer must have one form"
    with pytest.raises(UnsupportedFormatError, match=message):
        reader.expert(1, 0)
    assert not json.loads(succeed("inspect", folder, "--json"))["supported"]


def test_layers_for_multi_token_prediction_do_not_matter(tmp_path):
    folder = write_small(tmp_path, "kimi-k2")
    leave_unquantized(folder, 2)
    edit_quantization(folder, ignore=["re:.*layers\\.2\\..*"])
    edit_config(folder, num_hidden_layers=2)
    reader = open_checkpoint(folder)
    assert (reader.format, reader.layers()) == ("int4", [1])


def test_fp8_checkpoints_may_have_layers_that_are_not_quantized(tmp_path):
    folder = write_small(tmp_path, "DeepSeek-V3", hidden=160, intermediate=288)
    weights = leave_unquantized(folder, 3)
    reader = open_checkpoint(folder)
    assert (reader.format, reader.unsupported) == ("bf16+fp8", ())
    assert reader.layers() == [3, 4]
    assert [reader.layer_format(layer) for layer in (3, 4)] == ["bf16", "fp8"]
    name = f"{EXPERTS.format(3)}.1.up_proj"
    assert torch.equal(reader.expert(3, 1).up.codes, weights[name])
    edit_config(folder, num_hidden_layers=4)  # then layer 4 is for multi-token prediction
    assert (open_checkpoint(folder).format, open_checkpoint(folder).layers()) == ("bf16", [3])
    edit_config(folder, num_hidden_layers=5)
    for layer in (3, 4):
        packed = Experts.from_checkpoint(reader, layer, isa="generic", progress=False)
        assert torch.equal(packed.export(2).up.codes, reader.expert(layer, 2).up.codes)
    edit_tensors(folder, {f"{name}.weight": None})
    with pytest.raises(CheckpointError, match=rf"^{name}.weight: no such tensor"):
        open_checkpoint(folder).expert(3, 1)
