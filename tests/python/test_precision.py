"""The precision of products for each dtype of hidden states, and what may lower it."""

import math
from dataclasses import replace

import pytest
import torch
from moe_tools import (
    EVERY_FORMAT,
    EVERY_ISA,
    EVERY_QUANTIZED_VARIANT,
    EVERY_VARIANT,
    SWIGLUS,
    check,
    features,
    inputs,
    layer,
)

import cpumoe
from cpumoe.numerics.precision import PRECISIONS, distinct_precisions, resolve_precision

FP32_ERROR = 4e-6
BF16_ERROR = 5e-4
HAS_FP32_SETTINGS = hasattr(torch.backends.mkldnn, "matmul")


@pytest.fixture
def matmul_precision():
    """`torch.set_float32_matmul_precision`, undone afterwards."""
    yield torch.set_float32_matmul_precision
    torch.set_float32_matmul_precision("highest")


def has_bf16(isa):
    """Whether a variant multiplies bf16."""
    return any("bf16" in feature for feature in features(isa))


def exact(weights, args):
    return cpumoe.reference.experts_forward(*args, **weights.tensors)


def difference(actual, expected):
    return float((actual.double() - expected).norm() / expected.norm())


def error(experts, weights, args):
    return difference(experts(*args), exact(weights, args))


@EVERY_VARIANT
def test_fp32_hidden_states_keep_fp32_accuracy(isa, fmt):
    weights = layer(fmt, hidden=1024, intermediate=512, std=0.02, bias=torch.float32)
    calls = [inputs(weights, tokens, dtype=torch.float32) for tokens in (1, 5, 40)]
    expected = [exact(weights, args) for args in calls]
    for options in (
        {},
        {"batch_invariant": True},
        {"few_token_limit": 0},
        {"few_token_limit": 1000},
    ):
        experts = weights.pack(isa=isa, **options)
        for args, result in zip(calls, expected, strict=True):
            assert difference(experts(*args), result) < FP32_ERROR


@EVERY_VARIANT
def test_the_caller_may_allow_bf16_products_of_fp32(isa, fmt, matmul_precision):
    weights = layer(fmt, hidden=512, intermediate=256)
    args = inputs(weights, tokens=20, dtype=torch.float32)
    auto, bf16 = (weights.pack(isa=isa, precision=precision) for precision in ("auto", "bf16"))
    exact, rounded = auto(*args), bf16(*args)
    rounds = has_bf16(isa) and fmt != "fp16"  # bf16 does not hold fp16 weights
    assert torch.equal(exact, rounded) == (not rounds)
    assert (error(bf16, weights, args) > BF16_ERROR) == rounds
    for precision, expected in (("medium", rounded), ("high", exact), ("highest", exact)):
        matmul_precision(precision)
        assert torch.equal(auto(*args), expected)
        check(expected, weights, args)
        # The setting at the call counts, not the one when the work is done.
        future = auto.submit(*args)
        matmul_precision("highest")
        assert torch.equal(future.result(), expected)


@pytest.mark.skipif(not HAS_FP32_SETTINGS, reason="this PyTorch has but one setting")
def test_pytorchs_newer_settings_count(matmul_precision):
    settings = torch.backends.mkldnn.matmul
    try:
        settings.fp32_precision = "bf16"
        assert resolve_precision("auto", torch.float32) == "bf16"
        settings.fp32_precision = "ieee"
        assert resolve_precision("auto", torch.float32) == "auto"
        # The older setting does not notice later changes of the newer one.
        matmul_precision("medium")
        settings.fp32_precision = "ieee"
        assert resolve_precision("auto", torch.float32) == "auto"
    finally:
        settings.fp32_precision = "none"
        matmul_precision("highest")


@EVERY_ISA
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_bf16_weights_are_never_multiplied_with_int8(isa, dtype):
    weights = layer("bf16")
    args = inputs(weights, tokens=6, dtype=dtype)
    assert torch.equal(weights.pack(isa=isa, precision="int8")(*args), weights.pack(isa=isa)(*args))


