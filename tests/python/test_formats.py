import dataclasses
import math
import re
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cpumoe.formats import WEIGHT_FORMATS, QuantizedMatrix, weight_format
from cpumoe.formats.weight_format import _pair_table

ml_dtypes = pytest.importorskip("ml_dtypes")
np = pytest.importorskip("numpy")

MXFP4, INT4 = WEIGHT_FORMATS["mxfp4"], WEIGHT_FORMATS["int4"]


def unpack(codes):
    return torch.stack((codes & 15, codes >> 4), -1).flatten(-2)


def test_every_byte_and_scale_dequantizes_exactly():
    """All 256 code bytes under all 255 E8M0 scales, against ml_dtypes."""
    codes = torch.arange(256, dtype=torch.uint8).view(1, 16, 16).expand(255, 16, 16)
    scales = torch.arange(255, dtype=torch.uint8).view(255, 1, 1).expand(255, 16, 1)
    values = np.arange(16, dtype=np.uint8).view(ml_dtypes.float4_e2m1fn).astype(np.float64)
    factors = np.arange(255, dtype=np.uint8).view(ml_dtypes.float8_e8m0fnu).astype(np.float64)
    expected = values[unpack(codes).numpy()] * factors[:, None, None]
    got64 = MXFP4.dequantize(codes, scales, dtype=torch.float64)
    assert np.array_equal(got64.numpy(), expected)
    got32 = MXFP4.dequantize(codes, scales)
    assert got32.dtype == torch.float32
    with np.errstate(over="ignore"):
        assert np.array_equal(got32.numpy(), expected.astype(np.float32))
    assert torch.equal(got32.signbit(), torch.from_numpy(np.signbit(expected)))


def test_int4_dequantizes_as_compressed_tensors():
    ct = pytest.importorskip("compressed_tensors.compressors.pack_quantized.helpers")
    torch.manual_seed(0)
    q = torch.randint(-8, 8, (6, 96), dtype=torch.int8)
    packed = ct.pack_to_int32(q, 4)
    scales = torch.rand(6, 3).bfloat16()
    codes = INT4.normalize_codes(packed, "w")
    assert codes.data_ptr() == packed.data_ptr()
    expected = q.double() * scales.double().repeat_interleave(32, 1)
    assert torch.equal(INT4.dequantize(codes, scales, dtype=torch.float64), expected)
    assert torch.equal(INT4.dequantize(codes, scales), expected.float())


def mx_oracle(group):
    """MX spec v1.0 section 6.3, one group, by ml_dtypes' conversion."""
    amax = float(np.abs(group).max())
    if amax == 0:
        return np.zeros(32, np.uint8), 0
    shared = min(max(math.floor(math.log2(amax)) - 2, -127), 127)
    scaled = group.astype(np.float64) / 2.0**shared
    saturated = np.clip(scaled, -6, 6)
    return saturated.astype(ml_dtypes.float4_e2m1fn).view(np.uint8), shared + 127


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32 - 1), st.floats(-140, 120), st.booleans())
def test_mxfp4_quantizes_as_ml_dtypes(seed, exponent, coarse):
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(2, 64, generator=generator)
    if coarse:
        w = (w * 4).round() / 4  # many ties
    w = w * 2.0**exponent
    codes, scales = MXFP4.quantize(w)
    for row in range(2):
        for group in range(2):
            block = slice(32 * group, 32 * group + 32)
            expected, byte = mx_oracle(w[row, block].numpy())
            assert int(scales[row, group]) == byte
            got = unpack(codes)[row, block].numpy()
            values = np.array(MXFP4.values)
            assert np.array_equal(values[got], values[expected & 15])


def test_mxfp4_ties_go_to_even_codes_and_large_values_saturate():
    ties = [0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0]
    w = torch.zeros(1, 32)
    w[0, : len(ties)] = torch.tensor(ties)
    w[0, 8] = -7.9
    codes, scales = MXFP4.quantize(w)
    assert scales.tolist() == [[127]]
    assert unpack(codes)[0, :9].tolist() == [0, 2, 2, 4, 4, 6, 6, 0, 15]


@pytest.mark.parametrize("fmt", WEIGHT_FORMATS.values(), ids=lambda f: f.name)
def test_zero_weights_stay_zero(fmt):
    matrix = fmt.quantized(torch.zeros(3, 64))
    fmt.check_scales(matrix.scales, "w")
    assert not fmt.dense(matrix).any()


@pytest.mark.parametrize("fmt", WEIGHT_FORMATS.values(), ids=lambda f: f.name)
def test_quantizing_dequantized_weights_keeps_them(fmt):
    torch.manual_seed(0)
    w = torch.randn(2, 3, 128)
    if fmt is INT4:  # otherwise amax / 7.5 gives another scale
        w.view(2, 3, 4, 32)[..., 0] = -8
    first = fmt.dense(fmt.quantized(w))
    assert first.shape == w.shape
    if fmt is MXFP4:
        assert torch.equal(first, fmt.dense(fmt.quantized(first)))
    assert (first - w).norm() < 0.2 * w.norm()


