import json
import math
import time

import pytest
import torch
from checkpoint_tools import SMALL, edit_config, edit_tensors, rename_tensors, write_small
from safetensors.torch import load_file

from cpumoe.checkpoint import CheckpointError, UnsupportedFormatError, open_checkpoint
from cpumoe.formats import WEIGHT_FORMATS
from cpumoe.swiglu import SwiGLU

V4_NAME = "layers.1.ffn.experts.2.w2"
KIMI_NAME = "model.layers.1.mlp.experts.1.up_proj"


@pytest.fixture
def v4(tmp_path):
    return write_small(tmp_path, "v4-flash")


@pytest.fixture
def kimi(tmp_path):
    return write_small(tmp_path, "kimi-k2")


@pytest.fixture
def gpt_oss(tmp_path):
    return write_small(tmp_path, "gpt-oss-20b")


def assert_sizes(reader):
    assert reader.num_experts == SMALL["experts"]
    assert reader.hidden_size == SMALL["hidden"]
    assert reader.intermediate_size == SMALL["intermediate"]
    assert reader.top_k == SMALL["top_k"]
    assert reader.unsupported == ()
    weights = reader.expert(reader.layers()[0], 0)
    assert weights.gate.shape == weights.up.shape == (96, 64)
    assert weights.down.shape == (64, 96)
    bits = WEIGHT_FORMATS[reader.format].bits_per_weight
    assert weights.nbytes == 3 * 64 * 96 * bits / 8


def test_deepseek_v4(v4):
    with open_checkpoint(v4) as reader:
        assert reader.format == "mxfp4"
        assert reader.model_type == "deepseek_v4"
        assert reader.swiglu == SwiGLU(limit=10.0)
        assert reader.layers() == [0, 1]
        assert not reader.has_bias
        assert_sizes(reader)
        stored = load_file(v4 / "model.safetensors")
        weights = reader.expert(1, 2)
        for name, matrix in (("w1", weights.gate), ("w3", weights.up), ("w2", weights.down)):
            prefix = f"layers.1.ffn.experts.2.{name}"
            assert torch.equal(matrix.codes, stored[f"{prefix}.weight"].view(torch.uint8))
            assert torch.equal(matrix.scales, stored[f"{prefix}.scale"].view(torch.uint8))


def test_deepseek_v4_dequantizes_as_transformers(v4):
    fp8 = pytest.importorskip("transformers.integrations.finegrained_fp8")
    stored = load_file(v4 / "model.safetensors")
    oracle = fp8.Fp8Dequantize(None)
    down = open_checkpoint(v4).expert(1, 2).down
    expected = oracle._dequantize_one(
        stored[f"{V4_NAME}.weight"], stored[f"{V4_NAME}.scale"], torch.float32
    )
    assert torch.equal(WEIGHT_FORMATS["mxfp4"].dequantize(down.codes, down.scales), expected)


def test_deepseek_v4_variants(v4):
    """A `model.` prefix, uint8 for both dtypes, MTP layers, expert_dtype in the inner config."""
    expected = open_checkpoint(v4).expert(1, 2).down
    stored = load_file(v4 / "model.safetensors")
    weight, scale = f"{V4_NAME}.weight", f"{V4_NAME}.scale"
    mtp = {f"mtp.0.ffn.experts.0.w1.{kind}": torch.zeros(1) for kind in ("weight", "scale")}
    as_bytes = {name: stored[name].view(torch.uint8) for name in (weight, scale)}
    edit_tensors(v4, {**as_bytes, **mtp})
    rename_tensors(v4, "layers.", "model.layers.")
    quantization = json.loads((v4 / "config.json").read_text())["quantization_config"]
    edit_config(v4, expert_dtype=None, quantization_config={**quantization, "expert_dtype": "fp4"})
    reader = open_checkpoint(v4)
    assert reader.layers() == [0, 1]
    got = reader.expert(1, 2).down
    assert torch.equal(got.codes, expected.codes)
    assert torch.equal(got.scales, expected.scales)
    edit_config(v4, quantization_config=quantization)  # neither level says: the dtype does
    rename_tensors(v4, "model.layers.", "layers.")
    assert open_checkpoint(v4).format == "mxfp4"


def test_deepseek_v4_with_fp8_experts_is_refused_by_name(v4):
    edit_config(v4, expert_dtype="fp8")
    reader = open_checkpoint(v4)
    assert reader.format == "fp8_block"
    assert reader.layers() == [0, 1]
    message = (
        r"fp8_block experts: expert_dtype 'fp8' \(as in DeepSeek-V4-Flash-Base\) is not supported "
        r"yet, only 'fp4'. Supported formats: mxfp4, int4"
    )
    with pytest.raises(UnsupportedFormatError, match=message):
        reader.expert(0, 0)


def test_deepseek_v4_takes_its_limit_from_the_config(v4):
    edit_config(v4, swiglu_limit=7)
    assert open_checkpoint(v4).swiglu == SwiGLU(limit=7.0)


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
    assert open_checkpoint(tmp_path).swiglu.limit is None


