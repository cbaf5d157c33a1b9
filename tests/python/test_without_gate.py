"""Experts without a gate projection, such as Nemotron-H's: h = f(up)."""

import dataclasses

import pytest
import torch
from moe_tools import EVERY_VARIANT, check, inputs, layer, refused

from cpumoe import GLU, Experts, QuantizedMatrix
from cpumoe.measure.throughput import make_workload
from cpumoe.reference import experts_forward

NO_GATE = (
    "{0}: expected None, because experts have no gate projection (GLU(gated=False)), got {1}; "
    "leave {0} out"
)
RELU2 = GLU("relu2", gated=False)
FUNCTIONS = pytest.mark.parametrize("function", ["silu", "gelu", "gelu_tanh", "relu", "relu2"])


def without_gate(fmt, glu=RELU2, **options):
    """A layer, whose `gate` is `up` for the reference, as in `cpumoe.checkpoint.ExpertWeights`."""
    gated = layer(fmt, **options)
    return dataclasses.replace(gated, gate=gated.up, gate_bias=None, activation=glu)


def pack(weights, fmt, **options):
    return Experts.from_tensors(
        up=weights.up,
        down=weights.down,
        up_bias=weights.up_bias,
        down_bias=weights.down_bias,
        format=fmt,
        activation=weights.activation,
        **options,
    )


@EVERY_VARIANT
@pytest.mark.parametrize("bias", [None, torch.bfloat16], ids=["plain", "bias"])
def test_a_layer_computes_what_its_weights_say(isa, fmt, bias):
    weights = without_gate(fmt, hidden=160, intermediate=96, bias=bias)
    reference = dataclasses.replace(weights, gate_bias=weights.up_bias)
    experts = pack(weights, fmt, isa=isa)
    for tokens in (1, 6, 50):
        for dtype in (torch.bfloat16, torch.float32):
            args = inputs(weights, tokens=tokens, dtype=dtype)
            check(experts(*args), reference, args)


@FUNCTIONS
def test_every_function(function):
    weights = without_gate("mxfp4", GLU(function, gated=False))
    args = inputs(weights, tokens=9, dtype=torch.float32)
    check(pack(weights, "mxfp4")(*args), weights, args)


@FUNCTIONS
def test_the_reference_ignores_the_gate(function):
    up = torch.linspace(-20, 20, 401)
    glu = GLU(function, gated=False)
    expected = {
        "silu": torch.nn.functional.silu,
        "gelu": torch.nn.functional.gelu,
        "gelu_tanh": lambda x: torch.nn.functional.gelu(x, approximate="tanh"),
        "relu": torch.relu,
        "relu2": lambda x: torch.relu(x).square(),
    }[function](up)
    assert torch.allclose(glu(torch.full_like(up, torch.nan), up), expected, rtol=1e-6, atol=1e-7)


@EVERY_VARIANT
def test_export_returns_what_was_packed(isa, fmt):
    weights = without_gate(fmt)
    experts = pack(weights, fmt, isa=isa)
    gated = Experts.from_tensors(
        gate=weights.up, up=weights.up, down=weights.down, format=fmt, isa=isa
    )
    assert experts.nbytes < 0.7 * gated.nbytes
    exported = experts.export(1)
    assert exported.gate is exported.up
    assert exported.nbytes < 0.7 * gated.export(1).nbytes
    for name in ("up", "down"):
        ours, theirs = getattr(exported, name), getattr(weights, name)[1]
        for part in ("codes", "scales", "factor"):
            a, b = getattr(ours, part), getattr(theirs, part)
            assert (a is None) == (b is None)
            if a is not None:
                a, b = (each.reshape(-1).view(torch.uint8) for each in (a, b))
                assert torch.equal(a, b)


def test_shards_have_no_gate():
    weights = without_gate("int4", hidden=64, intermediate=128)
    experts = pack(weights, "int4")
    whole = experts.export(2)

    def buffer(n, k):
        return QuantizedMatrix(
            torch.zeros(n, k // 2, dtype=torch.uint8), torch.zeros(n, k // 32).bfloat16()
        )

    up, down = buffer(64, 64), buffer(64, 64)
    experts.export_into(2, up=up, down=down, intermediate=slice(32, 96))
    assert torch.equal(up.codes, whole.up.codes[32:96])
    assert torch.equal(down.codes, whole.down.codes[:, 16:48])
    with refused(TypeError, NO_GATE.format("gate", "QuantizedMatrix")):
        experts.export_into(2, gate=buffer(64, 64), up=up, down=down, intermediate=slice(32, 96))


def test_a_gate_is_refused_and_its_lack_too():
    weights = without_gate("mxfp4")
    given = {"up": weights.up, "down": weights.down, "format": "mxfp4"}
    with refused(TypeError, NO_GATE.format("gate", "QuantizedMatrix")):
        Experts.from_tensors(**given, gate=weights.up, activation=RELU2)
    with refused(TypeError, NO_GATE.format("gate_bias", "Tensor")):
        Experts.from_tensors(**given, gate_bias=torch.zeros(1), activation=RELU2)
    message = (
        "gate: expected the gate projections, got None; pass them, or "
        "activation=GLU(..., gated=False) for experts that have none"
    )
    for glu in (None, GLU("relu2")):
        with refused(TypeError, message):
            Experts.from_tensors(**given, activation=glu)
    args = inputs(weights, tokens=1)
    with refused(TypeError, message):
        experts_forward(*args, None, weights.up, weights.down, format="mxfp4")


def test_errors_name_the_matrix_at_fault():
    weights = without_gate("mxfp4")
    given = {"up": weights.up, "down": weights.down, "format": "mxfp4", "activation": RELU2}
    for name in ("up", "down"):
        with pytest.raises(TypeError, match=f"^{name}: expected a QuantizedMatrix or a tuple"):
            Experts.from_tensors(**{**given, name: None})
    with refused(ValueError, "up_bias, down_bias: expected both or none, got no down_bias"):
        Experts.from_tensors(**given, up_bias=torch.zeros(weights.up.shape[:2]))


def test_the_reference_takes_none_for_the_gate():
    weights = without_gate("nvfp4")
    args = inputs(weights, tokens=5)
    options = {"format": "nvfp4", "activation": RELU2}
    expected = experts_forward(*args, weights.up, weights.up, weights.down, **options)
    assert torch.equal(experts_forward(*args, None, weights.up, weights.down, **options), expected)


def test_work_counts_the_matrices_that_there_are():
    weights = without_gate("mxfp4", hidden=64, intermediate=96)
    work = make_workload(5, hidden_size=64, num_experts=weights.up.shape[0], top_k=2)
    assert work.macs(pack(weights, "mxfp4")) == 5 * 2 * 2 * 64 * 96


@pytest.mark.parametrize(
    "options",
    [{"limit": 7.0}, {"up_offset": 1.0}, {"gate_cap": 1.0, "up_cap": 1.0}],
    ids=["limit", "offset", "caps"],
)
def test_what_belongs_to_a_gate_is_refused(options):
    function = "softcapped_silu" if "gate_cap" in options else "silu"
    with pytest.raises(ValueError, match="gated must be True with a limit, an offset or caps"):
        GLU(function, gated=False, **options)
    with pytest.raises(TypeError, match="gated: expected a bool, got 1"):
        GLU("silu", gated=1)
