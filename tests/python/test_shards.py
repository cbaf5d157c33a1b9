"""Shards for tensor parallelism: their results add up, and their bytes are the checkpoint's."""

import itertools

import pytest
import torch
from checkpoint_tools import edit_tensors, write_small
from moe_tools import formats, refused
from safetensors.torch import load_file

import cpumoe
from cpumoe import Experts, Runtime, open_checkpoint
from cpumoe._engine.shards import columns_of, partition
from cpumoe.formats.scale_choice import ScaleChoice

GROUPS_OF_128 = ScaleChoice(group_size=128)
ROWS = ScaleChoice(by_row=True)
# format, model, hidden and intermediate size, scales
CASES = {
    "mxfp4": ("mxfp4", "v4-flash", 96, 180, None),
    "mxfp4-bias": ("mxfp4", "gpt-oss-20b", 96, 160, None),
    "int4": ("int4", "kimi-k2", 64, 224, None),
    "int4-groups": ("int4", "kimi-k2", 128, 576, GROUPS_OF_128),
    "int4-rows": ("int4", "kimi-k2", 64, 160, ROWS),
    "fp8": ("fp8", "DeepSeek-V3", 160, 3 * 128 + 40, None),
    "nvfp4": ("nvfp4", "Qwen3-30B-A3B-NVFP4", 64, 160, None),
    "nvfp4-modelopt": ("nvfp4", "DeepSeek-R1-NVFP4", 64, 128, None),
    "bf16": ("bf16", "Qwen3-30B-A3B", 41, 101, None),
    "fp16": ("fp16", "Qwen3-30B-A3B", 41, 101, None),
}


@pytest.fixture(scope="module")
def runtime():
    with Runtime(threads=1) as made:
        yield made


@pytest.fixture(scope="module", params=CASES)
def case(request, tmp_path_factory):
    """A checkpoint's reader, and its first layer with experts."""
    fmt, model, hidden, intermediate, scales = CASES[request.param]
    folder = tmp_path_factory.mktemp("shards")
    sizes = {"hidden": hidden, "intermediate": intermediate, "experts": 2, "top_k": 2, "layers": 1}
    write_small(folder, model, **sizes, **({} if scales is None else {"scales": scales}))
    if fmt == "fp16":
        stored = load_file(folder / "model.safetensors")
        halves = {name: each.half() for name, each in stored.items() if "experts" in name}
        edit_tensors(folder, halves)
    with open_checkpoint(folder) as reader:
        number = reader.layers()[0]
        assert reader.layer_format(number) == fmt
        yield reader, number


def test_every_format_is_tried():
    assert {fmt for fmt, *_ in CASES.values()} == set(formats(cpumoe.supported_isas()[-1]))


def calls(reader):
    """Hidden states, ids and weights, of one token and of several."""
    generator = torch.Generator().manual_seed(3)
    for tokens in (1, 9):
        x = torch.randn(tokens, reader.hidden_size, generator=generator)
        ids = torch.tensor([[0, 1]]).repeat(tokens, 1)
        yield x, ids, torch.rand(tokens, 2, generator=generator)


def tensors_of(weights):
    """What the reference takes of a list of experts."""
    names = ["gate", "up", "down"]
    if weights[0].down_bias is not None:
        names += [f"{name}_bias" for name in names]
    return {name: [getattr(each, name) for each in weights] for name in names}


@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_shards(case, world, runtime):
    reader, number = case
    shards = [
        Experts.from_checkpoint(reader, number, shard=(rank, world), runtime=runtime)
        for rank in range(world)
    ]
    whole = Experts.from_checkpoint(reader, number, runtime=runtime)
    assert sum(each.intermediate_size for each in shards) == reader.intermediate_size
    check_exports(reader, number, shards)
    common = {"format": whole.format, "activation": whole.activation}
    for args in calls(reader):
        exact = cpumoe.reference.experts_forward(
            *args, **tensors_of([whole.export(0), whole.export(1)]), **common
        )
        total, allowed = torch.zeros(exact.shape), torch.zeros(exact.shape, dtype=torch.float64)
        for each in shards:
            part = each(*args, out_dtype=torch.float32)
            _, bound = cpumoe.reference.experts_forward_with_bound(
                *args,
                **tensors_of([each.export(0), each.export(1)]),
                **common,
                output_dtype=torch.float32,
            )
            total += part
            # The addition of the partial sum rounds, too.
            allowed += bound + 2**-24 * total.abs()
        assert bool(((total - exact).abs() <= allowed).all())


