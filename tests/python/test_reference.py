import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from moe_tools import EVERYTHING

from cpumoe.formats import WEIGHT_FORMATS, QuantizedMatrix
from cpumoe.numerics.glu import SwiGLU
from cpumoe.numerics.precision import PRECISIONS, resolve_precision
from cpumoe.reference import (
    dequantize,
    dequantize_activations,
    error_bound,
    experts_forward,
    experts_forward_with_bound,
    experts_forward_with_bounds,
    quantize_activations,
)

FORMATS = pytest.mark.parametrize("fmt", WEIGHT_FORMATS.values(), ids=lambda f: f.name)
QUANTIZED = pytest.mark.parametrize(
    "fmt", [f for f in WEIGHT_FORMATS.values() if f.values], ids=lambda f: f.name
)
EVERY_PRECISION = pytest.mark.parametrize("precision", PRECISIONS)
SWIGLUS = (SwiGLU(), SwiGLU(limit=10.0), SwiGLU(alpha=1.702, limit=7.0, up_offset=1.0))


class Problem:
    """Random experts, routing and hidden states."""

    def __init__(self, fmt, *, tokens=7, experts=4, hidden=64, inner=96, top_k=2, seed=0):
        g = torch.Generator().manual_seed(seed)
        self.fmt = fmt

        def weights(n, k):
            return QuantizedMatrix(*fmt.quantize(torch.randn(experts, n, k, generator=g) * 0.1))

        self.gate, self.up = weights(inner, hidden), weights(inner, hidden)
        self.down = weights(hidden, inner)
        self.x = torch.randn(tokens, hidden, generator=g).bfloat16()
        self.ids = torch.rand(tokens, experts, generator=g).topk(top_k).indices
        self.weights = torch.rand(tokens, top_k, generator=g)

    @property
    def arguments(self):
        return self.x, self.ids, self.weights, self.gate, self.up, self.down


def int8_rounded(x):
    """The values of x after rounding to int8, in numpy's float32, without a fused product."""
    groups = x.float().numpy().reshape(-1, 32)
    greatest = np.abs(groups).max(-1, keepdims=True)
    codes = np.rint(groups * (np.float32(127) / greatest))
    return torch.from_numpy((codes * (greatest / np.float32(127))).reshape(x.shape))


ROUNDED = {
    "auto": lambda x: x.float(),
    "bf16": lambda x: x.bfloat16().float(),
    "int8": int8_rounded,
}


def kernel(problem, *, precision="bf16", activation=SwiGLU(), output_dtype=torch.bfloat16):  # noqa: B008
    """An independent kernel: rounded x and h, float32 sums; token by token."""
    x, ids, weights, gate, up, down = problem.arguments
    rounded = ROUNDED[resolve_precision(precision, x.dtype)]
    dense = [problem.fmt.dense(m) for m in (gate, up, down)]
    y = torch.zeros(x.shape)
    for token in range(len(x)):
        for slot, expert in enumerate(ids[token].tolist()):
            g, u = (w[expert] @ rounded(x[token]) for w in dense[:2])
            h = rounded(activation(g, u))
            y[token] += weights[token, slot] * (dense[2][expert] @ h)
    return y.to(output_dtype)


def test_forward_equals_the_formula():
    torch.manual_seed(0)
    gate, up = torch.randn(2, 3, 8, 6, dtype=torch.float64)
    down = torch.randn(3, 6, 8, dtype=torch.float64)
    biases = [torch.randn(3, 8), torch.randn(3, 8), torch.randn(3, 6)]
    x, ids = torch.randn(5, 6), torch.randint(0, 3, (5, 2))
    weights = torch.rand(5, 2)
    y = experts_forward(
        x, ids, weights, gate, up, list(down), gate_bias=biases[0], up_bias=biases[1],
        down_bias=biases[2],
    )  # fmt: skip
    for t in range(5):
        expected = torch.zeros(6, dtype=torch.float64)
        for k in range(2):
            e = int(ids[t, k])
            g, u = gate[e] @ x[t].double() + biases[0][e], up[e] @ x[t].double() + biases[1][e]
            h = g / (1 + torch.exp(-g)) * u
            expected += weights[t, k].double() * (down[e] @ h + biases[2][e])
        torch.testing.assert_close(y[t], expected)


