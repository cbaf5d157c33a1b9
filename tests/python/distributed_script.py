"""Ranks that compute a layer together; test_distributed.py runs this in a process of its own.

Arguments: a folder for files, a checkpoint, its layer, and the numbers of ranks to try.
"""

import os
import sys
import traceback

import torch
import torch.distributed as dist

import cpumoe
from cpumoe.distributed import DistributedExperts

FOLDER, CHECKPOINT, LAYER, *WORLDS = sys.argv[1:]
# 3000 tokens of six experts are more than the engine computes together.
CALLS = ((0, 2), (1, 3), (2, 1), (5, 4), (70, 3), (3000, 6))


def call(tokens, top_k, hidden, experts, dtype, seed=0):
    """Hidden states, ids and weights. Some ids are of no expert, and tokens repeat an expert."""
    generator = torch.Generator().manual_seed(1000 * seed + tokens)
    x = torch.randn(tokens, hidden, generator=generator).to(dtype)
    ids = torch.randint(-1, experts + 1, (tokens, top_k), generator=generator)
    return x, ids, torch.rand(tokens, top_k, generator=generator) - 0.25


def calls(layer, dtype):
    experts = getattr(layer, "experts_of", None)
    count = layer.num_experts if experts is None else sum(map(len, experts))
    hidden = (layer if experts is None else layer.local).hidden_size
    return [call(*sizes, hidden, count, dtype) for sizes in CALLS]


def check(rank, world, runtime):
    """What one rank does, with each kind of inputs, sums and placement."""
    whole = cpumoe.Experts.from_checkpoint(CHECKPOINT, int(LAYER), runtime=runtime, progress=False)
    frequencies = torch.arange(whole.num_experts).flip(0)
    kinds = [("replicated", "contiguous"), ("divided", "contiguous"), ("replicated", "balanced")]
    for inputs, placement in kinds:
        for sums in ("fixed", "plain"):
            layer = DistributedExperts.from_checkpoint(
                CHECKPOINT,
                int(LAYER),
                inputs=inputs,
                sums=sums,
                placement=placement,
                frequencies=frequencies if placement == "balanced" else None,
                runtime=runtime,
            )
            # Packed bytes of this rank are those of its experts.
            assert layer.nbytes * whole.num_experts == whole.nbytes * len(layer.experts_of[rank])
            for dtype in (torch.bfloat16, torch.float32):
                for args in calls(layer, dtype):
                    compare(rank, world, layer, whole, args, (inputs, sums))


def compare(rank, world, layer, whole, args, how):
    inputs, sums = how
    for out_dtype in (None, torch.float32):
        expected = whole(*args, out_dtype=out_dtype)
        given = args
        if inputs == "divided":
            # The first rank has no tokens, unless there is only one rank.
            tokens = len(args[0])
            first = max(0, rank - 1) * tokens // max(1, world - 1)
            last = rank * tokens // (world - 1) if world > 1 else tokens
            given = [tensor[first:last] for tensor in args]
            expected = expected[first:last]
        got = layer(*given, out_dtype=out_dtype)
        assert got.dtype == expected.dtype
        if sums == "fixed":
            assert torch.equal(got, expected), (how, world, len(args[0]), out_dtype)
        else:
            tolerance = 1e-5 if got.dtype == torch.float32 else 1e-2
            torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)


def main(rank, world):
    dist.init_process_group(
        "gloo", init_method=f"file://{FOLDER}/{world}", rank=rank, world_size=world
    )
    with cpumoe.Runtime(threads=1) as runtime:
        check(rank, world, runtime)
    dist.destroy_process_group()


for each in map(int, WORLDS):
    children = []
    for number in range(each):
        child = os.fork()
        if child == 0:
            try:
                main(number, each)
            except BaseException:
                traceback.print_exc()
                sys.stderr.flush()
                os._exit(1)
            os._exit(0)
        children.append(child)
    assert all(os.waitpid(child, 0)[1] == 0 for child in children), f"{each} ranks"
