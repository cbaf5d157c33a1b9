import json

import pytest
import torch
from checkpoint_tools import assert_sizes, edit_config, edit_tensors, rename_tensors, write_small
from cli_tools import refuse, succeed
from safetensors.torch import load_file, save_file

import cpumoe
from cpumoe.checkpoint import CheckpointError, UnsupportedFormatError, open_checkpoint
from cpumoe.formats import WEIGHT_FORMATS
from cpumoe.numerics.glu import SwiGLU

KIMI_NAME = "model.layers.1.mlp.experts.1.up_proj"


def test_kimi_int4(kimi):
    reader = open_checkpoint(kimi)
    assert reader.format == "int4"
    assert reader.activation == SwiGLU()
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
        ({"group_size": 48}, "int4", "group_size 48 is not supported, only multiples of 32"),
        ({"num_bits": 8}, "int8", "num_bits 8 is not supported, only 4"),
        (
            {"strategy": "tensor"},
            "int4",
            "strategy 'tensor' is not supported, only 'group' and 'channel'",
        ),
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


def test_other_compressed_tensors_formats_are_refused(kimi):
    quantization = json.loads((kimi / "config.json").read_text())["quantization_config"]
    for name in ("mxfp8-quantized", "mxfp6-packed", "int-quantized"):
        edit_config(kimi, quantization_config={**quantization, "format": name})
        reader = open_checkpoint(kimi)
        assert reader.format == name
        assert f"format '{name}' is not supported yet" in reader.unsupported[0]


def test_an_activation_that_the_config_does_not_tell_is_the_callers_to_say(kimi):
    expected = cpumoe.Experts.from_checkpoint(kimi, 1).export(0)
    edit_config(kimi, model_type="new_moe")
    reader = open_checkpoint(kimi)
    assert (reader.unsupported, reader.activation) == ((), None)
    message = (
        "config.json does not specify the activation of model_type 'new_moe'; pass activation="
    )
    with pytest.raises(UnsupportedFormatError, match=message):
        cpumoe.Experts.from_checkpoint(kimi, 1)
    for command in (["validate", kimi], ["bench", "--model", kimi]):
        said = refuse(*command)
        assert "does not specify the activation of model_type 'new_moe'; check" in said
        assert f"cpumoe eval {kimi} --text FILE --experts all" in said
    assert "unknown" in succeed("inspect", kimi)
    experts = cpumoe.Experts.from_checkpoint(kimi, 1, activation=SwiGLU(limit=7.0))
    assert experts.activation == SwiGLU(limit=7.0)
    assert torch.equal(experts.export(0).gate.codes, expected.gate.codes)


@pytest.mark.parametrize("activations", [None, {"num_bits": 8, "dynamic": True}, {"num_bits": 8}])
def test_what_the_config_says_of_activations_does_not_matter(kimi, activations):
    edit_quantization(
        kimi, {"input_activations": activations}, kv_cache_scheme={"num_bits": 8, "type": "float"}
    )
    assert open_checkpoint(kimi).unsupported == ()


def test_experts_without_a_gate_are_refused_as_such(kimi):
    tensors = load_file(kimi / "model.safetensors")
    edit_tensors(kimi, dict.fromkeys(n for n in tensors if ".gate_proj." in n))
    message = "experts without a gate projection are not supported"
    with pytest.raises(UnsupportedFormatError, match=message):
        open_checkpoint(kimi).check_supported()
    rename_tensors(kimi, "model.", "backbone.")
    with pytest.raises(UnsupportedFormatError, match=message):
        open_checkpoint(kimi).check_supported()


def test_experts_biases_are_refused_not_left_out(kimi):
    edit_tensors(kimi, {f"{KIMI_NAME}.bias": torch.ones(96)})
    with pytest.raises(UnsupportedFormatError, match=f"biases of experts .*: {KIMI_NAME}.bias"):
        open_checkpoint(kimi).check_supported()


