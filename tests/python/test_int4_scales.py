"""INT4 whose scales are float16 or float32 instead of bfloat16."""

import dataclasses
import itertools
import re

import pytest
import torch
from checkpoint_tools import a_call, edit_tensors, write_small
from moe_tools import EVERY_FP32_PRECISION, EVERY_ISA, check, inputs, layer, refused
from safetensors.torch import load_file

import cpumoe
from cpumoe import CheckpointError, Experts, ExpertWeights, Linear, QuantizedMatrix, weight_format

INT4 = weight_format("int4")
PROJECTIONS = ("gate", "up", "down")
HIDDEN, INTERMEDIATE, EXPERTS = 384, 256, 3
ROW = "row"
DTYPES = pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=["fp16", "fp32"])
GROUPS = pytest.mark.parametrize("group", [32, 64, 128, ROW])


def scaled(dtype, group=32):
    """A layer whose scales have a dtype and numbers that bfloat16 does not hold."""
    generator = torch.Generator().manual_seed(3)

    def matrices(n, k):
        weights = torch.empty(EXPERTS, n, k).normal_(0, 0.1, generator=generator)
        codes, scales = INT4.quantize(weights, k if group == ROW else group)
        factors = torch.empty(scales.shape).uniform_(0.5, 1, generator=generator)
        return QuantizedMatrix(codes, (scales * factors).to(dtype))

    gate, up = matrices(INTERMEDIATE, HIDDEN), matrices(INTERMEDIATE, HIDDEN)
    like = layer("int4", hidden=HIDDEN, intermediate=INTERMEDIATE, experts=EXPERTS)
    return dataclasses.replace(like, gate=gate, up=up, down=matrices(HIDDEN, INTERMEDIATE))


