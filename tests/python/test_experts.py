"""Results of a layer's experts, on every ISA variant and in every weight format."""

import copy
import math
from dataclasses import replace

import pytest
import torch
from moe_tools import (
    BF16_PRECISIONS,
    EVERY_FP32_PRECISION,
    EVERY_PRECISION,
    EVERY_QUANTIZED_VARIANT,
    EVERY_VARIANT,
    GPT_OSS,
    SWIGLUS,
    Inputs,
    Layer,
    check,
    features,
    inputs,
    layer,
)

import cpumoe
from cpumoe import Experts, QuantizedMatrix

pytestmark = pytest.mark.filterwarnings("ignore:Runtime. . threads asked for:RuntimeWarning")

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@EVERY_VARIANT
@EVERY_PRECISION
@SWIGLUS
def test_stays_within_the_error_bound(isa, fmt, precision, activation):
    weights = layer(fmt).with_activation(activation)
    experts = weights.pack(isa=isa, precision=precision)
    # Up to the few-token kernel's tokens per expert and beyond, with remainders of every block.
    for tokens in (1, 2, 3, 7, 16, 33, 70):
        args = inputs(weights, tokens, seed=tokens)
        check(experts(*args), weights, args, precision=precision)


@pytest.mark.parametrize("isa", cpumoe.supported_isas())
@EVERY_FP32_PRECISION
@pytest.mark.parametrize(
    "glu",
    [
        cpumoe.GLU("gelu"),
        cpumoe.GLU("gelu_tanh", limit=4.0),
        cpumoe.GLU("relu"),
        cpumoe.GLU("relu2", limit=4.0),
        cpumoe.GLU("softcapped_silu", gate_cap=4.0, up_cap=25.0),
    ],
    ids=lambda glu: glu.function,
)
def test_other_gated_linear_units(isa, precision, glu):
    weights = layer("mxfp4").with_activation(glu)
    experts = weights.pack(isa=isa, precision=precision)
    assert experts.activation == glu
    for tokens in (1, 3, 40):
        args = inputs(weights, tokens, dtype=torch.float32)
        check(experts(*args), weights, args, precision=precision)


@EVERY_VARIANT
@EVERY_PRECISION
@pytest.mark.parametrize("bias", DTYPES, ids=str)
def test_biases(isa, fmt, precision, bias):
    weights = layer(fmt, activation=GPT_OSS, bias=bias)
    experts = weights.pack(isa=isa, precision=precision)
    for tokens in (1, 3, 40):
        args = inputs(weights, tokens)
        check(experts(*args), weights, args, precision=precision)
    assert experts.nbytes > layer(fmt).pack(isa=isa, precision=precision).nbytes


@EVERY_VARIANT
@EVERY_FP32_PRECISION
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_element_types(isa, fmt, precision, dtype):
    weights = layer(fmt)
    experts = weights.pack(isa=isa, precision=precision)
    for tokens in (1, 5, 40):
        args = inputs(weights, tokens, dtype=dtype)
        y = experts(*args)
        check(y, weights, args, precision=precision)
        assert torch.equal(y, experts(args.hidden_states, args.topk_ids.int(), args.topk_weights))
        for narrow in (torch.bfloat16, torch.float16):
            given = args.topk_weights.to(narrow)
            assert torch.equal(
                experts(args.hidden_states, args.topk_ids, given),
                experts(args.hidden_states, args.topk_ids, given.float()),
            )


@EVERY_VARIANT
@EVERY_PRECISION
@pytest.mark.parametrize(
    ("hidden", "intermediate", "experts"), [(32, 32, 1), (32, 224, 3), (288, 32, 2), (64, 1056, 2)]
)
def test_odd_sizes(isa, fmt, precision, hidden, intermediate, experts):
    weights = layer(fmt, hidden=hidden, intermediate=intermediate, experts=experts)
    packed = weights.pack(isa=isa, precision=precision)
    assert (packed.num_experts, packed.hidden_size, packed.intermediate_size) == (
        experts,
        hidden,
        intermediate,
    )
    for tokens in (1, 9, 30):
        args = inputs(weights, tokens, top_k=1)
        check(packed(*args), weights, args, precision=precision)