def test_int4_scales_and_codes_follow_compressed_tensors():
    quantization = pytest.importorskip("compressed_tensors.quantization")
    helpers = pytest.importorskip("compressed_tensors.quantization.utils.helpers")
    torch.manual_seed(1)
    w = torch.randn(4, 96)
    args = quantization.QuantizationArgs(
        num_bits=4, type="int", symmetric=True, strategy="group", group_size=32
    )
    low, high = w.view(4, 3, 32).aminmax(dim=-1)
    expected_scales, _ = helpers.calculate_qparams(low, high, args)
    codes, scales = INT4.quantize(w)
    assert torch.equal(scales, expected_scales.bfloat16())
    q = quantization.quantize(
        w, scales.float(), torch.zeros_like(scales.float()), args, dtype=torch.int8
    )
    assert torch.equal(unpack(codes).to(torch.int8) - 8, q)


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8])
def test_mxfp4_codes_are_reinterpreted_without_a_copy(dtype):
    codes = torch.arange(-128, 128, dtype=torch.int16).view(torch.uint8)[::2].view(4, 64)
    codes = codes.contiguous().view(dtype)
    got = MXFP4.normalize_codes(codes, "w")
    assert got.dtype == torch.uint8
    assert got.data_ptr() == codes.data_ptr()
    assert torch.equal(got, codes.view(torch.uint8))


def test_e8m0_scales_are_reinterpreted_not_converted():
    stored = torch.tensor([[0, 126, 127, 130]], dtype=torch.uint8).view(torch.float8_e8m0fnu)
    got = MXFP4.normalize_scales(stored, "s")
    assert got.tolist() == [[0, 126, 127, 130]]
    assert got.data_ptr() == stored.data_ptr()


def test_strided_rows_are_read_in_place():
    torch.manual_seed(0)
    stored = torch.randint(0, 256, (8, 32), dtype=torch.uint8)
    rows = MXFP4.normalize_codes(stored[::2], "w")
    assert rows.data_ptr() == stored.data_ptr()
    scales = torch.full((4, 2), 127, dtype=torch.uint8)
    expected = MXFP4.dequantize(stored[::2].contiguous(), scales)
    assert torch.equal(MXFP4.dequantize(rows, scales), expected)


def test_single_group_columns_are_contiguous():
    column = torch.arange(6, dtype=torch.uint8).view(3, 2)[:, :1]
    column = column.as_strided((3, 1), (2, 5))
    assert MXFP4.normalize_scales(column, "s").tolist() == [[0], [2], [4]]


@pytest.mark.parametrize(
    ("tensor", "error", "message"),
    [
        (
            torch.zeros(4, 16),
            TypeError,
            r"w: expected uint8 or int8.*, got float32 \[4, 16\]",
        ),
        (
            None,
            TypeError,
            r"w: expected a torch.Tensor of uint8 or int8.*, got NoneType",
        ),
        (
            torch.zeros(16, 4, dtype=torch.uint8).T,
            ValueError,
            r"w: the last dimension must be contiguous, got uint8 \[4, 16\] with strides \[1, 4\]; "
            r"pass .contiguous\(\)",
        ),
        (
            torch.zeros(4, 32, dtype=torch.uint8)[:, ::2],
            ValueError,
            r"w: the last dimension must be contiguous",
        ),
        (
            torch.zeros(4, 16, dtype=torch.uint8, device="meta"),
            TypeError,
            r"w: expected a CPU tensor, got device meta; move it with .cpu\(\)",
        ),
        (torch.zeros(4, dtype=torch.uint8), ValueError, r"w: expected a dense \[..., N, K\]"),
    ],
)
def test_codes_that_cannot_be_read_are_refused(tensor, error, message):
    with pytest.raises(error, match=message):
        MXFP4.normalize_codes(tensor, "w")


def test_scales_of_another_dtype_are_refused():
    message = r"w2.scale: expected float8_e8m0fnu or uint8, got float32 \[4, 2\]"
    with pytest.raises(TypeError, match=message):
        MXFP4.normalize_scales(torch.ones(4, 2), "w2.scale")
    message = r"s: expected bfloat16 or float16 or float32, got float64 \[4, 2\]"
    with pytest.raises(TypeError, match=message):
        INT4.normalize_scales(torch.ones(4, 2, dtype=torch.float64), "s")


