"""INT4 whose scales cover more than 32 weights: 64, 128, other multiples of 32, or a whole row."""

import dataclasses

import pytest
import torch
from moe_tools import EVERY_ISA, inputs, layer, refused

from cpumoe import Experts, QuantizedMatrix, weight_format

INT4 = weight_format("int4")
HIDDEN, INTERMEDIATE, EXPERTS = 384, 256, 3
ROW = "row"
GROUPS = pytest.mark.parametrize("group", [64, 128, ROW])


def grouped(group):
    """A layer whose scales cover `group` weights each."""
    generator = torch.Generator().manual_seed(3)

    def matrices(n, k):
        weights = torch.empty(EXPERTS, n, k).normal_(0, 0.1, generator=generator)
        return QuantizedMatrix(*INT4.quantize(weights, k if group == ROW else group))

    gate, up = matrices(INTERMEDIATE, HIDDEN), matrices(INTERMEDIATE, HIDDEN)
    like = layer("int4", hidden=HIDDEN, intermediate=INTERMEDIATE, experts=EXPERTS)
    return dataclasses.replace(like, gate=gate, up=up, down=matrices(HIDDEN, INTERMEDIATE))


def repeated(matrix):
    """The matrix with a scale for each 32 weights."""
    times = matrix.group_size // 32
    return QuantizedMatrix(matrix.codes, matrix.scales.repeat_interleave(times, dim=-1))


@EVERY_ISA
@GROUPS
def test_results_are_those_of_repeated_scales(isa, group):
    weights = grouped(group)
    each = dataclasses.replace(
        weights, gate=repeated(weights.gate), up=repeated(weights.up), down=repeated(weights.down)
    )
    for tokens in (1, 6, 70):
        args = inputs(weights, tokens=tokens)
        assert torch.equal(weights.pack(isa=isa)(*args), each.pack(isa=isa)(*args))


@GROUPS
def test_export_returns_what_was_packed(group):
    weights = grouped(group)
    experts = weights.pack()
    for index in range(EXPERTS):
        exported = experts.export(index)
        for name in ("gate", "up", "down"):
            ours, theirs = getattr(exported, name), getattr(weights, name)[index]
            assert torch.equal(ours.codes, theirs.codes)
            assert torch.equal(ours.scales, theirs.scales)


@GROUPS
def test_shards_have_the_scales_of_their_columns(group):
    weights = grouped(group)
    experts = weights.pack()
    half = INTERMEDIATE // 2
    size = half if group == ROW else group
    for features in (slice(0, half), slice(half, None)):
        down = QuantizedMatrix(
            torch.zeros(HIDDEN, half // 2, dtype=torch.uint8),
            torch.zeros(HIDDEN, half // size, dtype=torch.bfloat16),
        )
        gate, up = (
            QuantizedMatrix(
                torch.zeros(half, HIDDEN // 2, dtype=torch.uint8),
                torch.zeros(half, weights.gate.scales.shape[-1], dtype=torch.bfloat16),
            )
            for _ in range(2)
        )
        experts.export_into(1, gate=gate, up=up, down=down, intermediate=features)
        dense = INT4.dequantize(weights.down.codes[1], weights.down.scales[1])
        assert torch.equal(INT4.dequantize(down.codes, down.scales), dense[:, features])
        assert torch.equal(gate.scales, weights.gate.scales[1, features])


def test_scales_are_never_merged_by_an_export():
    weights = grouped(64)
    experts = weights.pack()
    exported = experts.export(0)
    buffers = {name: getattr(exported, name) for name in ("gate", "up", "down")}
    coarse = torch.empty(HIDDEN, INTERMEDIATE // 128, dtype=torch.bfloat16)
    buffers["down"] = QuantizedMatrix(buffers["down"].codes, coarse)
    with refused(
        ValueError,
        "down: 64 columns share a scale, so 256 columns from 0 on cannot have a scale for each 128",
    ):
        experts.export_into(0, **buffers)


def test_the_number_of_scales_says_how_large_groups_are():
    weights = grouped(64)
    scales = torch.ones(EXPERTS, INTERMEDIATE, 3, dtype=torch.bfloat16)
    experts = Experts.from_tensors(**{**weights.tensors, "gate": (weights.gate.codes, scales)})
    exported = experts.export(0)
    assert (exported.gate.group_size, exported.up.group_size) == (128, 64)


@pytest.mark.parametrize("count", [5, 16])
def test_scales_that_are_no_groups_are_refused(count):
    weights = grouped(128)
    scales = torch.ones(EXPERTS, INTERMEDIATE, count, dtype=torch.bfloat16)
    with refused(
        ValueError,
        f"gate scales: expected [{EXPERTS}, {INTERMEDIATE}, 12], or fewer for larger groups, got "
        f"[{EXPERTS}, {INTERMEDIATE}, {count}]; {INT4.remedy}",
    ):
        Experts.from_tensors(**{**weights.tensors, "gate": (weights.gate.codes, scales)})


def test_mxfp4_has_groups_of_32_only():
    shared = "weights that share a scale: expected"
    with refused(ValueError, f"mxfp4: {shared} 32, which is fixed, got 64"):
        weight_format("mxfp4").quantize(torch.ones(4, 128), 64)
    message = f"{shared} a multiple of 32 that divides a row of 128 weights, 32 * 2^n, or the row"
    with refused(ValueError, f"int4: {message}, got 96"):
        INT4.quantize(torch.ones(4, 128), 96)


@pytest.mark.parametrize("group", ["row", 32.0, True])
def test_a_group_is_a_number_of_weights(group):
    with refused(TypeError, f"group_size: expected an int, got {group!r}"):
        INT4.quantize(torch.ones(4, 128), group)