def check_exports(reader, number, shards):
    """The shards' exports are the checkpoint's bytes, in order."""
    for expert in range(2):
        stored = reader.expert(number, expert)
        parts = [each.export(expert) for each in shards]
        for name, axis in (("gate", 0), ("up", 0), ("down", 1)):
            matrices = [getattr(part, name) for part in parts]
            of = getattr(stored, name)
            assert torch.equal(torch.cat([m.codes for m in matrices], axis), of.codes)
            if of.scales is None:
                continue
            if axis == 1 and of.scale_grid == (1, of.shape[1]):
                assert all(torch.equal(m.scales, of.scales) for m in matrices)
            else:
                assert torch.equal(torch.cat([m.scales for m in matrices], axis), of.scales)
            assert of.factor is None or all(m.factor == of.factor for m in matrices)
        if stored.up_bias is not None:
            assert torch.equal(torch.cat([part.up_bias for part in parts]), stored.up_bias)
            assert torch.equal(parts[0].down_bias, stored.down_bias)
            assert not any(part.down_bias.any() for part in parts[1:])


def test_evicted_shards_are_read_again(case, runtime):
    reader, number = case
    mask = torch.ones(2, dtype=torch.bool)
    shard = Experts.from_checkpoint(
        reader, number, shard=(1, 2), expert_mask=mask, pack_masked=False, runtime=runtime
    )
    assert shard.nbytes == 0
    shard.expert_mask = None
    args = next(calls(reader))
    again = Experts.from_checkpoint(reader, number, shard=(1, 2), runtime=runtime)
    assert torch.equal(shard(*args), again(*args))


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ((2048, 32, 3), [672, 704, 672]),
        ((2048, 128, 4), [512, 512, 512, 512]),
        ((101, 0, 2), [64, 37]),
        ((101, 0, 4), [32, 32, 32, 5]),
        ((424, 128, 3), [128, 256, 40]),
        ((96, 16, 1), [96]),
    ],
)
def test_parts_are_even_in_groups(arguments, expected):
    parts = partition(*arguments)
    assert parts[0].start == 0
    assert all(a.stop == b.start for a, b in itertools.pairwise(parts))
    assert [len(part) for part in parts] == expected


def test_the_last_part_tells_the_size_of_its_groups():
    even = [[0, 384], [384, 576]]
    assert [[p.start, p.stop] for p in partition(576, 128, 2)] == even
    # Two scales of 192 weights would mean groups of 96.
    varying = partition(576, 128, 2, groups_vary=True)
    assert [[p.start, p.stop] for p in varying] == [[0, 512], [512, 576]]
    codes, scales = cpumoe.weight_format("int4").quantize(torch.randn(64, 576), 128)
    matrix = cpumoe.QuantizedMatrix(codes, scales, name="down")
    message = (
        "down: 2 scales of 192 columns do not tell that groups have 128, got columns 384 to 576; "
        "choose columns that end with a whole group, or the last group alone"
    )
    with refused(ValueError, message):
        columns_of(matrix, range(384, 576))


@pytest.mark.parametrize(
    ("shard", "kind", "message"),
    [
        (3, TypeError, "shard: expected (rank, world), two ints, or None, got 3"),
        ("01", TypeError, "shard: expected (rank, world), two ints, or None, got '01'"),
        ((0, 1, 2), TypeError, "shard: expected (rank, world), two ints, or None, got (0, 1, 2)"),
        ((0.5, 2), TypeError, "shard: expected an int, got 0.5"),
        ((2, 2), ValueError, "shard: expected a rank from 0 to world - 1, got (2, 2)"),
        ((-1, 2), ValueError, "shard: expected a rank from 0 to world - 1, got (-1, 2)"),
        (
            (0, 4),
            ValueError,
            "shard: expected at most 3 ranks, because 96 intermediate features have 3 groups of "
            "32, got 4",
        ),
    ],
)
def test_wrong_shards_are_refused(v4, shard, kind, message):
    with refused(kind, message):
        Experts.from_checkpoint(v4, 0, shard=shard)