def buffers(dtype):
    """Memory for the matrices of one expert."""
    sizes = dict.fromkeys(("gate", "up"), (INTERMEDIATE, HIDDEN)) | {"down": (HIDDEN, INTERMEDIATE)}
    return {
        name: (torch.zeros(n, k // 2, dtype=torch.uint8), torch.zeros(n, k // 32, dtype=dtype))
        for name, (n, k) in sizes.items()
    }


def assert_exported(experts, index, expected):
    exported = experts.export(index)
    for name in PROJECTIONS:
        ours, theirs = getattr(exported, name), getattr(expected, name)
        assert torch.equal(ours.codes, theirs.codes)
        assert ours.scales.dtype == theirs.scales.dtype
        assert torch.equal(ours.scales, theirs.scales)


@DTYPES
def test_weights_are_codes_times_scales(dtype):
    codes = torch.arange(256, dtype=torch.uint8).view(16, 16)
    scales = torch.randn(16, 1, generator=torch.Generator().manual_seed(1)).to(dtype)
    nibbles = torch.stack((codes & 15, codes >> 4), -1).view(16, 32).double() - 8
    exact = nibbles * scales.double()
    assert torch.equal(INT4.dequantize(codes, scales, dtype=torch.float64), exact)
    assert torch.equal(INT4.dequantize(codes, scales), exact.float())
    if dtype == torch.float16:
        assert torch.equal(exact.float().double(), exact)


@EVERY_ISA
@DTYPES
@GROUPS
def test_layers_compute_and_export_what_they_packed(isa, dtype, group):
    weights = scaled(dtype, group)
    experts = weights.pack(isa=isa)
    for tokens in (1, 6, 70):
        args = inputs(weights, tokens=tokens)
        check(experts(*args), weights, args)
    for index in range(EXPERTS):
        single = {name: getattr(weights, name)[index] for name in PROJECTIONS}
        assert_exported(experts, index, ExpertWeights(**single))


@EVERY_ISA
@EVERY_FP32_PRECISION
def test_fp32_calls_keep_their_accuracy(isa, precision):
    weights = scaled(torch.float16)
    experts = weights.pack(isa=isa, precision=precision)
    for tokens in (1, 40):
        args = inputs(weights, tokens=tokens, dtype=torch.float32)
        check(experts(*args), weights, args, precision=precision)


@EVERY_ISA
def test_a_layer_may_mix_dtypes(isa):
    parts = [scaled(dtype) for dtype in INT4.scale_dtypes]
    for order in itertools.permutations(range(3)):
        chosen = {name: getattr(parts[i], name) for name, i in zip(PROJECTIONS, order, strict=True)}
        weights = dataclasses.replace(parts[0], **chosen)
        experts = weights.pack(isa=isa)
        args = inputs(weights, tokens=3)
        check(experts(*args), weights, args)
        assert_exported(experts, 1, ExpertWeights(**{n: m[1] for n, m in chosen.items()}))


def test_float32_scales_take_a_tenth_more_memory():
    narrow, wide = scaled(torch.bfloat16).pack(), scaled(torch.float16).pack()
    assert wide.nbytes / narrow.nbytes == (16 + 4) / (16 + 2)
    assert wide.format == narrow.format == "int4"


@DTYPES
def test_exported_scales_may_become_float32_but_lose_nothing(dtype):
    weights = scaled(dtype)
    experts = weights.pack()
    into = buffers(torch.float32)
    experts.export_into(2, **into)
    for name in PROJECTIONS:
        assert torch.equal(into[name][1], getattr(weights, name).scales[2].float())
    names = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
    for other in {torch.bfloat16, torch.float16} - {dtype}:
        message = (
            f"gate: {names[other]} scales cannot hold the stored {names[dtype]} ones; pass scales "
            f"of that type"
        )
        with refused(ValueError, message):
            experts.export_into(2, **buffers(other))


def test_later_experts_need_scales_that_the_layer_takes():
    given = {dtype: scaled(dtype) for dtype in INT4.scale_dtypes}

    def expert(dtype, index):
        return ExpertWeights(**{n: getattr(given[dtype], n)[index] for n in PROJECTIONS})

    def made(dtype):
        masked = torch.tensor([False, True, True])
        return Experts.from_tensors(**given[dtype].tensors, expert_mask=masked, pack_masked=False)

    narrow = made(torch.bfloat16)
    message = (
        "expert 1: gate: expected bf16 scales, for which the layer of int4 was made, got fp16 "
        "scales"
    )
    with refused(ValueError, message):
        narrow.pack([1], lambda index: expert(torch.float16, index))
    assert narrow.packed_experts == [0]
    wide = made(torch.float16)
    for index, dtype in ((1, torch.bfloat16), (2, torch.float32)):
        wide.pack([index], lambda index, dtype=dtype: expert(dtype, index))
        assert_exported(wide, index, expert(dtype, index))


@DTYPES
@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_scales_must_be_finite(dtype, bad):
    weights = scaled(dtype)
    scales = weights.up.scales.clone()
    scales[1, 5, 3] = bad
    up = QuantizedMatrix(weights.up.codes, scales)
    with pytest.raises(ValueError, match=re.escape("up: scale [5, 3] is")):
        Experts.from_tensors(**{**weights.tensors, "up": up})
    with pytest.raises(ValueError, match=r"scales must be finite, got (inf|nan) at index"):
        INT4.check_scales(scales, "up")


@DTYPES
def test_groups_of_zeros_and_extreme_scales(dtype):
    weights = scaled(dtype)
    codes, scales = weights.down.codes.clone(), weights.down.scales.clone()
    scales[:, :, 0] = 0
    scales[:, :, 1] = torch.finfo(dtype).max
    codes[:, :, 16:32] = 0x88  # zeros of these scales
    scales[:, :, 2] = torch.finfo(dtype).smallest_normal / 8
    changed = dataclasses.replace(weights, down=QuantizedMatrix(codes, scales))
    for tokens in (1, 70):
        args = inputs(changed, tokens=tokens)
        check(changed.pack()(*args), changed, args)


@EVERY_ISA
@DTYPES
@GROUPS
def test_dense_layers_take_these_scales(isa, dtype, group):
    weights = scaled(dtype, group)
    matrix = weights.up[0]
    linear = Linear.from_tensors(matrix, format="int4", isa=isa)
    exported = linear.export()
    assert exported.scales.dtype == dtype
    assert torch.equal(exported.scales, matrix.scales)
    x = inputs(weights, tokens=5, dtype=torch.float32).hidden_states
    expected = x.double() @ INT4.dequantize(matrix.codes, matrix.scales, dtype=torch.float64).T
    torch.testing.assert_close(linear(x).double(), expected, rtol=1e-4, atol=1e-4)


# Checkpoints


def with_scales(folder, dtype_of):
    """Gives the scales of a checkpoint's experts the dtypes that `dtype_of(name)` says."""
    stored = load_file(folder / "model.safetensors")
    scales = {
        name: (tensor * 1.001).to(dtype_of(name))
        for name, tensor in stored.items()
        if name.endswith("weight_scale")
    }
    assert scales
    edit_tensors(folder, scales)
    return scales


@pytest.fixture
def kimi(tmp_path):
    return write_small(tmp_path, "kimi-k2")


def test_a_checkpoint_may_give_each_expert_another_dtype(kimi):
    names = {"experts.0.": torch.bfloat16, "experts.1.": torch.float16, "experts.2.": torch.float32}
    with_scales(kimi, lambda name: next(d for part, d in names.items() if part in name))
    masked = torch.tensor([False, True, True])
    for options in ({}, {"expert_mask": masked, "pack_masked": False}):
        experts = Experts.from_checkpoint(kimi, 1, **options)
        experts.expert_mask = None
        reader = cpumoe.open_checkpoint(kimi)
        for index in range(3):
            assert_exported(experts, index, reader.expert(1, index))
        x, ids, routing = a_call(experts=3, top_k=2)
        assert experts(x, ids, routing).isfinite().all()


def test_experts_chosen_from_a_checkpoint_decide(kimi):
    with_scales(kimi, lambda name: torch.float16 if "experts.2." in name else torch.bfloat16)
    narrow = Experts.from_checkpoint(kimi, 1, experts=[0, 1])
    wide = Experts.from_checkpoint(kimi, 1, experts=[0, 2])
    assert narrow.nbytes < wide.nbytes


def test_other_dtypes_in_a_checkpoint_are_refused(kimi):
    with_scales(kimi, lambda _name: torch.int32)
    expected = r"weight_scale: expected bfloat16 or float16 or float32 \[96, 2\], got int32"
    with pytest.raises(CheckpointError, match=expected):
        Experts.from_checkpoint(kimi, 1)
