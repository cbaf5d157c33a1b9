"""Experts that are divided among processes."""

from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoint_tools import write_small
from moe_tools import EVERY_ISA, IN_FULL_RUNS, inputs, layer, output_with_torch, refused

import cpumoe
from cpumoe import Runtime
from cpumoe._engine.sums import SumOrder, WeightedSums
from cpumoe.distributed import DistributedExperts, RanksError, agreement, place
from cpumoe.distributed.part import Part
from cpumoe.distributed.routing import Owners, rows_in_order
from cpumoe.formats.scale_choice import ScaleChoice

SCRIPT = (Path(__file__).parent / "distributed_script.py").read_text("utf-8")
SIZES = {"experts": 7, "top_k": 2, "layers": 1}


def ranks_compute(folder, model, *worlds, **sizes):
    checkpoint = write_small(folder / "checkpoint", model, **{**SIZES, **sizes})
    number = cpumoe.open_checkpoint(checkpoint).layers()[0]
    output_with_torch(SCRIPT, str(folder), str(checkpoint), str(number), *map(str, worlds))


def test_bits_do_not_depend_on_the_number_of_ranks(tmp_path):
    ranks_compute(tmp_path, "v4-flash", 1, 2, 3, hidden=96, intermediate=52)


@IN_FULL_RUNS
@pytest.mark.parametrize(
    "model", ["gpt-oss-20b", "kimi-k2", "Qwen3-30B-A3B", "DeepSeek-V3", "DeepSeek-R1-NVFP4"]
)
def test_bits_of_other_formats(model, tmp_path):
    ranks_compute(tmp_path, model, 1, 2, 3, 4)


@IN_FULL_RUNS
def test_bits_of_odd_sizes(tmp_path):
    ranks_compute(tmp_path, "Qwen3-30B-A3B", 2, 3, hidden=41, intermediate=33)
    scales = ScaleChoice(torch.float32)
    folder = tmp_path / "int4"
    ranks_compute(folder, "kimi-k2", 2, 7, scales=scales)


@EVERY_ISA
def test_terms_that_are_added_apart_have_the_bits_of_a_call(isa):
    """On each variant, whose multiply-adds may or may not round twice."""
    weights = layer("int4", experts=8, hidden=72, bias=torch.float32)
    with Runtime(threads=2) as runtime:
        experts = weights.pack(runtime=runtime, isa=isa)
        owners = Owners([range(8)])
        for dtype, tokens in ((torch.bfloat16, 1), (torch.float32, 1), (torch.bfloat16, 50)):
            x, ids, factors = inputs(weights, tokens, 5, dtype=dtype)
            (share,) = owners.shares(ids.numpy())
            terms = Part(experts).terms(x, torch.from_numpy(share.experts))
            order = owners.order(ids.numpy(), factors.numpy(), rows_in_order([share], ids.numel()))
            for out_dtype in (torch.bfloat16, torch.float16, torch.float32):
                got = WeightedSums(isa)(terms, order, out_dtype, runtime.core)
                assert torch.equal(got, experts(x, ids, factors, out_dtype=out_dtype))


def test_sums_of_nothing_and_of_wrong_rows():
    add = WeightedSums("generic")
    terms = torch.ones(2, 3)
    none = torch.empty(0, dtype=torch.int64)
    with Runtime(threads=1) as runtime:
        for begins in ([0], [0, 0, 0]):
            order = SumOrder(torch.tensor(begins), none, torch.empty(0))
            got = add(terms, order, torch.bfloat16, runtime.core)
            assert torch.equal(got, torch.zeros(len(begins) - 1, 3).bfloat16())
        order = SumOrder(torch.tensor([0, 1]), torch.tensor([2]), torch.ones(1))
        with refused(IndexError, "rows[0]: expected 0 to 1, got 2"):
            add(terms, order, torch.float32, runtime.core)


