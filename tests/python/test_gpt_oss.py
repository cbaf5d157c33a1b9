import pytest
import torch
from checkpoint_tools import assert_sizes, edit_tensors
from safetensors.torch import load_file

import cpumoe
from cpumoe.checkpoint import open_checkpoint
from cpumoe.formats import WEIGHT_FORMATS
from cpumoe.numerics.glu import SwiGLU


def test_gpt_oss(gpt_oss):
    reader = open_checkpoint(gpt_oss)
    assert reader.format == "mxfp4"
    assert reader.activation == SwiGLU(alpha=1.702, limit=7.0, up_offset=1.0)
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


def test_gpt_oss_nan_scales_name_the_expert(gpt_oss):
    name = "model.layers.0.mlp.experts.down_proj_scales"
    scales = load_file(gpt_oss / "model.safetensors")[name]
    scales[2, 5, 1] = 255
    edit_tensors(gpt_oss, {name: scales})
    reader = open_checkpoint(gpt_oss)
    reader.expert(0, 1)
    with pytest.raises(ValueError, match=r"down_proj_scales\[2\]: .* at index \[5, 1\]"):
        reader.expert(0, 2)


def test_packing_names_the_rows_of_gate_or_up_with_a_nan_scale(gpt_oss):
    name = "model.layers.0.mlp.experts.gate_up_proj_scales"
    scales = load_file(gpt_oss / "model.safetensors")[name]
    scales[2, 11, 1] = 255
    edit_tensors(gpt_oss, {name: scales})
    with pytest.raises(ValueError, match=rf"^{name}\[2\]\[1::2\]: scale \[5, 1\] is nan; "):
        cpumoe.Experts.from_checkpoint(gpt_oss, layer=0)
    with pytest.raises(ValueError, match=rf"^{name}\[2\]\[1::2\]: .* at index \[5, 1\]"):
        open_checkpoint(gpt_oss).expert(0, 2)
