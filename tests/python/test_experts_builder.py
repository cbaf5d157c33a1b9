"""`ExpertsBuilder`: tensors of experts in any order give the layer that `from_tensors` gives."""

import itertools
import random

import pytest
import torch
from moe_tools import EVERY_FORMAT, GPT_OSS, inputs, layer, refused

import cpumoe
from cpumoe import GLU, Experts, ExpertsBuilder, QuantizedMatrix, Runtime

NAMES = ("gate", "up", "down")


def builder(weights, **options):
    return ExpertsBuilder(
        format=weights.fmt,
        num_experts=weights.num_experts,
        hidden_size=weights.hidden,
        intermediate_size=weights.gate.shape[1],
        activation=weights.activation,
        has_bias=weights.gate_bias is not None,
        **options,
    )


def pieces(weights):
    """Each tensor of each expert, as keyword arguments of `add`."""
    for expert, name in itertools.product(range(weights.num_experts), NAMES):
        matrix = getattr(weights, name)[expert]
        bias = getattr(weights, f"{name}_bias")
        parts = {"codes": matrix.codes, "scales": matrix.scales, "factor": matrix.factor}
        parts["bias"] = None if bias is None else bias[expert]
        for part, tensor in parts.items():
            if tensor is not None:
                yield {"expert": expert, "projection": name, part: tensor}


@pytest.fixture(scope="module")
def runtime():
    with Runtime(threads=1) as made:
        yield made


@EVERY_FORMAT
@pytest.mark.parametrize("bias", [None, torch.bfloat16], ids=["plain", "bias"])
def test_any_order(fmt, bias, runtime):
    weights = layer(fmt, bias=bias, activation=GPT_OSS)
    expected = weights.pack(runtime=runtime)
    args = inputs(weights, tokens=5)
    for seed in range(3):
        shuffled = list(pieces(weights))
        random.Random(seed).shuffle(shuffled)
        made = builder(weights, runtime=runtime)
        for piece in shuffled:
            made.add(**piece)
        experts = made.build()
        assert torch.equal(experts(*args), expected(*args))
        assert experts.packed_experts == [0, 1, 2, 3]
        assert experts.expert_mask is None
        assert experts.nbytes == expected.nbytes
        for expert in range(weights.num_experts):
            ours, theirs = experts.export(expert), expected.export(expert)
            for name in NAMES:
                assert torch.equal(getattr(ours, name).codes, getattr(theirs, name).codes)
                if bias is not None:
                    assert torch.equal(
                        getattr(ours, f"{name}_bias"), getattr(weights, f"{name}_bias")[expert]
                    )


def copy_of(matrix):
    return QuantizedMatrix(matrix.codes.clone(), matrix.scales.clone())


def test_tensors_of_packed_experts_may_change():
    weights = layer("mxfp4")
    copies = [
        {name: copy_of(getattr(weights, name)[expert]) for name in NAMES} for expert in range(4)
    ]
    with Runtime(threads=2) as two:
        made = builder(weights, runtime=two)
        waiting = []
        for expert, matrices in enumerate(copies):
            for name in NAMES:
                made.add(expert, name, matrices[name])
            waiting.append(made.waiting)
            for packed in copies[: expert + 1 - made.waiting]:
                for matrix in packed.values():
                    matrix.codes.zero_()
        assert waiting == [1, 0, 1, 0]
        args = inputs(weights, tokens=3)
        assert torch.equal(made.build()(*args), weights.pack(runtime=two)(*args))