def test_shares_have_each_pair_once():
    generator = np.random.default_rng(0)
    owners = Owners([[0, 3, 4], [5], [2, 1]])
    for tokens in (0, 1, 2, 9):
        ids = generator.integers(-1, 7, (tokens, 4))
        shares = owners.shares(ids)
        places = np.concatenate([share.places for share in shares])
        valid = (ids >= 0) & (ids < 6)
        assert sorted(places) == list(valid.ravel().nonzero()[0])
        for share, experts in zip(shares, ([0, 3, 4], [5], [2, 1]), strict=True):
            chosen = share.experts[share.experts >= 0]
            assert [experts[number] for number in chosen] == list(ids.ravel()[share.places])
            assert list(share.tokens) == sorted(set(share.places // 4))


def test_ids_are_checked():
    owners = Owners([[0, 1], [2]])
    owners.check(np.array([[-1, 3]]))
    owners.check(np.zeros((0, 2), np.int64))
    with refused(
        IndexError,
        "topk_ids[1, 0]: expert ids must be in [0, 3), or -1 or 3 for an expert to skip; got 4",
    ):
        owners.check(np.array([[0, 1], [4, 0]]))


def test_placements():
    assert place(7, 3) == [[0, 1], [2, 3], [4, 5, 6]]
    assert place(2, 2) == [[0], [1]]
    frequencies = torch.tensor([100, 1, 1, 1, 40, 40, 17])
    ranks = place(7, 2, "balanced", frequencies)
    assert sorted(ranks[0] + ranks[1]) == list(range(7))
    assert sorted(map(len, ranks)) == [3, 4]
    work = [int(frequencies[experts].sum()) for experts in ranks]
    assert max(work) <= 103
    for count, world in ((5, 5), (64, 3), (9, 4)):
        sizes = {len(experts) for experts in place(count, world, "balanced", torch.rand(count))}
        assert max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((4, 2, "random"), "placement: expected 'contiguous' or 'balanced', got 'random'"),
        (
            (2, 3),
            "placement: expected 1 to 2 ranks, because each has at least one of 2 experts, got 3",
        ),
        (
            (4, 2, "balanced"),
            "frequencies: expected one number per expert with placement='balanced', got None; "
            "pass Experts.statistics().expert_tokens of a run",
        ),
        ((4, 2, "balanced", [1, 2]), "frequencies: expected [4], got [2]"),
        (
            (2, 2, "balanced", [1, float("nan")]),
            "frequencies: expected finite numbers of 0 or more",
        ),
    ],
)
def test_wrong_placements_are_refused(arguments, message):
    with refused(ValueError, message):
        place(*arguments)


def test_without_a_group(v4):
    message = (
        "torch.distributed is not initialised; call "
        "torch.distributed.init_process_group('gloo') first"
    )
    with refused(RuntimeError, message):
        DistributedExperts.from_checkpoint(v4, 0)


def test_fingerprints_differ_where_checkpoints_do(tmp_path):
    first = write_small(tmp_path / "a", "v4-flash")
    same = write_small(tmp_path / "b", "v4-flash")
    other = write_small(tmp_path / "c", "v4-flash", seed=1)
    taken = [agreement.fingerprint(cpumoe.open_checkpoint(each).folder) for each in (first, same)]
    assert taken[0] == taken[1]
    assert agreement.fingerprint(cpumoe.open_checkpoint(other).folder) != taken[0]


def test_differences_are_named():
    facts = [{"cpumoe": "1", "sums": "fixed"}, {"cpumoe": "1", "sums": "plain"}]
    assert agreement.difference(facts[:1] * 2, ["rank 0", "rank 1"]) is None
    assert agreement.difference(facts, ["rank 0 (a)", "rank 1 (b)"]) == (
        "rank 1 (b): sums: expected fixed, as rank 0 has, got plain; start all ranks with the same "
        "options"
    )
    assert issubclass(RanksError, ValueError)
