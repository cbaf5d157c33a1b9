"""What it costs that ranks share a layer: microseconds per call of one token, over loopback.

    python tools/ranks_overhead.py --ranks 2 --rounds 5

The layer has DeepSeek-V4-Flash's hidden size and top_k, and next to no weights. Three times are
medians: a call in one process, a call with ranks, and Gloo alone, sending packets of the same sizes
there and back. All ranks run on this machine, one thread each. The kinds of calls take turns in
each round, and a time is the median of the rounds.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist

import cpumoe
from cpumoe.distributed import join
from cpumoe.distributed.messages import packet_bytes
from cpumoe.models import find_model
from cpumoe.models.synth import write_checkpoint

HIDDEN, TOP_K, EXPERTS, INTERMEDIATE = 4096, 6, 12, 32
CALLS, UNTIMED = 2000, 200


def main() -> None:
    """Measures, and prints the times."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = write_checkpoint(
            folder,
            find_model("v4-flash"),
            layers=1,
            experts=EXPERTS,
            hidden=HIDDEN,
            intermediate=INTERMEDIATE,
            top_k=TOP_K,
        )
        rounds = [measure(checkpoint, options.ranks) for _ in range(options.rounds)]
    if options.json:
        print(json.dumps(rounds))
        return
    for name in rounds[0]:
        print(f"{name:24} {statistics.median(each[name] for each in rounds):8.1f} us")


def measure(checkpoint: Path, ranks: int) -> dict[str, float]:
    """Returns the microseconds of each kind of call."""
    # Each in processes of their own, because cpumoe and Gloo have threads.
    results = {"one process": run(1, lambda _: alone(checkpoint))}
    for sums in ("fixed", "plain"):
        results[f"{ranks} ranks, {sums}"] = run(
            ranks, lambda rank, sums=sums: shared(checkpoint, rank, sums)
        )
        results[f"gloo alone, {sums}"] = run(ranks, lambda rank, sums=sums: gloo(rank, ranks, sums))
    return results


def run(ranks: int, each: Callable[[int], float | None]) -> float:
    """Runs a function in forked ranks, and returns what rank 0's returns."""
    with socket.create_server(("localhost", 0)) as probe:
        port = probe.getsockname()[1]
    read, write = os.pipe()
    children = []
    for rank in range(ranks):
        child = os.fork()
        if child == 0:
            os.environ |= {
                "RANK": str(rank),
                "WORLD_SIZE": str(ranks),
                "MASTER_ADDR": "localhost",
                "MASTER_PORT": str(port),
            }
            torch.set_num_threads(1)
            result = each(rank)
            if rank == 0:
                os.write(write, json.dumps(result).encode())
            os._exit(0)
        children.append(child)
    statuses = [os.waitpid(child, 0)[1] for child in children]
    if any(statuses):
        sys.exit(f"ranks ended with {statuses}")
    os.close(write)
    with os.fdopen(read) as file:
        return float(json.loads(file.read()))


def tensors() -> list[tuple[torch.Tensor, ...]]:
    """Inputs of calls of one token, each with other experts."""
    made = []
    for _ in range(64):
        ids = torch.randperm(EXPERTS)[:TOP_K].unsqueeze(0)
        made.append((torch.randn(1, HIDDEN).bfloat16(), ids, torch.rand(1, TOP_K)))
    return made


def median(call: Callable[[int], object]) -> float:
    """Returns the microseconds of a call; it gets its number."""
    times = []
    for number in range(UNTIMED + CALLS):
        start = time.perf_counter()
        call(number)
        times.append(time.perf_counter() - start)
    return 1e6 * statistics.median(times[UNTIMED:])


def alone(checkpoint: Path) -> float:
    """Times calls in one process."""
    with cpumoe.Runtime(threads=1) as runtime:
        experts = cpumoe.Experts.from_checkpoint(checkpoint, 0, runtime=runtime, progress=False)
        given = tensors()
        return median(lambda number: experts(*given[number % len(given)]))


def shared(checkpoint: Path, rank: int, sums: str) -> float | None:
    """Times calls of rank 0, which other ranks help to compute."""
    with join(checkpoint, sums=sums) as ranks, cpumoe.Runtime(threads=1) as runtime:
        if rank > 0:
            ranks.follow(runtime)
            return None
        with cpumoe.open_checkpoint(checkpoint) as reader:
            options = cpumoe.ExpertsOptions(runtime)
            experts = ranks.experts(reader, 0, options=options)
            ranks.wait()
        given = tensors()
        return median(lambda number: experts(*given[number % len(given)]))


def gloo(rank: int, world: int, sums: str) -> float | None:
    """Sends a packet to each rank, and what a rank sends back on average."""
    dist.init_process_group("gloo", init_method="env://", rank=rank, world_size=world)
    packet = torch.zeros(packet_bytes(HIDDEN), dtype=torch.uint8)
    back = torch.zeros(TOP_K // world if sums == "fixed" else 1, HIDDEN)

    def lead(_: int) -> None:
        sent = [dist.isend(packet, other) for other in range(1, world)]
        got = [dist.irecv(torch.empty_like(back), other) for other in range(1, world)]
        for work in (*sent, *got):
            work.wait()

    def follow(_: int) -> None:
        dist.recv(packet, 0)
        dist.send(back, 0)

    result = median(lead if rank == 0 else follow)
    dist.barrier()
    return result if rank == 0 else None


if __name__ == "__main__":
    main()