def test_nan_scales_are_refused_with_their_index():
    scales = torch.full((3, 4), 127, dtype=torch.uint8)
    MXFP4.check_scales(scales, "s")
    scales[1, 2] = 255
    with pytest.raises(ValueError, match=r"w1.scale: .* got 255 \(NaN\) at index \[1, 2\]"):
        MXFP4.check_scales(scales, "w1.scale")
    for bad in (math.nan, math.inf, -math.inf):
        scales = torch.ones(3, 4).bfloat16()
        scales[2, 0] = bad
        with pytest.raises(ValueError, match=rf"s: .* got {bad} at index \[2, 0\]"):
            INT4.check_scales(scales, "s")
    for fmt in (MXFP4, INT4):
        fmt.check_scales(torch.empty(0, 4, dtype=fmt.scale_storage), "s")


@pytest.mark.parametrize("group", [32, 96])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=["fp16", "fp32"])
def test_int4_scales_of_another_type_are_those_of_compressed_tensors(dtype, group):
    quantization = pytest.importorskip("compressed_tensors.quantization")
    utils = pytest.importorskip("compressed_tensors.quantization.utils")
    weights = torch.randn(4, 96, generator=torch.Generator().manual_seed(1)).to(dtype)
    weights[1, :32] = 0
    codes, scales = INT4.quantize(weights, group, dtype)
    assert scales.dtype == dtype
    args = quantization.QuantizationArgs(
        num_bits=4, symmetric=True, strategy="group", group_size=group
    )
    groups = weights.unflatten(-1, (-1, group)).float()
    expected, _ = utils.calculate_qparams(groups.amin(-1), groups.amax(-1), args)
    zero = expected == torch.finfo(torch.float32).eps  # the library's least scale
    expected = expected.to(dtype).masked_fill(zero, torch.finfo(dtype).eps)
    assert torch.equal(scales, expected)
    q = (groups / scales.float().unsqueeze(-1)).round().clamp(-8, 7).flatten(-2)
    assert torch.equal(
        INT4.dequantize(codes, scales), q * scales.float().repeat_interleave(group, -1)
    )


def test_scales_that_the_format_or_their_type_does_not_have_are_refused():
    with pytest.raises(ValueError, match=r"int4: scales: expected bfloat16 or .*, got float64"):
        INT4.quantize(torch.ones(1, 32), scale_dtype=torch.float64)
    message = "weights need scales up to 133333, and the greatest number of float16 is 65504"
    with pytest.raises(ValueError, match=re.escape(message)):
        INT4.quantize(torch.full((1, 32), 1e6), scale_dtype=torch.float16)


def test_shapes_that_do_not_belong_together_are_refused():
    with pytest.raises(ValueError, match=r"mxfp4: K must be a multiple of 2, because a byte has 2"):
        MXFP4.quantize(torch.zeros(1, 33))
    with pytest.raises(ValueError, match=r"mxfp4 scales: expected \[4, 2\], got \[4, 1\]"):
        MXFP4.dequantize(
            torch.zeros(4, 32, dtype=torch.uint8), torch.zeros(4, 1, dtype=torch.uint8)
        )


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("fmt", WEIGHT_FORMATS.values(), ids=lambda f: f.name)
def test_weights_must_be_finite(fmt, bad):
    w = torch.zeros(1, 32)
    w[0, 5] = bad
    with pytest.raises(ValueError, match="weights must be finite"):
        fmt.quantize(w)


def test_unknown_format_names_those_that_exist():
    with pytest.raises(ValueError, match=r"'q4_k' is not supported; supported: mxfp4, int4"):
        weight_format("q4_k")
    assert weight_format(MXFP4) is MXFP4


def test_a_stack_of_matrices_is_indexed_without_a_copy():
    stack = QuantizedMatrix(*MXFP4.quantize(torch.ones(3, 4, 64)))
    assert stack.shape == (3, 4, 64)
    assert stack[1].shape == (4, 64)
    assert stack[1].codes.data_ptr() == stack.codes[1].data_ptr()
    assert stack.nbytes == 3 * 4 * (32 + 2)
    assert MXFP4.bits_per_weight == 4.25
    assert INT4.bits_per_weight == 4.5


def test_the_default_device_is_not_remembered():
    codes, scales = MXFP4.quantize(torch.ones(2, 64))
    _pair_table.cache_clear()
    with torch.device("meta"):
        first = MXFP4.dequantize(codes, scales)
        assert torch.equal(MXFP4.quantize(first)[0], codes)
    assert torch.equal(MXFP4.dequantize(codes, scales), first)


def test_quantizing_leaves_the_threads_of_others_alone():
    seen = []

    def quantize_groups(groups, scale_dtype):
        with ThreadPoolExecutor(1) as pool:
            seen.append(pool.submit(torch.get_num_threads).result())
        return MXFP4.quantize_groups(groups, scale_dtype)

    before = torch.get_num_threads()
    torch.set_num_threads(before + 1)
    try:
        dataclasses.replace(MXFP4, quantize_groups=quantize_groups).quantize(torch.ones(1, 32))
    finally:
        torch.set_num_threads(before)
    assert seen == [before + 1]
