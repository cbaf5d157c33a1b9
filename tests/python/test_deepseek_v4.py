import json

import pytest
import torch
from checkpoint_tools import assert_sizes, edit_config, edit_tensors, rename_tensors
from safetensors.torch import load_file

from cpumoe.checkpoint import UnsupportedFormatError, open_checkpoint
from cpumoe.formats import WEIGHT_FORMATS
from cpumoe.numerics.glu import SwiGLU

V4_NAME = "layers.1.ffn.experts.2.w2"


def test_deepseek_v4(v4):
    with open_checkpoint(v4) as reader:
        assert reader.format == "mxfp4"
        assert reader.model_type == "deepseek_v4"
        assert reader.activation == SwiGLU(limit=10.0)
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


def test_other_experts_are_refused_by_name(v4):
    edit_config(v4, expert_dtype="fp6")
    reader = open_checkpoint(v4)
    assert reader.format == "fp6"
    assert reader.layers() == [0, 1]
    message = (
        r"fp6 experts: expert_dtype 'fp6' is not supported, only 'fp4' and 'fp8'. Supported "
        r"formats: mxfp4, int4"
    )
    with pytest.raises(UnsupportedFormatError, match=message):
        reader.expert(0, 0)


def test_deepseek_v4_takes_its_limit_from_the_config(v4):
    edit_config(v4, swiglu_limit=7)
    assert open_checkpoint(v4).activation == SwiGLU(limit=7.0)