@EVERY_VARIANT
@EVERY_FP32_PRECISION
def test_scales_of_any_size(isa, fmt, precision):
    """Scales so small or large that they cannot be folded into bf16 weights, in some experts."""
    weights = layer(fmt, experts=3)
    if weights.gate.scales is None:
        pytest.skip(f"{fmt} has no scales")
    gate, up, down = (m.scales.clone() for m in (weights.gate, weights.up, weights.down))
    if fmt == "mxfp4":
        gate[1, :5], up[1], down[1] = 0, 200, 60  # bytes: 2^-127, 2^73, 2^-67
        gate[2, :, 0] = 20
    elif fmt == "nvfp4":
        for scales, byte in ((gate[:, :5], 0), (up, 0x7E), (down, 1)):  # 0, 448, 2^-9
            scales.view(torch.uint8)[1] = byte
    else:
        gate[1, :5], up[1], down[1] = 0, up[1] * 2.0**70, down[1] * 2.0**-70
        gate[2, :, 0] *= -(2.0**-100)
    scaled = Layer(
        fmt,
        QuantizedMatrix(weights.gate.codes, gate, weights.gate.factor),
        QuantizedMatrix(weights.up.codes, up, weights.up.factor),
        QuantizedMatrix(weights.down.codes, down, weights.down.factor),
    )
    experts = scaled.pack(isa=isa, precision=precision)
    for tokens in (1, 3, 40):
        args = inputs(scaled, tokens, dtype=torch.float32)
        check(experts(*args), scaled, args, precision=precision)


@EVERY_VARIANT
def test_v4_shape_relative_error(isa, fmt):
    """DeepSeek-V4-Flash's sizes and activation: relative L2 error against float64."""
    weights = layer(
        fmt,
        experts=2,
        hidden=4096,
        intermediate=2048,
        std=0.02,
        activation=cpumoe.SwiGLU(limit=10.0),
    )
    args = inputs(weights, tokens=5)
    expected = cpumoe.reference.experts_forward(*args, **weights.tensors)
    rounds_to_bf16 = any("bf16" in feature for feature in features(isa))
    for precision, greatest in (("bf16", 2.5e-3 if rounds_to_bf16 else 2e-3), ("int8", 1.25e-2)):
        error = weights.pack(isa=isa, precision=precision)(*args).double() - expected
        assert float(error.norm() / expected.norm()) < greatest


@EVERY_VARIANT
def test_a_lone_tokens_activations_have_21_bits_or_more(isa, fmt):
    weights = layer(fmt, experts=2, hidden=1024, intermediate=512, std=0.02)
    args = inputs(weights, tokens=1, dtype=torch.float32)
    expected = cpumoe.reference.experts_forward(*args, **weights.tensors)
    error = weights.pack(isa=isa)(*args).double() - expected
    assert float(error.norm() / expected.norm()) < 4e-6


@EVERY_VARIANT
@EVERY_PRECISION
def test_strided_inputs_are_not_misread(isa, fmt, precision):
    weights = layer(fmt)
    experts = weights.pack(isa=isa, precision=precision)
    x, ids, w = args = inputs(weights, tokens=9)
    y = experts(*args)

    def spread(tensor: torch.Tensor, fill: float) -> torch.Tensor:
        wide = torch.full((2 * tensor.shape[0], 2 * tensor.shape[1]), fill).to(tensor.dtype)
        wide[::2, ::2] = tensor
        return wide[::2, ::2]

    rows = torch.full((9, 400), math.nan, dtype=x.dtype)
    rows[:, 32:192] = x
    for strided in (x.T.contiguous().T, spread(x, math.nan), rows[:, 32:192]):
        assert not strided.is_contiguous()
        assert torch.equal(experts(strided, ids, w), y)
    assert torch.equal(experts(x, spread(ids, 99), w), y)
    assert torch.equal(experts(x, ids.T.contiguous().T, w), y)
    assert torch.equal(experts(x, ids, spread(w, math.nan)), y)
    assert torch.equal(experts(x, ids, w.T.contiguous().T), y)

    same = x[:1].expand(9, -1)
    assert torch.equal(experts(same, ids, w), experts(same.contiguous(), ids, w))


@EVERY_VARIANT
def test_strided_weights_are_not_misread(isa, fmt):
    weights = layer(fmt)
    args = inputs(weights, tokens=5)
    # gpt-oss interleaves the rows of gate and up in one tensor.
    gate, up = weights.gate, weights.up
    codes = torch.stack((gate.codes, up.codes), 2).flatten(1, 2)
    rows = (None, None)
    if gate.scales is not None:
        scales = torch.stack((gate.scales, up.scales), 2).flatten(1, 2)
        rows = scales[:, 0::2], scales[:, 1::2]
    experts = Experts.from_tensors(
        gate=QuantizedMatrix(codes[:, 0::2], rows[0], gate.factor),
        up=QuantizedMatrix(codes[:, 1::2], rows[1], up.factor),
        down=weights.down,
        format=fmt,
        isa=isa,
    )
    assert torch.equal(experts(*args), weights.pack(isa=isa)(*args))