def test_kimi_needs_no_weight_shape(kimi):
    expected = open_checkpoint(kimi).expert(1, 1).up
    tensors = load_file(kimi / "model.safetensors")
    edit_tensors(kimi, dict.fromkeys(n for n in tensors if n.endswith("weight_shape")))
    reader = open_checkpoint(kimi)
    reader.check_layer(1)
    assert torch.equal(reader.expert(1, 1).up.codes, expected.codes)


@pytest.mark.parametrize("block", ["block_sparse_moe", "feed_forward", "mixer"])
@pytest.mark.parametrize("names", [("gate_proj", "up_proj", "down_proj"), ("w1", "w3", "w2")])
def test_blocks_and_projections_have_several_names(kimi, block, names):
    expected = open_checkpoint(kimi).expert(1, 1)
    tensors = {}
    for name, tensor in load_file(kimi / "model.safetensors").items():
        name = name.replace(".mlp.", f".{block}.")
        for old, new in zip(("gate_proj", "up_proj", "down_proj"), names, strict=True):
            name = name.replace(f".{old}.", f".{new}.")
        tensors[name] = tensor
    save_file(tensors, kimi / "model.safetensors")
    edit_quantization(kimi, ignore=["lm_head"])
    reader = open_checkpoint(kimi)
    reader.check_layer(2)
    weights = reader.expert(1, 1)
    for name in ("gate", "up", "down"):
        assert torch.equal(getattr(weights, name).codes, getattr(expected, name).codes)


