import json
import math
import time

import pytest
import torch
from checkpoint_tools import edit_config, edit_tensors, split_into_shards, write_small

import cpumoe
from cpumoe.checkpoint import CheckpointError, UnsupportedFormatError, open_checkpoint

V4_NAME = "layers.1.ffn.experts.2.w2"


@pytest.mark.parametrize("model", ["v4-flash", "gpt-oss-20b"])
def test_swiglu_limit_must_be_positive_or_null(tmp_path, model):
    write_small(tmp_path, model)
    for value in ("ten", 0, -1, True, [7], math.inf, math.nan, 10**400):
        edit_config(tmp_path, swiglu_limit=value)
        message = r"config.json: swiglu_limit: expected a positive number, got "
        with pytest.raises(CheckpointError, match=message):
            open_checkpoint(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "swiglu_limit": None}))
    assert open_checkpoint(tmp_path).activation.limit is None


@pytest.mark.parametrize(
    ("quantization", "name"),
    [
        ({"quant_method": "awq", "bits": 4}, "awq"),
        ({"quant_method": "gptq", "bits": 4}, "gptq"),
    ],
)
def test_unsupported_formats_open_for_inspection(kimi, quantization, name):
    edit_config(kimi, quantization_config=quantization, model_type="deepseek_v3")
    reader = open_checkpoint(kimi)
    assert reader.format == name
    assert reader.layers() == [1, 2]
    assert reader.num_experts == 3
    assert reader.unsupported == (f"{name} experts of model_type 'deepseek_v3' have no reader yet",)
    message = rf"{name} experts: .* have no reader yet. Supported formats: mxfp4, int4"
    with pytest.raises(UnsupportedFormatError, match=message):
        reader.expert(1, 0)


def test_scales_that_the_config_does_not_mention_are_named(kimi):
    edit_config(kimi, quantization_config=None, model_type="deepseek_v3")
    reader = open_checkpoint(kimi)
    (reason,) = reader.unsupported
    assert reason.startswith("config.json has no quantization_config, but experts have ")
    assert "experts.0.down_proj.weight_scale; use the config.json that was published" in reason
    assert reader.layers() == [1, 2]


def test_dense_models_are_no_checkpoint_of_ours(v4):
    edit_config(v4, n_routed_experts=None, model_type="llama")
    message = "not a Mixture-of-Experts model: .* model_type is 'llama'"
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(v4)


@pytest.mark.parametrize(
    ("key", "value"), [("hidden_size", None), ("num_hidden_layers", "2"), ("n_routed_experts", 0)]
)
def test_sizes_must_be_positive_integers(v4, key, value):
    edit_config(v4, **{key: value})
    if key == "n_routed_experts":
        edit_config(v4, n_routed_experts=0)
    with pytest.raises(CheckpointError, match=rf"{key}: expected a positive integer, got"):
        open_checkpoint(v4)


def test_sizes_that_the_format_does_not_allow(v4):
    edit_config(v4, hidden_size=2889)
    message = "mxfp4: hidden_size must be a multiple of 2, because a byte has 2 codes, got 2889"
    with pytest.raises(ValueError, match=message):
        open_checkpoint(v4)


def test_config_is_checked_against_the_tensors(v4):
    edit_config(v4, hidden_size=128)
    message = (
        r"layers.0.ffn.experts.0.w1.weight: expected uint8 or int8.* \[96, 64\], got int8 \[96"
    )
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(v4).expert(0, 0)


@pytest.mark.parametrize(
    ("suffix", "tensor", "message"),
    [
        ("weight", None, rf"{V4_NAME}.weight: no such tensor in "),
        ("scale", None, rf"{V4_NAME}.scale: no such tensor in "),
        (
            "scale",
            torch.ones(64, 3),
            rf"{V4_NAME}.scale: expected float8_e8m0fnu or uint8 \[64, 3\], got float32 \[64, 3\]",
        ),
        (
            "weight",
            torch.ones(64, 47, dtype=torch.int8),
            rf"{V4_NAME}.weight: expected uint8 or int8.* \[64, 48\], got int8 \[64, 47\]",
        ),
        (
            "scale",
            torch.full((64, 3), 255, dtype=torch.uint8).view(torch.float8_e8m0fnu),
            rf"{V4_NAME}.scale: scales must be finite, got 255 \(NaN\) at index \[0, 0\]",
        ),
    ],
)
def test_damaged_tensors_are_named(v4, suffix, tensor, message):
    edit_tensors(v4, {f"{V4_NAME}.{suffix}": tensor})
    reader = open_checkpoint(v4)
    reader.expert(1, 1)
    with pytest.raises(ValueError, match=message):
        reader.expert(1, 2)