def test_forward_agrees_with_transformers_mixtral_experts():
    modeling = pytest.importorskip("transformers.models.mixtral.modeling_mixtral")
    config = modeling.MixtralConfig(
        hidden_size=16, intermediate_size=24, num_local_experts=4, num_hidden_layers=1
    )
    config._experts_implementation = "eager"
    experts = modeling.MixtralExperts(config).double()
    torch.manual_seed(0)
    for parameter in experts.parameters():
        torch.nn.init.normal_(parameter)
    x = torch.randn(6, 16, dtype=torch.float64)
    ids, weights = torch.randint(0, 4, (6, 2)), torch.rand(6, 2, dtype=torch.float64)
    gate, up = experts.gate_up_proj.detach().chunk(2, dim=1)
    got = experts_forward(x, ids, weights, gate, up, experts.down_proj.detach())
    torch.testing.assert_close(got, experts(x, ids, weights).detach())


def test_skipped_ids_and_masked_experts_count_nothing():
    p = Problem(WEIGHT_FORMATS["mxfp4"], experts=4)
    ids = torch.tensor([[0, -1], [4, 1], [2, 3], [-1, 4], [1, 1], [0, 2], [3, 3]])
    mask = torch.tensor([False, False, True, False])
    p.weights[0, 1] = math.nan
    got = experts_forward(
        p.x, ids, p.weights, p.gate, p.up, p.down, format="mxfp4", expert_mask=mask
    )
    assert got.isfinite().all()
    assert not got[3].any()
    only = experts_forward(p.x, ids[:, :1], p.weights[:, :1], p.gate, p.up, p.down, format="mxfp4")
    torch.testing.assert_close(got[0], only[0])


def test_only_experts_with_tokens_are_read():
    class Lazy(list):
        def __getitem__(self, index):
            assert index == 2
            return super().__getitem__(index)

    w = Lazy([None, None, torch.eye(4), None])
    y = experts_forward(torch.ones(1, 4), torch.tensor([[2]]), torch.ones(1, 1), w, w, w)
    torch.testing.assert_close(y, torch.nn.functional.silu(torch.ones(1, 4, dtype=torch.float64)))


def test_no_tokens_give_no_rows():
    p = Problem(WEIGHT_FORMATS["mxfp4"], tokens=0)
    y, bound = experts_forward_with_bound(*p.arguments, format="mxfp4")
    assert y.shape == bound.shape == (0, 64)


@pytest.mark.parametrize("bad", [-2, 5, 2**40])
def test_ids_out_of_range_are_an_index_error(bad):
    p = Problem(WEIGHT_FORMATS["mxfp4"])
    p.ids[3, 1] = bad
    message = rf"topk_ids: expected -1..4, got {bad} at \[3, 1\]"
    with pytest.raises(IndexError, match=message):
        experts_forward(*p.arguments, format="mxfp4")


def test_arguments_that_do_not_belong_together_are_refused():
    p = Problem(WEIGHT_FORMATS["mxfp4"])
    with pytest.raises(ValueError, match="expected the format of the quantized weights, got None"):
        experts_forward(*p.arguments)
    with pytest.raises(ValueError, match=r"topk_ids, topk_weights: expected \[7, top_k\] each"):
        experts_forward(p.x, p.ids[:3], p.weights, p.gate, p.up, p.down, format="mxfp4")
    with pytest.raises(ValueError, match="precision: expected one of auto, bf16, int8, got 'fp7'"):
        error_bound(*p.arguments, format="mxfp4", precision="fp7")
    with pytest.raises(ValueError, match=r"experts.\d: expected gate and up \[I, H\] and down"):
        experts_forward(p.x, p.ids, p.weights, p.gate, p.up, p.gate, format="mxfp4")
    with pytest.raises(ValueError, match=r"expected as many experts each, got \[4, 4, 2\]"):
        experts_forward(p.x, p.ids, p.weights, p.gate, p.up, torch.zeros(2, 64, 96))
    codes = p.gate.codes
    with pytest.raises(ValueError, match=r"expected float or QuantizedMatrix, got uint8"):
        experts_forward(p.x, p.ids, p.weights, codes, codes, codes, format="mxfp4")


