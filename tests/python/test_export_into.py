"""Experts.export_into: codes and scales in memory of the caller."""

import pytest
import torch
from checkpoint_tools import edit_tensors, first_layer, write_small
from moe_tools import EVERY_ISA, EVERY_QUANTIZED_VARIANT, layer, mask, refused

import cpumoe
from cpumoe import Experts, QuantizedMatrix, open_checkpoint

HIDDEN, INTERMEDIATE = 64, 96


@pytest.fixture(scope="module")
def weights():
    return layer("mxfp4", hidden=HIDDEN, intermediate=INTERMEDIATE)


@pytest.fixture(scope="module")
def experts(weights):
    return weights.pack()


def buffers(fmt="mxfp4", features=INTERMEDIATE, *, scales=None, hidden=HIDDEN):
    """Zeroed memory for the matrices of one expert."""
    row = cpumoe.weight_format(fmt)
    scales = scales or row.scale_storage

    def matrix(n, k):
        return torch.zeros(n, k // 2, dtype=torch.uint8), torch.zeros(n, k // 32, dtype=scales)

    return {
        "gate": matrix(features, hidden),
        "up": matrix(features, hidden),
        "down": matrix(hidden, features),
    }


def memory(experts, features=slice(None), scales=torch.bfloat16):
    """Zeroed memory for `features` of a layer's expert."""
    count = len(range(experts.intermediate_size)[features])
    return buffers(experts.format, count, scales=scales, hidden=experts.hidden_size)


def same(left, right):
    return torch.equal(left.view(torch.uint8), right.view(torch.uint8))


@EVERY_QUANTIZED_VARIANT
def test_shards_make_up_the_whole_expert(isa, fmt):
    weights = layer(fmt, hidden=HIDDEN, intermediate=INTERMEDIATE)
    experts = weights.pack(isa=isa)
    whole = experts.export(2)
    for intermediate in (slice(None), None, range(INTERMEDIATE)):
        into = buffers(fmt)
        experts.export_into(2, **into, intermediate=intermediate)
        for name, (codes, scales) in into.items():
            assert same(codes, getattr(whole, name).codes)
            assert same(scales, getattr(whole, name).scales)
    for features in (slice(0, 32), range(32, 96), slice(-32, None)):
        chosen = range(INTERMEDIATE)[features] if isinstance(features, slice) else features
        rows, first, last = slice(chosen.start, chosen.stop), chosen.start, chosen.stop
        into = buffers(fmt, len(chosen))
        experts.export_into(2, **into, intermediate=features)
        for name in ("gate", "up"):
            assert same(into[name][0], getattr(whole, name).codes[rows])
            assert same(into[name][1], getattr(whole, name).scales[rows])
        assert same(into["down"][0], whole.down.codes[:, first // 2 : last // 2].contiguous())
        assert same(into["down"][1], whole.down.scales[:, first // 32 : last // 32].contiguous())


@EVERY_QUANTIZED_VARIANT
def test_rows_may_lie_apart_and_nothing_else_is_written(isa, fmt):
    """gate and up interleaved in one tensor, as gpt-oss has them, within a larger one."""
    weights = layer(fmt, hidden=HIDDEN, intermediate=INTERMEDIATE)
    experts = weights.pack(isa=isa)
    whole = experts.export(1)
    scale = cpumoe.weight_format(fmt).scale_storage
    codes = torch.full((2 * INTERMEDIATE, HIDDEN // 2 + 8), 7, dtype=torch.uint8)
    scales = torch.full((2 * INTERMEDIATE, HIDDEN // 32 + 1), 7).to(scale)
    down = torch.zeros(4, HIDDEN, INTERMEDIATE // 8, dtype=torch.int32)
    down_codes = down[2] if fmt == "int4" else down[2].view(torch.uint8)
    into = {
        "gate": QuantizedMatrix(codes[0::2, :-8], scales[0::2, :-1]),
        "up": (codes[1::2, :-8], scales[1::2, :-1]),
        "down": (down_codes, torch.zeros(HIDDEN, INTERMEDIATE // 32, dtype=scale)),
    }
    experts.export_into(1, **into)
    for start, matrix in enumerate((whole.gate, whole.up)):
        assert same(codes[start::2, :-8].contiguous(), matrix.codes)
        assert same(scales[start::2, :-1].contiguous(), matrix.scales)
    assert codes[:, -8:].eq(7).all()
    assert scales[:, -1:].eq(7).all()
    assert same(down[2], whole.down.codes)
    assert not down[[0, 1, 3]].any()


@pytest.mark.parametrize("isa", cpumoe.supported_isas())
def test_scales_of_any_size_become_bf16_exactly(isa):
    weights = layer("mxfp4", hidden=HIDDEN, intermediate=INTERMEDIATE)
    scales = weights.gate.scales.clone()
    scales.view(-1)[:255] = torch.arange(255).to(torch.uint8)  # 255 is NaN
    gate = QuantizedMatrix(weights.gate.codes, scales)
    experts = cpumoe.Experts.from_tensors(**{**weights.tensors, "gate": gate}, isa=isa)
    into = buffers(scales=torch.bfloat16)
    wide = torch.full((INTERMEDIATE, HIDDEN // 32 + 3), 7.0, dtype=torch.bfloat16)
    into["gate"] = (into["gate"][0], wide[:, :-3])
    experts.export_into(0, **into)
    expected = 2.0 ** (scales[0].double() - 127)
    assert torch.equal(wide[:, :-3].double(), expected)
    assert wide.view(torch.int16)[0, 0] == 0x40  # 2^-127, subnormal
    assert wide[:, -3:].eq(7).all()
    assert same(into["gate"][0], weights.gate.codes[0])
    back = into["down"][1].view(torch.int16) >> 7
    assert torch.equal(back.to(torch.uint8), weights.down.scales[0])


@EVERY_QUANTIZED_VARIANT
@pytest.mark.parametrize("offset", [0, 3, 64])
def test_buffers_may_begin_at_any_byte(isa, fmt, offset):
    """Rows are longer than a cache line, and none of them needs to begin with one."""
    hidden, features = 320, 288
    weights = layer(fmt, hidden=hidden, intermediate=features)
    experts = weights.pack(isa=isa)
    whole = experts.export(1)
    storage = cpumoe.weight_format(fmt).scale_storage
    memory, into = {}, {}
    for name, (n, k) in {
        "gate": (features, hidden),
        "up": (features, hidden),
        "down": (hidden, features),
    }.items():
        size = n * k // 2
        memory[name] = torch.full((size + offset + 64,), 7, dtype=torch.uint8)
        codes = memory[name][offset : offset + size].view(n, k // 2)
        into[name] = (codes, torch.zeros(n, k // 32, dtype=storage))
    experts.export_into(1, **into)
    for name, (codes, scales) in into.items():
        assert same(codes, getattr(whole, name).codes)
        assert same(scales, getattr(whole, name).scales)
        assert memory[name][:offset].eq(7).all()
        assert memory[name][offset + codes.numel() :].eq(7).all()


def test_e8m0_scales_may_have_their_own_dtype(weights, experts):
    into = buffers()
    codes, scales = into["up"]
    into["up"] = (codes.view(torch.int8), scales.view(torch.float8_e8m0fnu))
    experts.export_into(3, **into)
    assert same(scales, weights.up.scales[3])
    assert same(codes, weights.up.codes[3])


def test_autograd_sees_that_a_buffer_has_changed(experts):
    into = buffers(scales=torch.bfloat16)
    scales = into["gate"][1]
    factor = torch.ones_like(scales, requires_grad=True)
    product = (factor * scales).sum()
    experts.export_into(0, **into)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        (
            lambda into: {"gate": into["gate"][0]},
            TypeError,
            "gate: expected a QuantizedMatrix or a tuple (codes, scales), got Tensor",
        ),
        (
            lambda into: {"up": (into["up"][0].float(), into["up"][1])},
            TypeError,
            "up codes: expected",
        ),
        (
            lambda into: {"up": (into["up"][0], into["up"][1].float())},
            TypeError,
            "up scales: expected float8_e8m0fnu or uint8, got float32 [96, 2]",
        ),
        (
            lambda into: {"up": (into["up"][0].to("meta"), into["up"][1])},
            TypeError,
            "up codes: expected a CPU tensor, got device meta; move it with .cpu()",
        ),
        (
            lambda into: {"down": (into["down"][0], 5)},
            TypeError,
            "down scales: expected a torch.Tensor, got int",
        ),
        (
            lambda into: {"down": (into["down"][0][1:], into["down"][1])},
            ValueError,
            "down codes: expected [64, 48], got [63, 48]",
        ),
        (
            lambda into: {"down": (into["down"][0], into["down"][1][:, :2])},
            ValueError,
            "down scales: expected [64, 3], got [64, 2]",
        ),
        (
            lambda into: {"gate": (into["gate"][0].T.contiguous().T, into["gate"][1])},
            ValueError,
            "gate codes: expected rows that are contiguous and do not overlap, got strides "
            "[1, 96]; pass a contiguous tensor and copy from it",
        ),
        (
            lambda into: {"gate": (into["gate"][0][:1].expand(96, 32), into["gate"][1])},
            ValueError,
            "gate codes: expected rows that are contiguous and do not overlap, got strides "
            "[0, 1]; pass a contiguous tensor and copy from it",
        ),
    ],
)
def test_buffers_that_do_not_fit(experts, change, kind, message):
    into = buffers()
    with pytest.raises(kind) as error:
        experts.export_into(0, **{**into, **change(into)})
    assert str(error.value).startswith(message)
    assert not any(part.view(torch.uint8).any() for matrix in into.values() for part in matrix)


@pytest.mark.parametrize(
    "intermediate", [slice(0, 16), slice(32, 32), range(64, 128), range(0, 64, 2), range(-32, 0)]
)
def test_features_are_whole_groups_of_the_layer(experts, intermediate):
    with refused(
        ValueError,
        f"intermediate: expected whole groups of 32 features within 0..96, got {intermediate}",
    ):
        experts.export_into(0, **buffers(), intermediate=intermediate)


def test_features_are_a_slice_or_a_range(experts):
    with refused(TypeError, "intermediate: expected a slice or a range, got int"):
        experts.export_into(0, **buffers(), intermediate=32)


def test_int4_scales_are_bf16_as_stored():
    weights = layer("int4", hidden=HIDDEN, intermediate=INTERMEDIATE)
    into = buffers("int4")
    weights.pack().export_into(1, **into)
    assert torch.equal(into["up"][1], weights.up.scales[1])
    into["up"] = (into["up"][0], into["up"][1].half())
    message = "up: fp16 scales cannot hold the stored bf16 ones; pass scales of that type"
    with refused(ValueError, message):
        weights.pack().export_into(1, **into)
    into["up"] = (into["up"][0], into["up"][1].double())
    message = "up scales: expected bfloat16 or float16 or float32, got float64 [96, 2]"
    with refused(TypeError, message):
        weights.pack().export_into(1, **into)


def test_buffers_that_overlap_are_refused(experts):
    given = buffers()
    codes, scales = given["gate"]
    cases = {
        "up codes: expected memory that gate codes does not use": given | {"up": given["gate"]},
        "gate scales: expected memory that gate codes": given
        | {"gate": (codes, codes.view(-1)[: scales.numel()].view_as(scales))},
    }
    for message, overlapping in cases.items():
        with pytest.raises(ValueError, match=message):
            experts.export_into(0, **overlapping)


def test_rows_of_gate_and_up_may_alternate(experts):
    given, alternating = buffers(), buffers()
    codes, scales = (torch.zeros(2 * len(t), t.shape[1], dtype=t.dtype) for t in given["gate"])
    alternating |= {"gate": (codes[::2], scales[::2]), "up": (codes[1::2], scales[1::2])}
    experts.export_into(0, **given)
    experts.export_into(0, **alternating)
    for name, matrix in given.items():
        assert all(map(torch.equal, matrix, alternating[name]))


@pytest.mark.parametrize("model", ["v4-flash", "kimi-k2", "gpt-oss-20b"])
def test_an_expert_without_weights_is_read_from_its_checkpoint(tmp_path, model):
    folder = write_small(tmp_path, model, experts=4)
    number = first_layer(folder)
    whole = Experts.from_checkpoint(folder, number)
    part = Experts.from_checkpoint(folder, number, expert_mask=mask(0, 1, 2, 3), pack_masked=False)
    dtypes = {cpumoe.weight_format(part.format).scale_storage, torch.bfloat16}
    third = part.intermediate_size // 3
    for scales in dtypes:
        for features in (slice(None), slice(0, third), slice(third, None)):
            want, got = (memory(part, features, scales) for _ in range(2))
            whole.export_into(2, **want, intermediate=features)
            part.export_into(2, **got, intermediate=features, read_missing=True)
            for name in want:
                assert all(map(same, got[name], want[name])), (scales, features, name)
    assert part.packed_experts == []


def test_reading_a_missing_expert_is_asked_for(weights):
    hidden = mask(1)
    kept = weights.pack(expert_mask=hidden, pack_masked=False)
    with refused(ValueError, "expert 1 has no weights to export; pack it first"):
        kept.export_into(1, **buffers())
    with pytest.raises(ValueError, match="made from tensors or an iterable, which are not kept"):
        kept.export_into(1, **buffers(), read_missing=True)
    with refused(TypeError, "read_missing: expected a bool, got 'no'"):
        kept.export_into(1, **buffers(), read_missing="no")
    kept.export_into(0, **(into := buffers()), read_missing=True)
    assert same(into["gate"][0], weights.pack().export(0).gate.codes)


def test_missing_experts_with_nan_scales_are_refused(tmp_path):
    folder = write_small(tmp_path, "v4-flash", experts=2)
    name = "layers.0.ffn.experts.1.w3.scale"
    with open_checkpoint(folder) as reader:
        scales = reader.expert(0, 1).up.scales.clone()
    scales[2, 0] = 255
    edit_tensors(folder, {name: scales.view(torch.float8_e8m0fnu)})
    experts = Experts.from_checkpoint(folder, 0, expert_mask=mask(1, experts=2), pack_masked=False)
    with pytest.raises(ValueError, match=rf"{name}: scales must be finite, got 255"):
        experts.export_into(1, **memory(experts), read_missing=True)


@EVERY_ISA
def test_bf16_weights_come_back(isa):
    weights = layer("bf16", hidden=HIDDEN, intermediate=INTERMEDIATE)
    experts = weights.pack(isa=isa)
    whole = experts.export(2)
    for name in ("gate", "up", "down"):
        assert same(getattr(whole, name).codes, getattr(weights, name).codes[2])
        assert getattr(whole, name).scales is None
    gate, up = (torch.zeros(32, HIDDEN, dtype=torch.bfloat16) for _ in range(2))
    down = torch.zeros(HIDDEN, 32, dtype=torch.bfloat16)
    experts.export_into(2, gate=gate, up=up, down=down, intermediate=slice(32, 64))
    assert same(gate, weights.gate.codes[2, 32:64])
    assert same(up, weights.up.codes[2, 32:64])
    assert same(down.contiguous(), weights.down.codes[2, :, 32:64].contiguous())
    with refused(TypeError, "gate scales: bf16 has no scales; pass the weights alone"):
        experts.export_into(2, gate=(gate, gate), up=up, down=down, intermediate=slice(32, 64))
    with refused(TypeError, "up: expected a QuantizedMatrix or a tensor, got int"):
        experts.export_into(2, gate=gate, up=7, down=down, intermediate=slice(32, 64))
