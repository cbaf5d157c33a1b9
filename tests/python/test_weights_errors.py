"""Weights that are refused: each error says what was expected and what it got."""

import dataclasses

import pytest
import torch
from moe_tools import EVERY_QUANTIZED_VARIANT, layer, refused

import cpumoe
from cpumoe import Experts, QuantizedMatrix
from cpumoe._base.tensors import dtype_name
from cpumoe.formats import WEIGHT_FORMATS


@pytest.fixture(scope="module")
def weights():
    return layer("mxfp4", hidden=64, intermediate=96)


REMEDY = WEIGHT_FORMATS["mxfp4"].remedy
SHAPES = (
    "gate and up are [experts, intermediate, hidden], and down is [experts, hidden, intermediate]"
)
MXFP4_CODES = " or ".join(dtype_name(dtype) for dtype in WEIGHT_FORMATS["mxfp4"].code_dtypes)


def damaged(weights, name, codes=None, scales=None):
    matrix = getattr(weights, name)
    codes = matrix.codes if codes is None else codes(matrix.codes)
    scales = matrix.scales if scales is None else scales(matrix.scales)
    return {**weights.tensors, name: (codes, scales)}


@pytest.mark.parametrize(
    ("changes", "kind", "message"),
    [
        (
            {"name": "gate", "codes": lambda c: c.float()},
            TypeError,
            f"gate codes: expected {MXFP4_CODES}, got float32 [4, 96, 32]; {REMEDY}",
        ),
        (
            {"name": "up", "scales": lambda s: s.float()},
            TypeError,
            f"up scales: expected float8_e8m0fnu or uint8, got float32 [4, 96, 2]; {REMEDY}",
        ),
        (
            {"name": "up", "codes": lambda c: c[0], "scales": lambda s: s[0]},
            ValueError,
            "up codes: expected [experts, N, K/2], got [96, 32]; stack the experts' matrices",
        ),
        (
            {"name": "gate", "codes": lambda c: c[:, :, :8].contiguous()},
            ValueError,
            f"gate scales: expected [4, 96, 1], got [4, 96, 2]; {REMEDY}",
        ),
        (
            {"name": "gate", "scales": lambda s: s[:, :, :1]},
            ValueError,
            f"gate scales: expected [4, 96, 2], got [4, 96, 1]; {REMEDY}",
        ),
        (
            {"name": "up", "codes": lambda c: c[:3], "scales": lambda s: s[:3]},
            ValueError,
            f"up: expected [4, 96, 64], got [3, 96, 64]; {SHAPES}",
        ),
        (
            {"name": "down", "codes": lambda c: c[:, :32], "scales": lambda s: s[:, :32]},
            ValueError,
            f"down: expected [4, 64, 96], got [4, 32, 96]; {SHAPES}",
        ),
        (
            {"name": "down", "codes": lambda c: c.mT.contiguous().mT},
            ValueError,
            "down codes: the last dimension must be contiguous, got uint8 [4, 64, 48] with strides "
            "[3072, 1, 64]; pass .contiguous()",
        ),
        (
            {"name": "down", "codes": lambda c: c.to("meta")},
            TypeError,
            "down codes: expected a CPU tensor, got device meta; move it with .cpu()",
        ),
    ],
)
def test_weights(weights, changes, kind, message):
    with refused(kind, message):
        Experts.from_tensors(**damaged(weights, **changes))


@pytest.mark.parametrize(
    ("gate", "kind"),
    [
        (lambda matrix: matrix.codes, "Tensor"),
        (lambda matrix: (matrix.codes,), "a tuple of 1"),
        (lambda matrix: (matrix.codes, matrix.scales, None), "a tuple of 3"),
    ],
)
def test_weights_that_are_no_pair(weights, gate, kind):
    message = f"gate: expected a QuantizedMatrix or a tuple (codes, scales), got {kind}; {REMEDY}"
    with refused(TypeError, message):
        Experts.from_tensors(**{**weights.tensors, "gate": gate(weights.gate)})