def test_shapes_and_dtypes_of_the_rest_are_checked():
    p = Problem(WEIGHT_FORMATS["mxfp4"])

    def refused(message, function=experts_forward, **options):
        with pytest.raises(ValueError, match=message):
            function(*p.arguments, format="mxfp4", **options)

    refused("gate_bias: expected 4 experts, got 3", gate_bias=torch.zeros(3, 96))
    refused(r"experts.\d: up_bias: expected \[96\], got \[1\]", up_bias=torch.zeros(4, 1))
    refused(r"experts.\d: down_bias: expected \[64\], got \[96\]", down_bias=torch.zeros(4, 96))
    for mask in (
        torch.zeros(3, dtype=torch.bool),
        torch.zeros(5, dtype=torch.bool),
        torch.zeros(4),
    ):
        refused(r"expert_mask: expected bool \[4\], got ", expert_mask=mask)
    refused("got float64", error_bound, output_dtype=torch.float64)
    p.x = p.x[:, :32]
    refused(r"hidden_states: expected \[tokens, 64\], got \[7, 32\]")


def test_dequantize_checks_its_tensors():
    codes, scales = torch.zeros(2, 16, dtype=torch.int8), torch.full((2, 1), 255).to(torch.uint8)
    with pytest.raises(ValueError, match=r"scales: .* got 255 \(NaN\) at index \[0, 0\]"):
        dequantize(codes, scales, "mxfp4")


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_quantized_activations_are_the_nearest(fused, dtype):
    x = torch.randn(50, 96, generator=torch.Generator().manual_seed(0)).to(dtype)
    codes, scales = quantize_activations(x, fused=fused)
    assert (codes.dtype, codes.shape) == (torch.int8, x.shape)
    assert (scales.dtype, scales.shape) == (torch.float32, (50, 3))
    groups = x.double().reshape(50, 3, 32)
    greatest = groups.abs().amax(-1, keepdim=True)
    torch.testing.assert_close(scales.double(), greatest[..., 0] / 127, rtol=2**-24, atol=0)
    assert (codes.reshape(50, 3, 32).abs().amax(-1) == 127).all()
    error = (dequantize_activations(codes, scales).reshape(50, 3, 32) - groups).abs()
    assert (error <= greatest / 254 * (1 + 2**-15)).all()