@EVERY_FORMAT
def test_shards_are_those_of_sliced_tensors(fmt, runtime):
    weights = layer(fmt, hidden=96, intermediate=384, bias=torch.float32)
    args = inputs(weights, tokens=4, dtype=torch.float32)
    total = torch.zeros(4, 96)
    for first, last in ((0, 128), (128, 384)):
        made = builder(weights, runtime=runtime, intermediate=slice(first, last))
        for name, expert in itertools.product(NAMES, reversed(range(4))):
            bias = getattr(weights, f"{name}_bias")[expert]
            if name == "down" and first:
                bias = torch.zeros_like(bias)
            made.add(expert, name, getattr(weights, name)[expert], bias=bias)
        experts = made.build()
        assert experts.intermediate_size == last - first
        exported = experts.export(1)
        assert torch.equal(exported.gate.codes, weights.gate.codes[1, first:last])
        per = 384 // weights.down.codes.shape[-1]
        expected = weights.down.codes[1, :, first // per : last // per]
        assert torch.equal(exported.down.codes, expected)
        experts(*args, out=total, accumulate=True)
    whole = weights.pack(runtime=runtime)(*args)
    torch.testing.assert_close(total, whole, rtol=1e-5, atol=1e-5)


def test_shards_of_scales_that_rows_and_larger_groups_share(runtime):
    args = (torch.randn(2, 64), torch.zeros(2, 1, dtype=torch.int64), torch.ones(2, 1))
    for fmt, group in (("int4", 64), ("int4", 256), ("fp8", 256)):
        row = cpumoe.weight_format(fmt)
        generator = torch.Generator().manual_seed(1)
        up = [torch.randn(256, 64, generator=generator) for _ in range(2)]
        gate, up = (QuantizedMatrix(*row.quantize(each, 64)) for each in up)
        down = QuantizedMatrix(*row.quantize(torch.randn(64, 256, generator=generator), group))
        sizes = {"num_experts": 1, "hidden_size": 64, "intermediate_size": 256}
        total = torch.zeros(2, 64)
        for chosen in (range(64), range(64, 256), None):
            made = ExpertsBuilder(format=fmt, **sizes, intermediate=chosen, runtime=runtime)
            for name, matrix in (("down", down), ("gate", gate), ("up", up)):
                made.add(0, name, matrix)
            if chosen is None:
                whole = made.build()(*args)
                torch.testing.assert_close(total, whole, rtol=1e-4, atol=1e-4)
            else:
                made.build()(*args, out=total, accumulate=True)


def test_experts_are_packed_as_they_come(monkeypatch, runtime):
    weights = layer("mxfp4")
    packed = []
    pack = Experts.pack

    def recorded(self, experts, source):
        packed.append(list(experts))
        pack(self, experts, source)

    monkeypatch.setattr(Experts, "pack", recorded)
    made = builder(weights, runtime=runtime)
    for expert in (2, 0, 3):
        for name in NAMES:
            made.add(expert, name, getattr(weights, name)[expert])
    assert packed == [[2], [0], [3]]


def test_experts_without_gate(runtime):
    weights = layer("bf16")
    relu = GLU("relu2", gated=False)
    made = ExpertsBuilder(
        format="bf16",
        num_experts=4,
        hidden_size=weights.hidden,
        intermediate_size=96,
        activation=relu,
        runtime=runtime,
    )
    with refused(ValueError, "projection: expected one of 'up', 'down', got 'gate'"):
        made.add(0, "gate", weights.gate[0])
    for expert, name in itertools.product(range(4), ("down", "up")):
        made.add(expert, name, getattr(weights, name).codes[expert])
    expected = Experts.from_tensors(
        up=weights.up, down=weights.down, format="bf16", activation=relu, runtime=runtime
    )
    args = inputs(weights, tokens=3)
    assert torch.equal(made.build()(*args), expected(*args))


def test_refused_tensors_change_nothing(runtime):
    weights = layer("mxfp4", bias=torch.float32)
    made = builder(weights, runtime=runtime)
    gate = weights.gate[1]
    made.add(1, "gate", gate.codes)
    wrong = gate.scales[:, :1]
    for kind, message, *arguments in (
        (ValueError, "projection: expected one of 'gate', 'up', 'down', got 'w1'", 1, "w1"),
        (IndexError, "expert: expected 0..3, got 4", 4, "up"),
        (TypeError, "expert: expected an int, got 'a'", "a", "up"),
        (
            ValueError,
            "expert 1: up: expected codes, scales, factor or bias, got none of them",
            *(1, "up"),
        ),
        (
            ValueError,
            "expert 1: gate codes: expected one tensor, got a second one",
            *(1, "gate", gate.codes),
        ),
        (
            TypeError,
            "expert 1: gate factor: expected None in mxfp4, got a tensor",
            *(1, "gate", None, None, torch.ones(1)),
        ),
        (
            TypeError,
            "codes: expected a tensor with scales or a factor beside it, got a QuantizedMatrix; "
            "pass it alone",
            *(1, "up", gate, gate.scales),
        ),
        (
            ValueError,
            "expert 1: up: expected [96, 160], got [160, 96]; pass whole matrices of the layer's "
            "sizes",
            *(1, "up", weights.down[1]),
        ),
        (
            ValueError,
            "expert 1: gate scales: expected [96, 5], got [96, 1]; "
            f"{cpumoe.weight_format('mxfp4').remedy}",
            *(1, "gate", None, wrong),
        ),
    ):
        with refused(kind, message):
            made.add(*arguments)
    with refused(ValueError, "expert 1: up bias: expected [96], got [4]"):
        made.add(1, "up", bias=torch.zeros(4))
    for piece in pieces(weights):
        if piece["expert"] != 1 or piece["projection"] != "gate" or "codes" not in piece:
            made.add(**piece)
    args = inputs(weights, tokens=2)
    assert torch.equal(made.build()(*args), weights.pack(runtime=runtime)(*args))
    with refused(RuntimeError, "ExpertsBuilder: build was called; make another builder"):
        made.add(0, "up", gate)
    with refused(RuntimeError, "ExpertsBuilder: build was called before; make another builder"):
        made.build()


def test_missing_parts_are_named(runtime):
    weights = layer("nvfp4", bias=torch.float32)
    made = builder(weights, runtime=runtime)
    everything = list(pieces(weights))
    for piece in everything:
        if piece["expert"] != 2 or piece["projection"] != "up" or "scales" in piece:
            made.add(**piece)
    with refused(
        ValueError,
        "expert 2: expected all parts before build, got no up codes, up factor, up bias; add them "
        "first",
    ):
        made.build()
    for part in ("codes", "factor", "bias"):
        for piece in everything:
            if piece["expert"] == 2 and piece["projection"] == "up" and part in piece:
                made.add(**piece)
    made.build()


def test_arguments():
    sizes = {"num_experts": 2, "hidden_size": 64, "intermediate_size": 64}
    with refused(TypeError, "has_bias: expected a bool, got 'no'"):
        ExpertsBuilder(format="mxfp4", **sizes, has_bias="no")
    with pytest.raises(ValueError, match="fp3"):
        ExpertsBuilder(format="fp3", **sizes)
    with pytest.raises(ValueError, match=r"whole groups of 32 features within 0\.\.64"):
        ExpertsBuilder(format="mxfp4", **sizes, intermediate=range(16, 64))
    with pytest.raises(TypeError, match=r"^ExpertsBuilder\(\) got an unexpected keyword argument"):
        ExpertsBuilder(format="mxfp4", **sizes, threads=3)
    with pytest.raises(TypeError, match=r"activation: expected a cpumoe\.SwiGLU"):
        ExpertsBuilder(format="mxfp4", **sizes, activation="silu")
    sizes = {"num_experts": 1, "hidden_size": 64, "intermediate_size": 128}
    made = ExpertsBuilder(format="int4", **sizes, intermediate=range(32))
    with refused(
        ValueError,
        "expert 0: down: 64 columns share scales, so columns must begin and end with such a group, "
        "got columns 0 to 32",
    ):
        made.add(0, "down", *cpumoe.weight_format("int4").quantize(torch.ones(64, 128), 64))


@pytest.mark.parametrize(
    ("name", "size", "message"),
    [
        ("num_experts", 0, "num_experts must be positive, got 0"),
        ("num_experts", -3, "num_experts must be positive, got -3"),
        ("num_experts", 10**6, "num_experts must be at most 65536, got 1000000"),
        ("hidden_size", 0, "hidden_size must be positive, got 0"),
        ("hidden_size", -64, "hidden_size must be positive, got -64"),
        (
            "hidden_size",
            33,
            "mxfp4: hidden_size must be a multiple of 2, because a byte has 2 codes, got 33",
        ),
        ("intermediate_size", 0, "mxfp4: intermediate_size must be positive, got 0"),
    ],
)
def test_impossible_sizes_are_refused_before_tensors_come(name, size, message):
    sizes = {"num_experts": 2, "hidden_size": 64, "intermediate_size": 64, name: size}
    with refused(ValueError, message):
        ExpertsBuilder(format="mxfp4", **sizes)
    with pytest.raises(ValueError, match="intermediate_size must be a multiple of 2"):
        ExpertsBuilder(
            format="mxfp4",
            num_experts=1,
            hidden_size=64,
            intermediate_size=65,
            intermediate=range(32),
        )


@EVERY_FORMAT
def test_a_wrong_part_is_refused_when_it_comes(fmt, runtime):
    weights = layer(fmt, bias=torch.float32)
    made = builder(weights, runtime=runtime)
    for piece in pieces(weights):
        (part,) = piece.keys() - {"expert", "projection"}
        right = piece[part]
        wrong = [
            ("tensor", TypeError),
            (right.to(torch.float64) if part != "codes" else torch.ones(96, 160), TypeError),
            (right.to("meta"), TypeError),
            (torch.cat((right.view(-1), right.view(-1))), ValueError),
        ]
        if right.dim() == 2:
            wrong.append((right[1:], ValueError))
        for tensor, kind in wrong:
            with pytest.raises(kind, match=f"^expert {piece['expert']}: {piece['projection']}"):
                made.add(**{**piece, part: tensor})
        made.add(**piece)
    args = inputs(weights, tokens=2)
    assert torch.equal(made.build()(*args), weights.pack(runtime=runtime)(*args))