@EVERY_VARIANT
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_the_default_is_the_bf16_path_for_narrow_hidden_states(isa, fmt, dtype):
    weights = layer(fmt)
    for tokens in (1, 5, 40):
        args = inputs(weights, tokens, dtype=dtype)
        assert torch.equal(
            weights.pack(isa=isa)(*args), weights.pack(isa=isa, precision="bf16")(*args)
        )


@EVERY_VARIANT
def test_fp32_rows_do_not_depend_on_the_batch_where_bf16_is_kept_away(isa, fmt):
    if not has_bf16(isa):
        pytest.skip("the number of tokens chooses between kernels of fp32 accuracy")
    weights = layer(fmt)
    experts = weights.pack(isa=isa)
    x, ids, w = args = inputs(weights, tokens=150, dtype=torch.float32)
    whole = experts(*args)
    for rows in (slice(0, 1), slice(11, 14), slice(30, 140)):
        assert torch.equal(experts(x[rows], ids[rows], w[rows]), whole[rows])


@EVERY_FORMAT
def test_the_bound_of_fp32_hidden_states_is_tight(fmt, matmul_precision):
    weights = layer(fmt, hidden=256, intermediate=256)
    args = inputs(weights, tokens=5, dtype=torch.float32)

    def bound(**options):
        expected, bound = cpumoe.reference.experts_forward_with_bound(
            *args, **weights.tensors, output_dtype=torch.float32, **options
        )
        return float(bound.norm() / expected.norm())

    assert bound() < 1e-3
    assert bound(precision="bf16") > 1e-2
    matmul_precision("medium")
    assert bound() == bound(precision="bf16")


def with_gates_of(rms, fmt, activation, *, bias):
    """A layer whose gate and up projections have values of this size, biases of a tenth."""
    hidden = 512
    dtype = torch.float32 if bias else None
    options = {
        "experts": 2,
        "hidden": hidden,
        "intermediate": 256,
        "activation": activation,
        "bias": dtype,
    }
    weights = layer(fmt, std=rms / hidden**0.5, **options)
    if not bias:
        return weights
    names = ("gate_bias", "up_bias", "down_bias")
    biases = {name: getattr(weights, name) for name in names}
    return replace(weights, **{name: b * (rms / 10 / b.std()) for name, b in biases.items()})


@EVERY_QUANTIZED_VARIANT
@SWIGLUS
@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("rms", [1, 8, 64])
def test_the_error_of_int8_is_as_documented(isa, fmt, activation, bias, rms):
    """docs/numerics.md has the formula. Every variant rounds to int8 for six tokens."""
    weights = with_gates_of(rms, fmt, activation, bias=bias)
    args = inputs(weights, tokens=6)
    documented = max(1.25e-2, 0.75e-2 * math.sqrt(rms / (activation.limit or math.inf)))
    measured = error(weights.pack(isa=isa, precision="int8"), weights, args)
    assert documented / 2 < measured < documented


@EVERY_VARIANT
@pytest.mark.parametrize("tokens", [1, 40])
def test_tiny_fp32_hidden_states_are_not_taken_for_zero(isa, fmt, tokens):
    weights = layer(fmt, hidden=64, intermediate=64)
    experts = weights.pack(isa=isa)
    x, ids, w = inputs(weights, tokens, dtype=torch.float32)
    x *= 2.0**-60  # h is about its square
    expected = cpumoe.reference.experts_forward(x, ids, w, **weights.tensors)
    assert float((experts(x, ids, w).double() - expected).norm() / expected.norm()) < FP32_ERROR


def test_precisions_that_differ():
    assert resolve_precision("auto", torch.bfloat16) == "bf16"
    assert resolve_precision("auto", torch.float16) == "bf16"
    assert resolve_precision("auto", torch.float32) == "auto"
    assert [resolve_precision(each, torch.float32) for each in ("bf16", "int8")] == ["bf16", "int8"]
    assert distinct_precisions(torch.bfloat16) == ("bf16", "int8")
    assert distinct_precisions(torch.float32) == PRECISIONS