def test_ways_to_multiply_differ_in_ties_only():
    x = torch.randn(200, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    (codes, scales), (fused, same) = (quantize_activations(x, fused=f) for f in (False, True))
    assert torch.equal(scales, same)
    differ = codes != fused
    assert differ.any()
    greatest = (
        x.reshape(200, 2, 32).abs().amax(-1, keepdim=True).expand(-1, -1, 32).reshape(x.shape)
    )
    assert torch.equal(x[differ].abs(), greatest[differ] / 2)


def test_groups_without_a_scale():
    x = torch.full((6, 32), 127.0)
    x[0] = 0
    x[1] = 2.0**-101
    x[2, 5], x[3, 6], x[4, 7] = math.nan, math.inf, -math.inf
    codes, scales = quantize_activations(x)
    assert not codes[:5].any()
    assert not scales[:2].any()
    assert scales[2:5].isnan().all()
    assert torch.equal(dequantize_activations(codes, scales)[5], x[5].double())


@FORMATS
@EVERY_PRECISION
@settings(max_examples=25 if EVERYTHING else 8, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    groups=st.integers(1, 6),
    inner=st.integers(1, 8),
    activation=st.sampled_from(SWIGLUS),
    x_dtype=st.sampled_from([torch.bfloat16, torch.float16, torch.float32]),
    out_dtype=st.sampled_from([torch.bfloat16, torch.float16, torch.float32]),
)
def test_a_correct_kernel_stays_within_the_bound(
    fmt, precision, seed, groups, inner, activation, x_dtype, out_dtype
):
    p = Problem(fmt, hidden=32 * groups, inner=32 * inner, seed=seed)
    p.x = torch.randn(7, 32 * groups, generator=torch.Generator().manual_seed(seed)).to(x_dtype)
    expected, bound = experts_forward_with_bound(
        *p.arguments, format=fmt, activation=activation, output_dtype=out_dtype, precision=precision
    )
    got = kernel(p, activation=activation, output_dtype=out_dtype, precision=precision).double()
    assert ((got - expected).abs() <= bound).all()


@FORMATS
@EVERY_PRECISION
@pytest.mark.parametrize("value", [0.02, 0.3])
def test_coherent_roundings_stay_within_the_bound(fmt, precision, value):
    """Constant weights: every h is the same number, rounded the same way."""
    p = Problem(fmt, hidden=128, inner=512)
    for name, n, k in (("gate", 512, 128), ("up", 512, 128), ("down", 128, 512)):
        setattr(p, name, QuantizedMatrix(*fmt.quantize(torch.full((4, n, k), value))))
    expected, bound = experts_forward_with_bound(*p.arguments, format=fmt, precision=precision)
    assert ((kernel(p, precision=precision).double() - expected).abs() <= bound).all()


@FORMATS
@EVERY_PRECISION
@pytest.mark.parametrize("exponent", [-30, 20])
def test_the_bound_follows_the_size_of_the_weights(fmt, precision, exponent):
    p = Problem(fmt)
    if fmt.name == "fp16":  # no scales, and few exponents
        exponent = max(-8, min(exponent, 10))
    p.down = fmt.quantized(torch.randn(4, 64, 96) * 2.0**exponent)
    expected, bound = experts_forward_with_bound(*p.arguments, format=fmt, precision=precision)
    assert ((kernel(p, precision=precision).double() - expected).abs() <= bound).all()
    assert bound.max() < 0.1 * expected.abs().max()


@FORMATS
@pytest.mark.parametrize("hidden", [64, 256])
def test_the_bound_is_a_few_bf16_roundings(fmt, hidden):
    p = Problem(fmt, hidden=hidden, inner=2 * hidden)
    expected, bound = experts_forward_with_bound(*p.arguments, format=fmt)
    assert torch.equal(bound, error_bound(*p.arguments, format=fmt))
    assert bound.norm() < 0.04 * expected.norm()


@FORMATS
def test_the_int8_bound_is_little_more_than_the_error(fmt):
    p = Problem(fmt, hidden=256, inner=512)
    expected, bounds = experts_forward_with_bounds(*p.arguments, format=fmt, precisions=PRECISIONS)
    assert list(bounds) == list(PRECISIONS)
    for precision, bound in bounds.items():
        alone = experts_forward_with_bound(*p.arguments, format=fmt, precision=precision)
        assert torch.equal(alone[0], expected)
        assert torch.equal(alone[1], bound)
    error = (kernel(p, precision="int8").double() - expected).norm()
    assert 0.008 * expected.norm() < error < 0.013 * expected.norm()
    assert bounds["int8"].norm() < 3 * error


@QUANTIZED
@EVERY_PRECISION
@pytest.mark.parametrize("projection", ["gate", "up", "down"])
@pytest.mark.parametrize("fault", ["swapped nibbles", "scale off by one"])
def test_a_wrong_byte_exceeds_the_bound(fmt, precision, projection, fault):
    """Two nibbles swapped, or a group's scale doubled or halved, in one matrix of all experts."""
    p = Problem(fmt)
    expected, bound = experts_forward_with_bound(*p.arguments, format=fmt, precision=precision)
    right = getattr(p, projection)
    codes, scales = right.codes.clone(), right.scales.clone()
    if fault == "swapped nibbles":
        # The byte whose two weights differ most, because swapping equal ones is no fault.
        pairs = fmt.dequantize(codes, scales).unflatten(-1, (-1, 2))[:, 0]
        column = int((pairs[..., 0] - pairs[..., 1]).abs().amin(0).argmax())
        byte = codes[:, 0, column]
        codes[:, 0, column] = (byte >> 4) | (byte << 4)
    elif fmt.name == "mxfp4":
        scales[:, 0, 0] += 1
    elif fmt.name == "nvfp4":
        scales.view(torch.uint8)[:, 0, 0] -= 8
    else:
        scales[:, 0, 0] *= 2
    setattr(p, projection, QuantizedMatrix(codes, scales, right.factor))
    error = (kernel(p, precision=precision).double() - expected).abs()
    assert (error > bound).any(), (error / bound).max()
