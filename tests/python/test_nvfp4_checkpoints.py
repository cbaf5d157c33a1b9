"""Checkpoints with NVFP4 experts: ModelOpt's, and compressed-tensors'."""

import json

import pytest
import torch
from checkpoint_tools import SMALL, edit_config, edit_tensors, write_small
from cli_tools import succeed
from safetensors.torch import load_file

from cpumoe import Experts
from cpumoe.checkpoint import CheckpointError, UnsupportedFormatError, open_checkpoint
from cpumoe.formats import weight_format

NVFP4 = weight_format("nvfp4")
MODELOPT, PACKED = "DeepSeek-R1-NVFP4", "Qwen3-30B-A3B-NVFP4"
FIRST = {MODELOPT: 3, PACKED: 0}
FACTOR = {MODELOPT: "weight_scale_2", PACKED: "weight_global_scale"}
CODES = {MODELOPT: "weight", PACKED: "weight_packed"}
# The values of E2M1's codes.
E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])


def stem(model, layer=0, expert=0, name="gate"):
    return f"model.layers.{FIRST[model] + layer}.mlp.experts.{expert}.{name}_proj"


def stored_weights(tensors, name, model):
    """The weights by the formula: code * (scale * factor)."""
    codes = tensors[f"{name}.{CODES[model]}"]
    values = E2M1[torch.stack((codes & 15, codes >> 4), -1).flatten(1).int()]
    scales = tensors[f"{name}.weight_scale"].float()
    factor = tensors[f"{name}.{FACTOR[model]}"].reshape(())
    scales = scales * (factor if model == MODELOPT else 1 / factor)
    return values * scales.repeat_interleave(16, 1)


def dense(matrix):
    return NVFP4.dequantize(matrix.codes, matrix.scales, matrix.factor)


@pytest.fixture(params=[MODELOPT, PACKED])
def model(request):
    return request.param


@pytest.fixture
def folder(tmp_path, model):
    return write_small(tmp_path, model)


def test_experts_are_read_as_stored_before_and_after_packing(folder, model):
    tensors = load_file(folder / "model.safetensors")
    reader = open_checkpoint(folder)
    assert (reader.format, reader.unsupported) == ("nvfp4", ())
    for number, layer in enumerate(reader.layers()):
        reader.check_layer(layer)
        assert reader.group_size(layer, 64) == 16
        packed = Experts.from_checkpoint(reader, layer, isa="generic", progress=False)
        for index in range(SMALL["experts"]):
            expert, back = reader.expert(layer, index), packed.export(index)
            factors = set()
            for name in ("gate", "up", "down"):
                expected = stored_weights(tensors, stem(model, number, index, name), model)
                for matrix in (getattr(expert, name), getattr(back, name)):
                    assert torch.equal(dense(matrix), expected)
                factors.add(getattr(expert, name).factor.item())
            assert len(factors) == 3


def test_commands_write_and_read_nvfp4(folder, model):
    assert "nvfp4" in succeed("inspect", folder)
    assert json.loads(succeed("inspect", folder, "--json"))["supported"]
    assert json.loads(succeed("inspect", model, "--json"))["supported"]
    succeed("validate", folder, "--isa", "generic")