@EVERY_VARIANT
@EVERY_PRECISION
def test_top_k_from_one_to_all(isa, fmt, precision):
    weights = layer(fmt, experts=7, hidden=64)
    experts = weights.pack(isa=isa, precision=precision)
    for top_k in range(1, 8):
        args = inputs(weights, tokens=5, top_k=top_k)
        check(experts(*args), weights, args, precision=precision)


@EVERY_VARIANT
@EVERY_PRECISION
def test_no_tokens(isa, fmt, precision):
    weights = layer(fmt)
    experts = weights.pack(isa=isa, precision=precision)
    for dtype in DTYPES:
        args = inputs(weights, tokens=0, dtype=dtype)
        for y in (experts(*args), experts.submit(*args).result()):
            assert y.shape == (0, weights.hidden)
            assert y.dtype == dtype


@EVERY_VARIANT
@EVERY_PRECISION
def test_ids_of_other_hosts_are_skipped(isa, fmt, precision):
    weights = layer(fmt)
    experts = weights.pack(isa=isa, precision=precision)
    x, ids, w = inputs(weights, tokens=6, top_k=3)
    ids[0] = -1
    ids[1] = weights.num_experts
    ids[2, 0], ids[3, 1] = -1, weights.num_experts
    w[ids == -1] = math.nan  # a skipped pair's weight is not read
    args = Inputs(x, ids, w)
    y = experts(*args)
    check(y, weights, args, precision=precision)
    assert not y[:2].any()
    only = experts(x[3:4], ids[3:4, [0, 2]], w[3:4, [0, 2]])
    assert torch.equal(experts(x[3:4], ids[3:4], w[3:4]), only)


@EVERY_VARIANT
@EVERY_PRECISION
def test_mask_is_read_at_each_call(isa, fmt, precision):
    weights = layer(fmt)
    mask = torch.zeros(weights.num_experts, dtype=torch.bool)
    experts = weights.pack(isa=isa, precision=precision, expert_mask=mask)
    args = inputs(weights, tokens=8)
    unmasked = experts(*args)
    check(unmasked, weights, args, precision=precision)
    for masked in ([1], [0, 2], range(weights.num_experts)):
        mask[:] = False
        mask[list(masked)] = True
        check(experts(*args), weights, args, mask, precision=precision)
    assert not experts(*args).any()
    mask[:] = False
    assert torch.equal(experts(*args), unmasked)
    mask[0] = True
    experts.expert_mask = None
    assert torch.equal(experts(*args), unmasked)


@EVERY_VARIANT
@EVERY_PRECISION
def test_repeated_ids_count_each_time(isa, fmt, precision):
    weights = layer(fmt)
    experts = weights.pack(isa=isa, precision=precision)
    x, _, w = inputs(weights, tokens=7, top_k=3)
    ids = torch.tensor([[2, 2, 2], [0, 1, 0], [3, 3, 1]] * 2 + [[1, 1, 1]])
    for rows in (slice(0, 1), slice(1, 2), slice(2, 5), slice(0, 7)):
        args = Inputs(x[rows], ids[rows], w[rows])
        check(experts(*args), weights, args, precision=precision)


@EVERY_VARIANT
@EVERY_FP32_PRECISION
def test_nan_stays_in_its_token(isa, fmt, precision):
    weights = layer(fmt)
    experts = weights.pack(isa=isa, precision=precision)
    x, ids, w = inputs(weights, tokens=20, dtype=torch.float32)
    clean = experts(x, ids, w)
    for value in (math.nan, math.inf, -math.inf):
        x[3, 7] = value
        y = experts(x, ids, w)
        assert y[3].isnan().all()
        assert torch.equal(y[:3], clean[:3])
        assert torch.equal(y[4:], clean[4:])


@EVERY_VARIANT
def test_int8_groups_too_small_to_scale_count_as_zero(isa, fmt):
    weights = layer(fmt, hidden=64, intermediate=64)
    experts = weights.pack(isa=isa, precision="int8")
    x, ids, w = inputs(weights, tokens=3, dtype=torch.float32)
    x[:, 32:] = 0
    expected = experts(x, ids, w)
    assert expected.any()
    x[0, 32:] = 2.0**-101
    x[1, 32:] = torch.finfo(torch.float32).smallest_normal / 2
    assert torch.equal(experts(x, ids, w), expected)
    x[:, :32] = 0
    assert not experts(x, ids, w).any()


@EVERY_QUANTIZED_VARIANT
def test_the_path_asked_for_runs(isa, fmt):
    weights = layer(fmt)
    args = inputs(weights, tokens=3)
    bf16, int8 = (
        weights.pack(isa=isa, precision=precision)(*args) for precision in BF16_PRECISIONS
    )
    assert not torch.equal(bf16, int8)