@pytest.mark.parametrize("preset", ["MXFP4A16", "MXFP4"])
def test_mxfp4_pack_quantized_is_read_as_compressed_tensors_writes_it(kimi, preset):
    quantization = pytest.importorskip("compressed_tensors.quantization")
    mxfp4 = pytest.importorskip("compressed_tensors.compressors.mxfp4.base")
    scheme = quantization.preset_name_to_scheme(preset, ["Linear"])
    generator = torch.Generator().manual_seed(6)
    dense, changes = {}, {}
    for name, tensor in load_file(kimi / "model.safetensors").items():
        if not name.endswith("weight_packed"):
            continue
        stem = name.removesuffix("_packed")
        n, k = tensor.shape[0], tensor.shape[1] * 8
        # The library has scales as powers of two before it packs their exponents.
        scale = torch.exp2(torch.randint(-6, 2, (n, k // 32), generator=generator)).bfloat16()
        weight = torch.randn(n, k, generator=generator).bfloat16()
        packed = mxfp4.MXFP4PackedCompressor.compress(
            {"weight": weight, "weight_scale": scale}, scheme
        )
        assert set(packed) == {"weight_packed", "weight_scale"}
        back = mxfp4.MXFP4PackedCompressor.decompress(dict(packed), scheme)
        dense[stem] = back["weight"].float()
        changes |= {f"{stem}_packed": packed["weight_packed"], f"{stem}_shape": None}
        changes[f"{stem}_scale"] = packed["weight_scale"]
    edit_tensors(kimi, changes)
    group = json.loads(scheme.model_dump_json())
    edit_quantization(kimi, group, format="mxfp4-pack-quantized")
    reader = open_checkpoint(kimi)
    assert (reader.format, reader.unsupported) == ("mxfp4", ())
    reader.check_layer(2)
    weights = reader.expert(2, 1)
    for name in ("gate", "up", "down"):
        matrix = getattr(weights, name)
        expected = dense[f"model.layers.2.mlp.experts.1.{name}_proj.weight"]
        actual = WEIGHT_FORMATS["mxfp4"].dequantize(matrix.codes, matrix.scales)
        assert torch.equal(actual, expected)
        assert expected.abs().max() > 1
    edit_quantization(kimi, {"weights": {**group["weights"], "group_size": 16}})
    message = "group_size 16 is not supported, only 32"
    with pytest.raises(UnsupportedFormatError, match=message):
        open_checkpoint(kimi).check_supported()


@pytest.mark.parametrize("dtype", WEIGHT_FORMATS["int4"].scale_dtypes, ids=str)
@pytest.mark.parametrize("group", [32, 64, 128, None], ids=["32", "64", "128", "channel"])
def test_pack_quantized_groups_are_read_as_compressed_tensors_writes_them(tmp_path, group, dtype):
    quantization = pytest.importorskip("compressed_tensors.quantization")
    base = pytest.importorskip("compressed_tensors.compressors.pack_quantized.base")
    compressor = base.PackedQuantizationCompressor
    folder = write_small(tmp_path, "kimi-k2", hidden=256, intermediate=128)
    strategy = "channel" if group is None else "group"
    arguments = quantization.QuantizationArgs(num_bits=4, group_size=group, strategy=strategy)
    scheme = quantization.QuantizationScheme(targets=["Linear"], weights=arguments)
    generator = torch.Generator().manual_seed(6)
    dense, changes = {}, {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        if not name.endswith("weight_packed"):
            continue
        stem = name.removesuffix("_packed")
        n, k = tensor.shape[0], tensor.shape[1] * 8
        scale = torch.rand(n, 1 if group is None else k // group, generator=generator).to(dtype)
        weight = torch.randn(n, k, generator=generator).to(dtype)
        packed = compressor.compress({"weight": weight, "weight_scale": scale}, scheme)
        dense[stem] = compressor.decompress(dict(packed), scheme)["weight"].float()
        changes |= {f"{stem}_{kind}": packed[f"weight_{kind}"] for kind in ("packed", "scale")}
    edit_tensors(folder, changes)
    edit_quantization(folder, json.loads(scheme.model_dump_json()))
    reader = open_checkpoint(folder)
    assert (reader.format, reader.unsupported) == ("int4", ())
    reader.check_layer(2)
    experts = cpumoe.Experts.from_checkpoint(folder, 2)
    for name in ("gate", "up", "down"):
        matrix = getattr(reader.expert(2, 1), name)
        assert matrix.scales.dtype == dtype
        # The library rounds products to the dtype of scales.
        actual = WEIGHT_FORMATS["int4"].dequantize(matrix.codes, matrix.scales).to(dtype).float()
        assert torch.equal(actual, dense[f"model.layers.2.mlp.experts.1.{name}_proj.weight"])
        assert torch.equal(getattr(experts.export(1), name).scales, matrix.scales)


def test_rows_and_scales_must_tell_the_group(kimi):
    group = json.loads((kimi / "config.json").read_text())["quantization_config"]
    weights = group["config_groups"]["group_0"]["weights"]
    edit_quantization(kimi, {"weights": {**weights, "group_size": 96}})
    edit_config(kimi, moe_intermediate_size=160)  # two scales as for groups of 128
    with pytest.raises(
        CheckpointError,
        match=r"intermediate_size: expected a multiple of the group size 96, got 160",
    ):
        open_checkpoint(kimi)


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
    ("ignore", "reason"),
    [
        (
            "re:.*layers\\.2\\.mlp\\.experts",
            "leaves model.layers.2.mlp.experts.0.gate_proj unquantized, but its layer's experts "
            "have scales",
        ),
        (KIMI_NAME, "it names 1 of 3 experts like model.layers.1.mlp.experts.0.up_proj; all"),
    ],
)
def test_ignore_lists_that_the_tensors_contradict_are_refused(kimi, ignore, reason):
    edit_quantization(kimi, ignore=["lm_head", "re:.*self_attn.*", "re:.*shared_experts.*"])
    assert open_checkpoint(kimi).unsupported == ()
    edit_quantization(kimi, ignore=["lm_head", ignore])
    reader = open_checkpoint(kimi)
    assert reason in reader.unsupported[0]
    with pytest.raises(UnsupportedFormatError, match="ignore: "):
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