def test_gpt_oss(gpt_oss):
    reader = open_checkpoint(gpt_oss)
    assert reader.format == "mxfp4"
    assert reader.swiglu == SwiGLU(alpha=1.702, limit=7.0, up_offset=1.0)
    assert reader.has_bias
    assert reader.layers() == [0, 1]
    assert_sizes(reader)


def test_gpt_oss_rows_are_views_and_dequantize_as_transformers(gpt_oss):
    mxfp4 = pytest.importorskip("transformers.integrations.mxfp4")
    stored = load_file(gpt_oss / "model.safetensors")
    prefix = "model.layers.1.mlp.experts."
    dense = {
        name: mxfp4.dequantize_convertops(
            stored[f"{prefix}{name}_blocks"], stored[f"{prefix}{name}_scales"], torch.float32
        )
        for name in ("gate_up_proj", "down_proj")
    }
    reader = open_checkpoint(gpt_oss)
    fmt = WEIGHT_FORMATS["mxfp4"]
    for index in range(3):
        w = reader.expert(1, index)
        assert w.gate.codes.stride() == (64, 1)
        assert w.up.codes.data_ptr() == w.gate.codes.data_ptr() + 32
        gate_up, bias = dense["gate_up_proj"][index], stored[f"{prefix}gate_up_proj_bias"][index]
        assert torch.equal(fmt.dequantize(w.gate.codes, w.gate.scales), gate_up[:, 0::2].T)
        assert torch.equal(fmt.dequantize(w.up.codes, w.up.scales), gate_up[:, 1::2].T)
        expected = dense["down_proj"][index].T
        assert torch.equal(fmt.dequantize(w.down.codes, w.down.scales), expected)
        assert torch.equal(w.gate_bias, bias[0::2])
        assert torch.equal(w.up_bias, bias[1::2])
        assert torch.equal(w.down_bias, stored[f"{prefix}down_proj_bias"][index])


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


@pytest.mark.parametrize(
    ("quantization", "name"),
    [
        (None, "bf16"),
        ({"quant_method": "fp8", "weight_block_size": [128, 128]}, "fp8_block"),
        ({"quant_method": "awq", "bits": 4}, "awq"),
        ({"quant_method": "gptq", "bits": 4}, "gptq"),
        ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, "nvfp4"),
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


def test_dense_models_are_no_checkpoint_of_ours(v4):
    edit_config(v4, n_routed_experts=None, model_type="llama")
    message = "not a Mixture-of-Experts model: .* got model_type 'llama'"
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
    edit_config(v4, hidden_size=2890)
    message = "mxfp4: hidden_size must be a positive multiple of 32, got 2890"
    with pytest.raises(ValueError, match=message):
        open_checkpoint(v4)


def test_config_is_checked_against_the_tensors(v4):
    edit_config(v4, hidden_size=128)
    message = r"layers.0.ffn.experts.0.w1.weight: expected uint8 or int8 \[96, 64\], got int8 \[96"
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
            rf"{V4_NAME}.weight: expected uint8 or int8 \[64, 48\], got int8 \[64, 47\]",
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


def test_gpt_oss_nan_scales_name_the_expert(gpt_oss):
    name = "model.layers.0.mlp.experts.down_proj_scales"
    scales = load_file(gpt_oss / "model.safetensors")[name]
    scales[2, 5, 1] = 255
    edit_tensors(gpt_oss, {name: scales})
    reader = open_checkpoint(gpt_oss)
    reader.expert(0, 1)
    with pytest.raises(ValueError, match=r"down_proj_scales\[2\]: .* at index \[5, 1\]"):
        reader.expert(0, 2)


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
    """43 layers x 256 experts: 66,048 tensors; generous, to catch only quadratic work."""
    weight_map = {
        f"layers.{layer}.ffn.experts.{expert}.{name}.{kind}": "model.safetensors"
        for layer in range(43)
        for expert in range(256)
        for name in ("w1", "w2", "w3")
        for kind in ("weight", "scale")
    }
    (v4 / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    edit_config(v4, num_hidden_layers=43, n_routed_experts=256)
    start = time.perf_counter()
    reader = open_checkpoint(v4)
    assert reader.layers() == list(range(43))
    for _ in range(100):
        reader.layers()
        reader.expert(1, 2)
    assert time.perf_counter() - start < 5


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


@pytest.mark.parametrize("count", [10**9, 2**70])
def test_layers_come_from_the_tensors(v4, count):
    edit_config(v4, num_hidden_layers=count)
    start = time.perf_counter()
    assert open_checkpoint(v4).layers() == [0, 1]
    assert time.perf_counter() - start < 5


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


def test_check_layer_sees_wrong_sizes_and_missing_shards(v4):
    edit_config(v4, hidden_size=128)
    with pytest.raises(CheckpointError, match=r"experts.0.w1.weight: expected .* \[96, 64\], got"):
        open_checkpoint(v4).check_layer(0)
    edit_config(v4, hidden_size=64)
    reader = open_checkpoint(v4)
    (v4 / "model.safetensors").rename(v4 / "elsewhere")
    with pytest.raises(FileNotFoundError, match="missing shard"):
        reader.check_layer(0)
