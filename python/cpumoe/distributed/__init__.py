"""Experts of one model in several processes, on one machine or several.

`join` is for whole models: rank 0 loads the model, and the other ranks load experts alone.
`DistributedExperts` is a layer for hosts whose ranks all make the same calls.
"""

from cpumoe._base.launcher import own_rank, started_as_rank
from cpumoe.distributed.agreement import RanksError, host_name
from cpumoe.distributed.layer import DistributedExperts
from cpumoe.distributed.led_experts import LedExperts
from cpumoe.distributed.placement import place
from cpumoe.distributed.ranks import Ranks, join

__all__ = [
    "DistributedExperts",
    "LedExperts",
    "Ranks",
    "RanksError",
    "host_name",
    "join",
    "own_rank",
    "place",
    "started_as_rank",
]