@pytest.mark.parametrize("power_of_two", [True, False])
def test_packed_experts_are_those_of_compressed_tensors(tmp_path, power_of_two):
    quantization = pytest.importorskip("compressed_tensors.quantization")
    compressor = pytest.importorskip(
        "compressed_tensors.compressors.nvfp4.base"
    ).NVFP4PackedCompressor
    write_small(tmp_path, PACKED)
    scheme = quantization.preset_name_to_scheme("NVFP4", ["Linear"])
    generator = torch.Generator().manual_seed(6)
    weights, changes = {}, {}
    for name in [stem(PACKED, 0, 1, name) for name in ("gate", "up", "down")]:
        n, k = (64, 96) if "down" in name else (96, 64)
        weight = torch.randn(n, k, generator=generator)
        divisor = torch.rand(1, generator=generator) + 1000
        divisor = divisor.log2().round().exp2() if power_of_two else divisor
        amax = weight.reshape(n, -1, 16).abs().amax(-1)
        scale = (amax / 6 * divisor).to(torch.float8_e4m3fn)
        state = {
            "weight": weight,
            "weight_scale": scale.float(),
            "weight_global_scale": divisor,
        }
        packed = compressor.compress(state, scheme)
        changes |= {f"{name}.{kind}": packed[kind] for kind in packed if kind != "weight"}
        weights[name] = dequantized(packed, scheme.weights)
    edit_tensors(tmp_path, changes)
    edit_quantization(tmp_path, config_groups={"group_0": json.loads(scheme.model_dump_json())})
    expert = open_checkpoint(tmp_path).expert(0, 1)
    for name in ("gate", "up", "down"):
        actual, expected = dense(getattr(expert, name)), weights[stem(PACKED, 0, 1, name)]
        if power_of_two:
            assert torch.equal(actual, expected)
        else:  # the library divides by the number, instead of multiplying with its inverse
            assert ((actual - expected).abs() <= 2.0**-23 * expected.abs()).all()


def dequantized(packed, arguments):
    """compressed-tensors' weights in float32, to which its decompressor adds rounding to bf16."""
    forward = pytest.importorskip("compressed_tensors.quantization.lifecycle.forward")
    helpers = pytest.importorskip("compressed_tensors.compressors.nvfp4.helpers")
    codes = packed["weight_packed"]
    return forward.dequantize(
        x_q=helpers.unpack_fp4_from_uint8(codes, codes.shape[0], 2 * codes.shape[1]).float(),
        scale=packed["weight_scale"].float(),
        args=arguments,
        global_scale=packed["weight_global_scale"],
        dtype=torch.float32,
    )


def edit_quantization(folder, **changes):
    quantization = json.loads((folder / "config.json").read_text())["quantization_config"]
    edit_config(folder, quantization_config={**quantization, **changes})


def test_older_checkpoints_are_described_in_a_file_of_their_own(tmp_path):
    folder = write_small(tmp_path, MODELOPT)
    edit_config(folder, quantization_config=None)
    assert open_checkpoint(folder).unsupported
    quantization = {"quant_algo": "NVFP4", "kv_cache_quant_algo": "FP8", "group_size": 16}
    document = {"producer": {"name": "modelopt"}, "quantization": quantization}
    (folder / "hf_quant_config.json").write_text(json.dumps(document))
    assert (open_checkpoint(folder).format, open_checkpoint(folder).unsupported) == ("nvfp4", ())


@pytest.mark.parametrize("algorithm", ["NVFP4", "W4A16_NVFP4", "MIXED_PRECISION"])
def test_layers_of_modelopt_may_differ(tmp_path, algorithm):
    folder = write_small(tmp_path, MODELOPT, layers=3)
    edit_quantization(folder, quant_algo=algorithm)
    tensors = load_file(folder / "model.safetensors")
    changes = dict.fromkeys(n for n in tensors if ".experts." in n and "layers.4." in n)
    changes |= dict.fromkeys(n for n in tensors if ".experts." in n and "layers.5." in n)
    for index in range(SMALL["experts"]):
        for name in ("gate", "up", "down"):
            source, plain, fp8 = (stem(MODELOPT, layer, index, name) for layer in range(3))
            weight = stored_weights(tensors, source, MODELOPT)
            changes[f"{plain}.weight"] = weight.bfloat16()
            changes[f"{fp8}.weight"] = (weight * 64).to(torch.float8_e4m3fn)
            changes[f"{fp8}.weight_scale"] = torch.tensor(1 / 64)
    edit_tensors(folder, changes)
    reader = open_checkpoint(folder)
    third = "fp8" if algorithm == "MIXED_PRECISION" else "nvfp4"
    assert [reader.layer_format(layer) for layer in (3, 4, 5)] == ["nvfp4", "bf16", third]
    codes = changes[f"{stem(MODELOPT, 1, 2, 'up')}.weight"]
    assert torch.equal(reader.expert(4, 2).up.codes, codes)
    if third == "fp8":
        assert torch.equal(reader.expert(5, 2).up.scales, torch.full((96, 1), 1 / 64))
    else:
        with pytest.raises(CheckpointError, match=r"gate_proj\.weight_scale_2: no such tensor"):
            reader.check_layer(5)