@EVERY_VARIANT
@EVERY_PRECISION
@pytest.mark.parametrize("bias", [None, torch.bfloat16], ids=["plain", "bias"])
def test_export_returns_every_byte(isa, fmt, precision, bias):
    weights = layer(fmt, bias=bias)
    experts = weights.pack(isa=isa, precision=precision)
    for index in range(weights.num_experts):
        exported = experts.export(index)
        for name in ("gate", "up", "down"):
            original, back = getattr(weights, name)[index], getattr(exported, name)
            assert torch.equal(back.codes, original.codes)
            if original.scales is None:
                assert back.scales is None
            else:
                assert back.scales.dtype == original.scales.dtype
                assert torch.equal(back.scales.view(torch.uint8), original.scales.view(torch.uint8))
            stack, one = getattr(weights, f"{name}_bias"), getattr(exported, f"{name}_bias")
            if stack is None:
                assert one is None
            else:
                assert one.dtype == stack.dtype
                assert torch.equal(one, stack[index])


@EVERY_VARIANT
def test_tensors_are_not_needed_after_packing(isa, fmt):
    weights = layer(fmt, bias=torch.float32)
    args = inputs(weights, tokens=3)
    expected = weights.pack(isa=isa)(*args)
    given = {k: v for k, v in weights.tensors.items() if k not in ("format", "activation")}
    mine = copy.deepcopy(given)
    experts = Experts.from_tensors(**mine, format=fmt, isa=isa)
    for value in mine.values():
        is_matrix = isinstance(value, QuantizedMatrix)
        for tensor in (value.codes, value.scales) if is_matrix else (value,):
            if tensor is not None:
                tensor.zero_()
    assert torch.equal(experts(*args), expected)
    assert experts.export(1).gate_bias.any()


def test_all_code_dtypes_are_the_same_bytes():
    for fmt in cpumoe.WEIGHT_FORMATS.values():
        weights = layer(fmt.name)
        args = inputs(weights, tokens=3)
        expected = weights.pack()(*args)
        for codes in fmt.code_dtypes:
            for scales in fmt.scale_dtypes:
                if fmt.stored_scale(scales) != fmt.scale_storage:  # another number
                    continue
                viewed = {
                    name: QuantizedMatrix(
                        matrix.codes.view(codes), matrix.scales.view(scales), matrix.factor
                    )
                    for name, matrix in (
                        ("gate", weights.gate),
                        ("up", weights.up),
                        ("down", weights.down),
                    )
                }
                experts = Experts.from_tensors(**viewed, format=fmt.name)
                assert torch.equal(experts(*args), expected)


def test_properties_and_repr():
    weights = layer("mxfp4", hidden=256, intermediate=128, activation=GPT_OSS)
    isa = cpumoe.supported_isas()[0]
    experts = weights.pack(isa=isa)
    assert experts.activation == GPT_OSS
    assert experts.precision == "auto"
    assert experts.expert_mask is None
    assert experts.runtime is cpumoe.default_runtime()
    assert experts.nbytes == sum(m.nbytes for m in (weights.gate, weights.up, weights.down))
    described = f"Experts(mxfp4, experts=4, hidden=256, intermediate=128, isa={isa}"
    assert repr(experts) == described + ")"
    rounded = weights.pack(isa=isa, precision="int8")
    assert rounded.precision == "int8"
    assert repr(rounded) == described + ", precision=int8)"


def test_lazy_negation_is_seen():
    weights = layer("mxfp4", hidden=64, intermediate=64)
    experts = weights.pack()
    hidden_states, ids, topk_weights = inputs(weights, tokens=3)
    expected = experts(-hidden_states, ids, -topk_weights)
    lazy = experts(torch._neg_view(hidden_states), ids, torch._neg_view(topk_weights))
    assert torch.equal(lazy, expected)


def test_lazy_negation_of_weights_is_seen():
    weights = layer("int4", bias=torch.float32)
    args = inputs(weights, tokens=3)
    down, bias = weights.down, weights.gate_bias
    changes = [
        {"down": QuantizedMatrix(down.codes, negated(down.scales)), "gate_bias": negated(bias)}
        for negated in (torch.neg, torch._neg_view)
    ]
    expected, lazy = (replace(weights, **change).pack()(*args) for change in changes)
    assert torch.equal(lazy, expected)


def test_the_default_device_does_not_matter():
    weights = layer("mxfp4", bias=torch.bfloat16)
    args = inputs(weights, tokens=3)
    expected = weights.pack()(*args)
    with torch.device("meta"):
        experts = weights.pack()
        actual = experts(*args)
        exported = experts.export(1)
    assert torch.equal(actual, expected)
    assert torch.equal(exported.gate.codes, weights.gate.codes[1])
    assert torch.equal(exported.gate.scales, weights.gate.scales[1])
