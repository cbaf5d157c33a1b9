import json

import pytest
import torch
from checkpoint_tools import assert_sizes, edit_config, edit_tensors, rename_tensors, write_small
from safetensors.torch import load_file

from cpumoe.checkpoint import CheckpointError, UnsupportedFormatError, open_checkpoint
from cpumoe.formats import WEIGHT_FORMATS
from cpumoe.swiglu import SwiGLU

KIMI_NAME = "model.layers.1.mlp.experts.1.up_proj"


def test_kimi_int4(kimi):
    reader = open_checkpoint(kimi)
    assert reader.format == "int4"
    assert reader.swiglu == SwiGLU()
    assert reader.layers() == [1, 2]
    assert_sizes(reader)


def test_kimi_dequantizes_as_compressed_tensors(kimi):
    helpers = pytest.importorskip("compressed_tensors.compressors.pack_quantized.helpers")
    stored = load_file(kimi / "model.safetensors")
    q = helpers.unpack_from_int32(stored[f"{KIMI_NAME}.weight_packed"], 4, torch.Size((96, 64)))
    scale = stored[f"{KIMI_NAME}.weight_scale"].float().repeat_interleave(32, 1)
    up = open_checkpoint(kimi).expert(1, 1).up
    assert torch.equal(WEIGHT_FORMATS["int4"].dequantize(up.codes, up.scales), q.float() * scale)


def test_kimi_k25_nests_its_language_model(tmp_path):
    write_small(tmp_path, "kimi-k2.5")
    config = json.loads((tmp_path / "config.json").read_text())
    reader = open_checkpoint(tmp_path)
    assert reader.model_type == "kimi_k25"
    assert reader.layers() == [1, 2]
    assert_sizes(reader)
    quantization = config["quantization_config"]
    text = {**config["text_config"], "quantization_config": quantization}
    edit_config(tmp_path, quantization_config=None, text_config=text)
    assert_sizes(open_checkpoint(tmp_path))


def test_kimi_accepts_int32_shapes_and_checks_them(kimi):
    name = f"{KIMI_NAME}.weight_shape"
    edit_tensors(kimi, {name: torch.tensor([96, 64], dtype=torch.int32)})
    open_checkpoint(kimi).expert(1, 1)
    edit_tensors(kimi, {name: torch.tensor([64, 96])})
    message = r"up_proj.weight_shape: expected \[96, 64\], got \[64, 96\]"
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(kimi).expert(1, 1)


@pytest.mark.parametrize(
    ("weights", "name", "message"),
    [
        ({"symmetric": False}, "int4-asymmetric", "symmetric False is not supported, only True"),
        ({"group_size": 128}, "int4", "group_size 128 is not supported, only 32"),
        ({"num_bits": 8}, "int8", "num_bits 8 is not supported, only 4"),
        ({"strategy": "channel"}, "int4", "strategy 'channel' is not supported, only 'group'"),
        ({"actorder": "group"}, "int4", "actorder 'group' is not supported, only None"),
    ],
)
def test_other_compressed_tensors_schemes_are_refused(kimi, weights, name, message):
    quantization = json.loads((kimi / "config.json").read_text())["quantization_config"]
    quantization["config_groups"]["group_0"]["weights"].update(weights)
    edit_config(kimi, quantization_config=quantization)
    reader = open_checkpoint(kimi)
    assert reader.format == name
    assert reader.layers() == [1, 2]
    assert message in reader.unsupported[0]
    with pytest.raises(UnsupportedFormatError, match=message):
        reader.expert(1, 0)


def test_other_compressed_tensors_formats_and_activations_are_refused(kimi):
    quantization = json.loads((kimi / "config.json").read_text())["quantization_config"]
    for name in ("nvfp4-pack-quantized", "mxfp4-pack-quantized", "float-quantized"):
        edit_config(kimi, quantization_config={**quantization, "format": name})
        reader = open_checkpoint(kimi)
        assert reader.format == name
        assert f"format '{name}' is not supported yet" in reader.unsupported[0]
    edit_config(kimi, quantization_config=quantization, model_type="minimax_m3_vl")
    message = "the activation of model_type 'minimax_m3_vl' is not known"
    with pytest.raises(UnsupportedFormatError, match=message):
        open_checkpoint(kimi).expert(1, 0)


def test_compressed_tensors_groups_are_matched_by_name_first(kimi):
    quantization = json.loads((kimi / "config.json").read_text())["quantization_config"]
    group = quantization["config_groups"]["group_0"]
    other = {**group, "weights": {**group["weights"], "num_bits": 8}}
    quantization["config_groups"] = {
        "group_0": other,
        "group_1": {**group, "targets": ["re:.*mlp\\.experts.*"]},
    }
    edit_config(kimi, quantization_config=quantization)
    assert open_checkpoint(kimi).unsupported == ()
    quantization["config_groups"] = {"group_0": {**group, "targets": ["re:.*attn.*"]}}
    edit_config(kimi, quantization_config=quantization)
    with pytest.raises(CheckpointError, match="no group targets the experts"):
        open_checkpoint(kimi)


def edit_quantization(folder, group=None, **changes):
    quantization = json.loads((folder / "config.json").read_text())["quantization_config"]
    quantization["config_groups"]["group_0"].update(group or {})
    edit_config(folder, quantization_config={**quantization, **changes})


@pytest.mark.parametrize(
    ("group", "message"),
    [
        ({"targets": None}, "targets: expected a list of strings, got None"),
        ({"targets": [1]}, r"targets: expected a list of strings, got \[1\]"),
        ({"targets": ["re:("]}, r"targets: 're:\(' is no regular expression: missing \)"),
        ({"weights": [1]}, r"weights: expected an object, got \[1\]"),
    ],
)
def test_malformed_config_groups_are_named(kimi, group, message):
    edit_quantization(kimi, group)
    with pytest.raises(CheckpointError, match=rf"^config.json: config_groups.group_0.{message}"):
        open_checkpoint(kimi)


@pytest.mark.parametrize(
    ("ignore", "module"),
    [
        ("re:.*layers\\.2\\.mlp\\.experts", "model.layers.2.mlp.experts.0.gate_proj"),
        (KIMI_NAME, KIMI_NAME),
    ],
)
def test_experts_that_ignore_names_are_unsupported(kimi, ignore, module):
    edit_quantization(kimi, ignore=["lm_head", "re:.*self_attn.*", "re:.*shared_experts.*"])
    assert open_checkpoint(kimi).unsupported == ()
    edit_quantization(kimi, ignore=["lm_head", ignore])
    reader = open_checkpoint(kimi)
    assert reader.unsupported == (f"ignore: {ignore!r} leaves {module} unquantized",)
    with pytest.raises(UnsupportedFormatError, match="unquantized"):
        reader.check_layer(1)
    for value in (7, [7], ["re:["]):
        edit_quantization(kimi, ignore=value)
        with pytest.raises(CheckpointError, match=r"^config.json: ignore: "):
            open_checkpoint(kimi)


def test_targets_are_matched_with_the_checkpoints_own_names(kimi):
    edit_quantization(kimi, {"targets": ["re:language_model\\.model\\.layers\\..*"]})
    with pytest.raises(CheckpointError, match="no group targets the experts"):
        open_checkpoint(kimi)
    rename_tensors(kimi, "model.", "language_model.model.")
    assert_sizes(open_checkpoint(kimi))
