"""NVFP4: E2M1 codes, E4M3 scales of groups of 16, and one factor per matrix."""

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from moe_tools import EVERY_ISA, Layer, check, inputs, refused

from cpumoe import QuantizedMatrix, weight_format

NVFP4 = weight_format("nvfp4")
E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
EXPERTS = 3


def matrices(n, k, *, experts=EXPERTS, seed=5):
    """Random codes, scales of every size, and another factor for each matrix."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 256, (experts, n, k // 2), dtype=torch.uint8, generator=generator)
    scales = torch.randint(0, 0x7F, (experts, n, k // 16), dtype=torch.uint8, generator=generator)
    factor = torch.rand(experts, generator=generator) * 1e-4 + 1e-5
    return QuantizedMatrix(codes, scales.view(torch.float8_e4m3fn), factor)


def layer(hidden=288, inner=160):
    gate, up = (matrices(inner, hidden, seed=seed) for seed in (1, 2))
    return Layer("nvfp4", gate, up, matrices(hidden, inner, seed=3))


def same_bytes(left, right):
    return torch.equal(left.contiguous().view(torch.uint8), right.contiguous().view(torch.uint8))


def same(ours, theirs):
    return (
        same_bytes(ours.codes, theirs.codes)
        and same_bytes(ours.scales, theirs.scales)
        and torch.equal(ours.factor, theirs.factor)
    )


@EVERY_ISA
@pytest.mark.parametrize("tokens", [1, 5, 70])
def test_a_layer_computes_what_its_weights_say(isa, tokens):
    weights = layer()
    experts = weights.pack(isa=isa)
    for activations in (torch.bfloat16, torch.float16, torch.float32):
        args = inputs(weights, tokens=tokens, dtype=activations)
        check(experts(*args), weights, args)


@EVERY_ISA
def test_export_returns_what_was_packed(isa):
    weights = layer()
    experts = weights.pack(isa=isa)
    for index in range(EXPERTS):
        exported = experts.export(index)
        for name in ("gate", "up", "down"):
            ours = getattr(exported, name)
            assert ours.scales.dtype == torch.float8_e4m3fn
            assert same(ours, getattr(weights, name)[index])


@settings(deadline=None, max_examples=30)
@given(inner=st.integers(1, 12), hidden=st.integers(1, 12), tokens=st.integers(1, 20))
def test_any_shape_is_packed_computed_and_returned(inner, hidden, tokens):
    weights = layer(32 * hidden, 32 * inner)
    experts = weights.pack()
    exported = experts.export(1)
    for name in ("gate", "up", "down"):
        assert same(getattr(exported, name), getattr(weights, name)[1])
    args = inputs(weights, tokens=tokens, dtype=torch.bfloat16)
    check(experts(*args), weights, args)


def buffers(hidden, inner):
    def matrix(n, k):
        scales = torch.zeros(n, k // 16).to(torch.float8_e4m3fn)
        factor = torch.full((), float("nan"))
        return QuantizedMatrix(torch.zeros(n, k // 2, dtype=torch.uint8), scales, factor)

    return {
        "gate": matrix(inner, hidden),
        "up": matrix(inner, hidden),
        "down": matrix(hidden, inner),
    }


def dense(matrix):
    return NVFP4.dequantize(matrix.codes, matrix.scales, matrix.factor)


def test_shards_have_the_factors_of_their_matrices():
    hidden, inner = 288, 320
    experts = layer(hidden, inner).pack()
    whole = experts.export(2)
    for features in (slice(0, 32), slice(96, 320)):
        into = buffers(hidden, len(range(inner)[features]))
        experts.export_into(2, **into, intermediate=features)
        for name in ("gate", "up"):
            assert torch.equal(dense(into[name]), dense(getattr(whole, name))[features])
        assert torch.equal(dense(into["down"]), dense(whole.down)[:, features])


def test_export_wants_memory_for_the_factor():
    experts = layer().pack()
    into = buffers(288, 160)
    into["up"] = QuantizedMatrix(into["up"].codes, into["up"].scales)
    message = "up factor: expected a float32 tensor of one element, got None; pass torch.empty(())"
    with refused(TypeError, f"{message} as the third part"):
        experts.export_into(0, **into)


@pytest.mark.parametrize(
    ("factor", "error", "message"),
    [
        (1.0, TypeError, "a float32 tensor of one element, got float; pass torch.empty(())"),
        (torch.ones(2), ValueError, r"a float32 tensor of one element, got float32 \[2\]"),
        (torch.ones(()).double(), TypeError, r"a float32 tensor of one element, got float64 \[\]"),
        (torch._neg_view(torch.ones(())), TypeError, "a tensor without lazy negation"),
    ],
)
def test_memory_for_the_factor_is_a_number_in_memory(factor, error, message):
    into = buffers(288, 160)
    into["up"] = (into["up"].codes, into["up"].scales, factor)
    with pytest.raises(error, match=f"^up factor: expected {message}"):
        layer().pack().export_into(0, **into)


def test_factors_have_memory_of_their_own():
    experts = layer().pack()
    into = buffers(288, 160)
    three = torch.zeros(3)
    for part, (name, matrix) in zip(three, into.items(), strict=True):
        into[name] = dataclasses.replace(matrix, factor=part)
    experts.export_into(1, **into)
    exported = experts.export(1)
    expected = [matrix.factor for matrix in (exported.gate, exported.up, exported.down)]
    assert torch.equal(three, torch.stack(expected))
    gate, up = into["gate"], into["up"]
    with pytest.raises(ValueError, match=r"^up factor: expected memory that gate factor does not"):
        experts.export_into(1, **into | {"up": dataclasses.replace(up, factor=gate.factor)})
    within = up.scales.view(-1)[:4].view(torch.float32)[0]
    with pytest.raises(ValueError, match=r"^up factor: expected memory that up scales does not"):
        experts.export_into(1, **into | {"up": dataclasses.replace(up, factor=within)})


def test_every_code_and_scale_is_dequantized_exactly():
    codes = torch.arange(256, dtype=torch.uint8).repeat(0x7F, 1)
    scales = torch.arange(0x7F, dtype=torch.uint8).view(torch.float8_e4m3fn)
    got = NVFP4.dequantize(codes, scales[:, None].expand(-1, 32).contiguous())
    nibbles = torch.stack((codes & 15, codes >> 4), -1).flatten(-2).long()
    assert torch.equal(got, E2M1[nibbles] * scales.float()[:, None])


def test_weights_equal_those_of_model_optimizers_formula():
    """``e2m1 * (weight_scale.float() * weight_scale_2)``, in float32."""
    stack = matrices(48, 96)
    for index in range(EXPERTS):
        matrix = stack[index]
        scales = matrix.scales.float() * matrix.factor
        nibbles = torch.stack((matrix.codes & 15, matrix.codes >> 4), -1).flatten(-2).long()
        expected = (E2M1[nibbles].view(48, 6, 16) * scales[..., None]).view(48, 96)
        assert torch.equal(dense(matrix), expected)
    assert torch.equal(dense(stack), torch.stack([dense(stack[i]) for i in range(EXPERTS)]))


def test_codes_equal_those_of_compressed_tensors():
    helpers = pytest.importorskip("compressed_tensors.compressors.nvfp4.helpers")
    matrix = NVFP4.quantized(torch.randn(32, 128, generator=torch.Generator().manual_seed(1)))
    values = helpers.unpack_fp4_from_uint8(matrix.codes, 32, 128, dtype=torch.float32)
    ones = torch.ones(32, 8).to(torch.float8_e4m3fn)
    assert torch.equal(values, NVFP4.dequantize(matrix.codes, ones))
    assert torch.equal(helpers.pack_fp4_to_uint8(values), matrix.codes)


@pytest.mark.parametrize("std", [1e-30, 1e-3, 1.0, 1e30])
def test_quantizing_is_off_by_at_most_half_a_step(std):
    weights = torch.randn(2, 40, 96, generator=torch.Generator().manual_seed(2)) * std
    matrix = NVFP4.quantized(weights)
    assert matrix.factor.shape == (2,)
    assert torch.equal(matrix.factor, weights.abs().amax((-1, -2)) / (6 * 448))
    amax = weights.view(2, 40, 6, 16).abs().amax(-1, keepdim=True)
    error = (dense(matrix) - weights).view(2, 40, 6, 16).abs()
    # Between 4 and 6 a step is 2. Rounding the scale moves a group's end by a sixteenth.
    assert bool((error <= amax * (1 / 6 + 1 / 12) + matrix.factor[0] * 2**-10).all())
    again = NVFP4.quantized(dense(matrix))
    assert torch.allclose(dense(again), dense(matrix), rtol=1e-6, atol=0)


def test_zeros_stay_zeros():
    matrix = NVFP4.quantized(torch.zeros(4, 64))
    assert not dense(matrix).any()
    assert matrix.factor == 1


def test_scales_must_be_numbers_that_are_not_negative():
    for byte, must in ((0x7F, "be finite, got nan"), (0x84, "not be negative, got -0.0078125")):
        weights = layer()
        bad = weights.up.scales.view(torch.uint8).clone()
        bad[1, 7, 3] = byte
        scales = bad.view(torch.float8_e4m3fn)
        place = "at index [1, 7, 3] (1 such scales)"
        with refused(ValueError, f"up: scales must {must} {place}; the checkpoint is damaged"):
            NVFP4.check_scales(scales, "up")
        up = QuantizedMatrix(weights.up.codes, scales, weights.up.factor)
        weights = dataclasses.replace(weights, up=up)
        with pytest.raises(ValueError, match=r"scale \[7, 3\] is .*nvfp4 scales must "):
            weights.pack()


@pytest.mark.parametrize(
    ("factor", "error", "message"),
    [
        (torch.ones(2), ValueError, "expected [3], one factor per matrix, got [2]"),
        (torch.ones(3).double(), TypeError, "expected float32, got float64 [3]"),
        (torch.tensor([1.0, float("nan"), 1.0]), ValueError, "factors must be finite"),
    ],
    ids=["shape", "dtype", "nan"],
)
def test_wrong_factors_are_refused(factor, error, message):
    weights = layer()
    gate = QuantizedMatrix(weights.gate.codes, weights.gate.scales, factor)
    weights = dataclasses.replace(weights, gate=gate)
    with pytest.raises(error) as caught:
        weights.pack()
    assert str(caught.value).startswith(f"gate factor: {message}")


def test_other_formats_have_no_factor():
    matrix = weight_format("mxfp4").quantized(torch.ones(EXPERTS, 32, 32))
    with_factor = QuantizedMatrix(matrix.codes, matrix.scales, torch.ones(EXPERTS))
    with pytest.raises(TypeError, match="expected none in mxfp4, got float32"):
        Layer("mxfp4", with_factor, matrix, matrix).pack()


def test_a_tuple_of_three_parts_is_a_matrix():
    weights = layer()
    parts = [(m.codes, m.scales, m.factor) for m in (weights.gate, weights.up, weights.down)]
    args = inputs(weights, tokens=3, dtype=torch.bfloat16)
    assert torch.equal(Layer("nvfp4", *parts).pack()(*args), weights.pack()(*args))