def test_no_experts(weights):
    none = {
        name: QuantizedMatrix(matrix.codes[:0], matrix.scales[:0])
        for name, matrix in (("gate", weights.gate), ("up", weights.up), ("down", weights.down))
    }
    with refused(ValueError, "num_experts must be positive, got 0"):
        Experts.from_tensors(**none, format="mxfp4")


@EVERY_QUANTIZED_VARIANT
def test_scales_that_are_not_finite(isa, fmt):
    weights = layer(fmt)
    bad = 255 if fmt == "mxfp4" else float("nan")

    def damage(scales):
        scales = scales.clone()
        scales[2, 5, 1] = bad
        return scales

    for name in ("gate", "up", "down"):
        message = (
            f"expert 2: {name}: scale [5, 1] is nan; {fmt} scales must be finite: "
            "the checkpoint is damaged"
        )
        with refused(ValueError, message):
            Experts.from_tensors(**damaged(weights, name, scales=damage), isa=isa)


def biases(**changes):
    zeros = {
        "gate_bias": torch.zeros(4, 96),
        "up_bias": torch.zeros(4, 96),
        "down_bias": torch.zeros(4, 64),
    }
    return {**zeros, **changes}


@pytest.mark.parametrize(
    ("changes", "kind", "message"),
    [
        (
            {"up_bias": None, "down_bias": None},
            ValueError,
            "gate_bias, up_bias, down_bias: expected all three or none, got no up_bias, down_bias",
        ),
        (
            {"down_bias": torch.zeros(4, 96)},
            ValueError,
            "down_bias: expected [4, 64], got [4, 96]",
        ),
        (
            {"up_bias": torch.zeros(4, 96, dtype=torch.int64)},
            TypeError,
            "up_bias: expected bfloat16, float16 or float32, got int64 [4, 96]",
        ),
        (
            {"gate_bias": torch.zeros(4, 96, device="meta")},
            TypeError,
            "gate_bias: expected a CPU tensor, got device meta; move it with .cpu()",
        ),
        (
            {"gate_bias": [[0.0] * 96] * 4},
            TypeError,
            "gate_bias: expected a torch.Tensor, got list",
        ),
    ],
)
def test_biases(weights, changes, kind, message):
    with refused(kind, message):
        Experts.from_tensors(**{**weights.tensors, **biases(**changes)})


def _packed(weights, **changes):
    """Packs expert by expert, like the experts of a reader."""
    first = cpumoe.ExpertWeights(weights.gate[0], weights.up[0], weights.down[0])
    options = {
        "format": weights.fmt,
        "num_experts": 1,
        "hidden_size": weights.down.shape[1],
        "intermediate_size": weights.gate.shape[1],
    }
    return Experts([dataclasses.replace(first, **changes)], **options)


def test_single_experts_are_checked_like_stacks(weights):
    gate = weights.gate[0]
    with refused(ValueError, f"expert 0: gate scales: expected [96, 2], got [1, 1]; {REMEDY}"):
        _packed(weights, gate=QuantizedMatrix(gate.codes, gate.scales[:1, :1]))
    with pytest.raises(TypeError, match=r"^expert 0: gate scales: expected .* got float32"):
        _packed(weights, gate=QuantizedMatrix(gate.codes, gate.scales.float()))
    bias = torch.zeros(1)
    with refused(ValueError, "gate_bias: expected [96], got [1]"):
        _packed(weights, gate_bias=bias, up_bias=bias, down_bias=bias)


@pytest.mark.parametrize(
    ("sizes", "kind", "message"),
    [
        ({"num_experts": 1 << 40}, ValueError, "num_experts must be at most 65536"),
        ({"hidden_size": 1 << 40}, ValueError, "hidden_size must be at most"),
        (
            {"num_experts": 65536, "hidden_size": 1 << 21, "intermediate_size": 1 << 21},
            MemoryError,
            r"cannot allocate .* MiB for 65536 experts of .* MiB each",
        ),
    ],
)
def test_absurd_sizes_are_refused_before_memory_is_taken(sizes, kind, message):
    options = {"num_experts": 1, "hidden_size": 64, "intermediate_size": 64} | sizes
    with pytest.raises(kind, match=message):
        Experts([], format="mxfp4", **options)