def test_packing_names_the_tensor_with_a_nan_scale(v4):
    name = f"{V4_NAME}.scale"
    scales = torch.full((64, 3), 127, dtype=torch.uint8)
    scales[17, 2] = 255
    edit_tensors(v4, {name: scales.view(torch.float8_e8m0fnu)})
    cpumoe.Experts.from_checkpoint(v4, layer=0)
    message = rf"^{name}: scale \[17, 2\] is nan; mxfp4 scales must be finite: the check"
    with pytest.raises(ValueError, match=message):
        cpumoe.Experts.from_checkpoint(v4, layer=1)


def test_layers_and_experts_out_of_range(v4):
    reader = open_checkpoint(v4)
    with pytest.raises(IndexError, match=r"layer 2 has no routed experts in .*; layers 0..1 have"):
        reader.expert(2, 0)
    for index in (-1, 3):
        with pytest.raises(IndexError, match=rf"layer 0: expected expert 0..2, got {index}"):
            reader.expert(0, index)


def test_closed_reader_says_so_and_keeps_tensors_valid(v4):
    with open_checkpoint(v4) as reader:
        weights = reader.expert(0, 0)
        expected = weights.gate.codes.clone()
    assert torch.equal(weights.gate.codes, expected)
    with pytest.raises(ValueError, match="the checkpoint is closed"):
        reader.expert(0, 0)


def test_a_full_index_opens_quickly(v4):
    """43 layers x 256 experts: 66,048 tensors. The limit only catches quadratic work."""
    weight_map = {
        f"layers.{layer}.ffn.experts.{expert}.{name}.{kind}": "model-1.safetensors"
        for layer in range(43)
        for expert in range(256)
        for name in ("w1", "w2", "w3")
        for kind in ("weight", "scale")
    }
    (v4 / "model.safetensors").rename(v4 / "model-1.safetensors")
    (v4 / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    edit_config(v4, num_hidden_layers=43, n_routed_experts=256)
    start = time.process_time()
    reader = open_checkpoint(v4)
    assert reader.layers() == list(range(43))
    for _ in range(100):
        reader.layers()
        reader.expert(1, 2)
    assert time.process_time() - start < 5


@pytest.mark.parametrize("count", [10**9, 2**70])
def test_layers_come_from_the_tensors(v4, count):
    edit_config(v4, num_hidden_layers=count)
    start = time.process_time()
    assert open_checkpoint(v4).layers() == [0, 1]
    assert time.process_time() - start < 5


@pytest.mark.parametrize("model", ["v4-flash", "kimi-k2", "gpt-oss-20b"])
def test_check_layer(tmp_path, model):
    write_small(tmp_path, model)
    reader = open_checkpoint(tmp_path)
    for layer in reader.layers():
        reader.check_layer(layer)
    with pytest.raises(IndexError, match="layer 7 has no routed experts"):
        reader.check_layer(7)
    config = json.loads((tmp_path / "config.json").read_text())
    key = "num_local_experts" if "num_local_experts" in config else "n_routed_experts"
    for count in (4, 10**6, 2**62, 2**70):
        edit_config(tmp_path, **{key: count})
        reader = open_checkpoint(tmp_path)
        name = "gate_up_proj_blocks: expected" if model == "gpt-oss-20b" else f"{count - 1}."
        message = rf"experts\.{name}.*; config.json: {count} experts, hidden size 64, interm"
        with pytest.raises(CheckpointError, match=message):
            reader.check_layer(reader.layers()[0])


def test_check_layer_sees_wrong_sizes_and_missing_shards(v4, tmp_path):
    edit_config(v4, hidden_size=128)
    with pytest.raises(CheckpointError, match=r"experts.0.w1.weight: expected .* \[96, 64\], got"):
        open_checkpoint(v4).check_layer(0)
    edit_config(v4, hidden_size=64)
    reader = open_checkpoint(split_into_shards(v4, tmp_path, 2))
    (tmp_path / "model-00001-of-00002.safetensors").rename(tmp_path / "elsewhere")
    with pytest.raises(FileNotFoundError, match="missing shard"):
        reader.check_layer(0)


@pytest.mark.parametrize("model", ["v4-flash", "gpt-oss-20b", "kimi-k2"])
def test_another_gate_is_not_supported(tmp_path, model):
    write_small(tmp_path, model)
    for known in ("silu", "swish", None):
        edit_config(tmp_path, hidden_act=known)
        assert open_checkpoint(tmp_path).unsupported == ()
    edit_config(tmp_path, hidden_act="quick_gelu")
    with pytest.raises(UnsupportedFormatError, match="hidden_act 'quick_gelu' is not supported"):
        open_checkpoint(tmp_path).check_supported()
