"""FP8: E4M3 codes with scales of blocks or rows."""

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from moe_tools import EVERY_ISA, Layer, check, inputs, refused

from cpumoe import Experts, QuantizedMatrix, weight_format

FP8 = weight_format("fp8")
SCALES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "e8m0": torch.float8_e8m0fnu,
}
GRIDS = pytest.mark.parametrize("grid", ["blocks", "rows"])
DTYPES = pytest.mark.parametrize("dtype", SCALES.values(), ids=SCALES)
EXPERTS = 3


def matrices(n, k, grid, dtype=torch.float32, *, experts=EXPERTS, seed=5):
    """Random codes that are numbers, with scales of moderate size."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 256, (experts, n, k), dtype=torch.uint8, generator=generator)
    codes[codes & 0x7F == 0x7F] = 0x3A
    shape = (experts, n, 1) if grid == "rows" else (experts, -(-n // 128), -(-k // 128))
    scales = torch.rand(shape, generator=generator) * 2e-3 + 1e-4
    if dtype == torch.float8_e8m0fnu:
        scales = torch.randint(114, 120, shape, dtype=torch.uint8, generator=generator)
        return QuantizedMatrix(codes.view(torch.float8_e4m3fn), scales.view(dtype))
    return QuantizedMatrix(codes.view(torch.float8_e4m3fn), scales.to(dtype))


def fp8_layer(hidden=288, inner=160, grid="blocks", dtype=torch.float32):
    gate, up = (matrices(inner, hidden, grid, dtype, seed=seed) for seed in (1, 2))
    return Layer("fp8", gate, up, matrices(hidden, inner, grid, dtype, seed=3))


def same_bytes(left, right):
    return torch.equal(left.contiguous().view(torch.uint8), right.contiguous().view(torch.uint8))


@EVERY_ISA
@GRIDS
@DTYPES
@pytest.mark.parametrize("tokens", [1, 5, 70])
def test_a_layer_computes_what_its_weights_say(isa, grid, dtype, tokens):
    weights = fp8_layer(grid=grid, dtype=dtype)
    experts = weights.pack(isa=isa)
    for activations in (torch.bfloat16, torch.float32):
        args = inputs(weights, tokens=tokens, dtype=activations)
        check(experts(*args), weights, args)


@EVERY_ISA
@GRIDS
@DTYPES
def test_export_returns_what_was_packed(isa, grid, dtype):
    weights = fp8_layer(grid=grid, dtype=dtype)
    experts = weights.pack(isa=isa)
    for index in range(EXPERTS):
        exported = experts.export(index)
        for name in ("gate", "up", "down"):
            ours, theirs = getattr(exported, name), getattr(weights, name)[index]
            assert ours.codes.dtype == torch.float8_e4m3fn
            assert ours.scales.dtype == dtype
            assert same_bytes(ours.codes, theirs.codes)
            assert same_bytes(ours.scales, theirs.scales)


@settings(deadline=None, max_examples=30)
@given(
    n=st.integers(1, 300),
    groups=st.integers(1, 12),
    grid=st.sampled_from(["blocks", "rows"]),
    dtype=st.sampled_from(list(SCALES.values())),
)
def test_any_shape_is_packed_and_returned(n, groups, grid, dtype):
    hidden, inner = 32 * groups, 32 * (n // 32 + 1)
    weights = fp8_layer(hidden, inner, grid, dtype)
    exported = weights.pack().export(1)
    for name in ("gate", "up", "down"):
        ours, theirs = getattr(exported, name), getattr(weights, name)[1]
        assert same_bytes(ours.codes, theirs.codes)
        assert same_bytes(ours.scales, theirs.scales)


def buffers(hidden, inner, grid, dtype):
    def matrix(n, k):
        shape = (n, 1) if grid == "rows" else (-(-n // 128), -(-k // 128))
        codes = torch.zeros(n, k, dtype=torch.uint8).view(torch.float8_e4m3fn)
        return QuantizedMatrix(codes, torch.zeros(shape, dtype=torch.float32).to(dtype))

    return {
        "gate": matrix(inner, hidden),
        "up": matrix(inner, hidden),
        "down": matrix(hidden, inner),
    }


def dense(matrix):
    return FP8.dequantize(matrix.codes, matrix.scales)


@GRIDS
@DTYPES
@pytest.mark.parametrize("packed", [True, False])
def test_shards_have_the_scales_of_their_blocks(grid, dtype, packed):
    """Both of a packed expert and of one that is read again from its source."""
    hidden, inner = 288, 320
    weights = fp8_layer(hidden, inner, grid, dtype)
    experts = weights.pack()
    source = None if packed else weights
    whole = experts.export(2)
    for features in (slice(0, 256), slice(128, 320), slice(256, 320)):
        into = buffers(hidden, len(range(inner)[features]), grid, dtype)
        write(experts, source, 2, into, features)
        for name in ("gate", "up"):
            assert torch.equal(dense(into[name]), dense(getattr(whole, name))[features])
        assert torch.equal(dense(into["down"]), dense(whole.down)[:, features])


def write(experts, source, index, into, features):
    """Writes an expert; from `source` as an expert is written that is not packed."""
    if source is None:
        experts.export_into(index, **into, intermediate=features)
        return
    from cpumoe._engine.export import copy_into
    from cpumoe._engine.packing import ExpertForm
    from cpumoe.checkpoint import ExpertWeights

    form = ExpertForm(FP8, experts.hidden_size, experts.intermediate_size)
    stored = ExpertWeights(*(getattr(source, name)[index] for name in ("gate", "up", "down")))
    copy_into(stored, form, index, into, features)


@pytest.mark.parametrize("packed", [True, False])
def test_a_shard_that_cuts_a_block_is_refused(packed):
    weights = fp8_layer(288, 320)
    experts = weights.pack()
    source = None if packed else weights
    name = "gate" if packed else "expert 0: gate"
    with refused(
        ValueError,
        f"{name}: 128 rows share a scale, so 192 rows from 64 on cannot have a scale for each 128",
    ):
        write(experts, source, 0, buffers(288, 192, "blocks", torch.float32), slice(64, 256))


@pytest.mark.parametrize("packed", [True, False])
def test_scales_are_never_rounded_by_an_export(packed):
    weights = fp8_layer(grid="rows")
    experts = weights.pack()
    into = buffers(288, 160, "rows", torch.bfloat16)
    with pytest.raises(ValueError, match=r"gate: .*cannot hold the stored"):
        write(experts, None if packed else weights, 0, into, slice(None))
    weights = fp8_layer(grid="rows", dtype=torch.bfloat16)
    into = buffers(288, 160, "rows", torch.float32)
    write(weights.pack(), None if packed else weights, 0, into, slice(None))
    assert torch.equal(into["gate"].scales, weights.gate.scales[0].float())


def test_dequantized_weights_are_those_of_transformers():
    finegrained = pytest.importorskip("transformers.integrations.finegrained_fp8")
    host = finegrained.Fp8Dequantize(None)
    for grid in ("blocks", "rows"):
        for dtype in SCALES.values():
            stack = matrices(256, 384, grid, dtype)
            expected = host._dequantize_one(stack.codes[1], stack.scales[1], torch.float32)
            assert torch.equal(dense(stack[1]), expected)


def test_dequantized_weights_are_those_of_compressed_tensors():
    quantization = pytest.importorskip("compressed_tensors.quantization")
    forward = pytest.importorskip("compressed_tensors.quantization.lifecycle.forward")
    for grid, options in {
        "rows": {"strategy": "channel"},
        "blocks": {"strategy": "block", "block_structure": [128, 128]},
    }.items():
        args = quantization.QuantizationArgs(num_bits=8, type="float", symmetric=True, **options)
        stack = matrices(256, 384, grid)
        expected = forward.dequantize(stack.codes[0], stack.scales[0], args=args)
        assert torch.equal(dense(stack[0]), expected.float())


@pytest.mark.parametrize("by_row", [False, True])
def test_quantizing_rounds_to_the_nearest_code(by_row):
    generator = torch.Generator().manual_seed(1)
    weights = torch.randn(200, 160, generator=generator)
    weights[3] *= 100
    weights[128:, 128:] = 0  # a block of zeros
    codes, scales = FP8.quantize(weights, 160 if by_row else None)
    assert scales.shape == ((200, 1) if by_row else (2, 2))
    values = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).double()
    values = values[~values.isnan()]
    factors = scales if by_row else scales.repeat_interleave(128, 0)[:200]
    factors = factors if by_row else factors.repeat_interleave(128, 1)[:, :160]
    scaled = weights.double() / factors
    nearest = (scaled.unsqueeze(-1) - values).abs().amin(-1)
    error = (codes.double() - scaled).abs()
    assert bool((error <= nearest * (1 + 1e-6) + 1e-6).all())
    again = FP8.quantize(dense(QuantizedMatrix(codes, scales)), 160 if by_row else None)
    assert same_bytes(again[0], codes)


@pytest.mark.parametrize("by_row", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e8m0fnu], ids=["bf16", "e8m0"])
def test_scales_may_be_rounded_to_another_type(dtype, by_row):
    weights = torch.randn(200, 160, generator=torch.Generator().manual_seed(1))
    weights[7] = 0
    weights[128:, 128:] = 0
    weights[0, 0] = 448 * 2.0**-7  # its quotient is a power of two
    codes, scales = FP8.quantize(weights, 160 if by_row else None, dtype)
    assert scales.dtype == dtype
    exact = FP8.quantize(weights, 160 if by_row else None)[1]
    ratio = scales.float() / exact
    if dtype == torch.bfloat16:
        assert torch.equal(scales, exact.bfloat16())
    else:  # no weight saturates
        assert ((ratio >= 1) & (ratio < 2)).all()
    wide = scales.float() if by_row else scales.float().repeat_interleave(128, 0)[:200]
    wide = wide if by_row else wide.repeat_interleave(128, 1)[:, :160]
    assert same_bytes(codes, (weights / wide).clamp(-448, 448).to(torch.float8_e4m3fn))


def test_the_grid_is_found_from_the_scales_shape():
    assert matrices(256, 384, "blocks").scale_grid == (128, 128)
    assert matrices(200, 160, "blocks").scale_grid == (128, 128)
    assert matrices(200, 160, "rows").scale_grid == (1, 160)
    assert matrices(64, 96, "blocks").scale_grid == (128, 128)
    assert matrices(64, 96, "rows").scale_grid == (1, 96)


def test_rows_of_a_matrix_begin_with_a_block():
    matrix = matrices(300, 160, "blocks")[0]
    assert matrix[128:300].scales.shape == (2, 2)
    assert matrix[130:140].scales.shape == (1, 2)
    with refused(
        ValueError,
        "matrix: blocks of 128 rows share scales, so rows must begin with a block, got rows 64 to "
        "256 in steps of 1",
    ):
        matrix[64:256]


def test_codes_that_are_no_numbers_are_refused():
    weights = fp8_layer()
    codes = weights.up.codes.clone()
    codes.view(torch.uint8)[1, 7, 33] = 0xFF
    up = QuantizedMatrix(codes, weights.up.scales)
    with refused(
        ValueError,
        "expert 1: up: weight [7, 33] is nan; fp8 weights must be finite: the checkpoint is "
        "damaged",
    ):
        dataclasses.replace(weights, up=up).pack()


@DTYPES
def test_scales_that_are_no_numbers_are_refused(dtype):
    scales = matrices(200, 160, "blocks", dtype).scales[0].clone()
    FP8.check_scales(scales, "s")
    scales.view(torch.uint8)[1, -scales.itemsize :] = 0xFF
    with pytest.raises(ValueError, match=r"s: scales must be finite, got .* at index \[1, 1\]"):
        FP8.check_scales(scales, "s")


def test_scales_as_bytes_are_powers_of_two():
    stack = matrices(160, 288, "blocks", torch.float8_e8m0fnu)
    same = FP8.normalize_scales(stack.scales.view(torch.uint8), "s")
    assert same.dtype == torch.float8_e8m0fnu
    assert same.data_ptr() == stack.scales.data_ptr()


CODES = torch.zeros(EXPERTS, 160, 288, dtype=torch.uint8).view(torch.float8_e4m3fn)


@pytest.mark.parametrize(
    ("gate", "error", "message"),
    [
        (
            (CODES.view(torch.uint8), torch.ones(EXPERTS, 2, 3)),
            TypeError,
            f"gate codes: expected float8_e4m3fn, got uint8 [3, 160, 288]; {FP8.remedy}",
        ),
        (
            (CODES, torch.ones(EXPERTS, 2, 3, dtype=torch.float16)),
            TypeError,
            "gate scales: expected float32 or bfloat16 or float8_e8m0fnu or uint8, got float16 "
            f"[3, 2, 3]; {FP8.remedy}",
        ),
        (
            (CODES, torch.ones(EXPERTS, 2, 2)),
            ValueError,
            "gate scales: expected [3, 2, 3] for blocks of 128 x 128 weights or [3, 160, 1] for "
            f"rows, got [3, 2, 2]; {FP8.remedy}",
        ),
        (
            (CODES, torch.ones(EXPERTS)),
            ValueError,
            "gate scales: expected a scale for each block or row, got float32 [3]; repeat a "
            "matrix' scale for each row, [..., N, 1]",
        ),
        (
            CODES,
            TypeError,
            "gate: expected a QuantizedMatrix or a tuple (codes, scales), got Tensor; "
            f"{FP8.remedy}",
        ),
        (
            (CODES[..., :0], torch.ones(EXPERTS, 2, 0)),
            ValueError,
            "fp8: gate: K must be positive, got 0",
        ),
    ],
)
def test_matrices_that_do_not_fit_are_refused(gate, error, message):
    with refused(error, message):
        Experts.from_tensors(**{**fp8_layer().tensors, "gate": gate})


def test_groups_of_other_sizes_are_refused():
    message = (
        "fp8: weights that share a scale: expected none for blocks of 128 x 128 weights, or a row "
        "(160 weights), got 64"
    )
    with refused(ValueError, message):
        FP8.quantize(torch.ones(4, 160), 64)


def test_int8_rounds_nothing():
    weights = fp8_layer()
    args = inputs(weights, tokens=3)
    assert torch.equal(weights.pack(precision="int8")(*args), weights.pack()(*args))


def test_a_block_s_scale_takes_few_bits():
    assert FP8.bits_per_weight == 8 + 32 / 128**2