def test_experts_whose_inputs_are_scaled_are_refused(tmp_path):
    folder = write_small(tmp_path, MODELOPT)
    name = f"{stem(MODELOPT)}.pre_quant_scale"
    edit_tensors(folder, {name: torch.ones(64)})
    with pytest.raises(UnsupportedFormatError, match=rf"inputs are scaled .*: {name}"):
        open_checkpoint(folder).expert(3, 0)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -1.0])
def test_factors_that_are_no_numbers_are_refused(folder, model, value):
    name = f"{stem(model)}.{FACTOR[model]}"
    edit_tensors(folder, {name: torch.tensor([value])})
    with pytest.raises(CheckpointError, match=rf"^{name}: expected a number that is .*, got "):
        open_checkpoint(folder).expert(FIRST[model], 0)


@pytest.mark.parametrize("value", [0.0, 1e-40])
def test_divisors_without_a_finite_inverse_are_refused(tmp_path, value):
    write_small(tmp_path, PACKED)
    name = f"{stem(PACKED)}.weight_global_scale"
    edit_tensors(tmp_path, {name: torch.tensor([value])})
    with pytest.raises(CheckpointError, match=f"{name}: expected a number that is positive"):
        Experts.from_checkpoint(tmp_path, 0)


@pytest.mark.parametrize(
    ("kind", "tensor", "message"),
    [
        ("weight_scale", torch.ones(96, 4), r"expected float8_e4m3fn \[96, 4\], got float32"),
        ("weight_scale", torch.ones(96, 2).to(torch.float8_e4m3fn), r"\[96, 4\], got .*\[96, 2\]"),
        ("weight_scale", None, "no such tensor"),
        ("factor", None, "no such tensor"),
        ("factor", torch.ones(2), r"expected float32 \[\], got float32 \[2\]"),
        ("codes", torch.ones(96, 64).to(torch.uint8), r"\[96, 32\], got uint8 \[96, 64\]"),
    ],
)
def test_tensors_that_do_not_fit_are_named(folder, model, kind, tensor, message):
    kind = {"factor": FACTOR[model], "codes": CODES[model]}.get(kind, kind)
    name = f"{stem(model)}.{kind}"
    edit_tensors(folder, {name: tensor})
    for call in (lambda r: r.check_layer(FIRST[model]), lambda r: r.expert(FIRST[model], 0)):
        with pytest.raises(CheckpointError, match=rf"^{name}: .*{message}"):
            call(open_checkpoint(folder))


def test_scales_that_are_no_numbers_are_refused(folder, model):
    name = f"{stem(model)}.weight_scale"
    scales = load_file(folder / "model.safetensors")[name]
    scales.view(torch.uint8)[2, 1] = 0x7F
    edit_tensors(folder, {name: scales})
    with pytest.raises(ValueError, match=r"scales must be finite, got nan at index \[2, 1\]"):
        open_checkpoint(folder).expert(FIRST[model], 0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"strategy": "group"}, "strategy 'group' is not supported, only 'tensor_group'"),
        ({"group_size": 32}, "group_size 32 is not supported, only 16"),
        ({"num_bits": 8}, "num_bits 8 is not supported, only 4"),
    ],
)
def test_other_packed_forms_are_refused_by_name(tmp_path, changes, message):
    write_small(tmp_path, PACKED)
    quantization = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    quantization["config_groups"]["group_0"]["weights"] |= changes
    edit_config(tmp_path, quantization_config=quantization)
    with pytest.raises(UnsupportedFormatError, match=message):
        open_checkpoint(tmp_path).expert(0, 0)
