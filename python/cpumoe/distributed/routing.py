"""Divides a call's (token, slot) pairs among ranks, and says in which order results are added.

The arrays are small, so this is NumPy: an operation takes a microsecond where PyTorch's takes
several.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from cpumoe._engine.sums import SumOrder

# The engine computes at most so many (token, slot) pairs together. Kernels are chosen by the tokens
# of an expert in such a round, so ranks must compute the same rounds as one process does.
ROUND_PAIRS = 16384

Ints = npt.NDArray[np.int64]


def round_tokens(top_k: int) -> int:
    """Returns the most tokens of a round."""
    return ROUND_PAIRS // min(max(top_k, 1), ROUND_PAIRS)


@dataclass(frozen=True)
class Share:
    """What a rank computes of a call.

    Attributes:
        tokens: the tokens that need the rank, ascending.
        experts: int32 ``[len(tokens), top_k]``: the rank's own numbers of their experts; -1:
            another rank's expert, or none.
        places: the rank's pairs as indices into ``[tokens of the call * top_k]``, ascending.
    """

    tokens: Ints
    experts: npt.NDArray[np.int32]
    places: Ints


class Owners:
    """The rank of each expert of a layer, and the rank's own number of the expert."""

    def __init__(self, experts_of: Sequence[Sequence[int]]) -> None:
        """Takes each rank's experts, in the order of the rank's own numbers."""
        self.num_experts = sum(map(len, experts_of))
        self.world = len(experts_of)
        # Two more elements: the ids -1 and num_experts belong to no rank.
        self._rank = np.full(self.num_experts + 2, -1, np.int64)
        self._number = np.full(self.num_experts + 2, -1, np.int32)
        for rank, experts in enumerate(experts_of):
            self._rank[list(experts)] = rank
            self._number[list(experts)] = np.arange(len(experts))

    def shares(self, ids: Ints) -> list[Share]:
        """Returns each rank's share of a call with these experts ``[tokens, top_k]``, checked."""
        ranks, numbers = self._rank[ids], self._number[ids]
        if len(ids) == 1:
            return [_share_of_one(ranks[0] == rank, numbers) for rank in range(self.world)]
        return [_share(ranks == rank, numbers) for rank in range(self.world)]

    def order(self, ids: Ints, weights: npt.NDArray[np.float32], row_of_place: Ints) -> SumOrder:
        """Returns the order in which the engine adds the results of a token's experts.

        That is the order of the experts' numbers in the layer, and of slots if a token names an
        expert twice.

        Args:
            ids: ``[tokens, top_k]``.
            weights: ``[tokens, top_k]``.
            row_of_place: the row of each pair's result; anything for a pair without one.
        """
        tokens, top_k = ids.shape
        slots = ids.argsort(1, kind="stable")
        places = (slots + np.arange(tokens)[:, None] * top_k).ravel()
        chosen = ids.ravel()[places]
        kept = (chosen >= 0) & (chosen < self.num_experts)
        if not kept.all():
            places = places[kept]
        begins = np.zeros(tokens + 1, np.int64)
        kept.reshape(tokens, top_k).sum(1).cumsum(out=begins[1:])
        return SumOrder(
            torch.from_numpy(begins),
            torch.from_numpy(row_of_place[places]),
            torch.from_numpy(weights.ravel()[places]),
        )

    def check(self, ids: Ints) -> None:
        """Raises IndexError if an id is out of range."""
        if not ids.size or (ids.min() >= -1 and ids.max() <= self.num_experts):
            return
        token, slot = np.argwhere((ids < -1) | (ids > self.num_experts))[0]
        raise IndexError(
            f"topk_ids[{token}, {slot}]: expert ids must be in [0, {self.num_experts}), or -1 or "
            f"{self.num_experts} for an expert to skip; got {ids[token, slot]}"
        )


def _share(mine: npt.NDArray[np.bool_], numbers: npt.NDArray[np.int32]) -> Share:
    tokens = mine.any(1).nonzero()[0]
    experts = np.where(mine[tokens], numbers[tokens], np.int32(-1))
    return Share(tokens, experts, mine.ravel().nonzero()[0])


_FIRST = np.zeros(1, np.int64)
_NONE = np.zeros(0, np.int64)


def _share_of_one(mine: npt.NDArray[np.bool_], numbers: npt.NDArray[np.int32]) -> Share:
    places = mine.nonzero()[0]
    if not len(places):
        return Share(_NONE, numbers[:0], _NONE)
    return Share(_FIRST, np.where(mine, numbers, np.int32(-1)), places)


def rows_in_order(shares: Sequence[Share], count: int) -> Ints:
    """Returns the row of each pair if the ranks' results follow one another.

    Args:
        shares: what each rank has computed.
        count: the pairs of the call.
    """
    rows = np.zeros(count, np.int64)
    begin = 0
    for share in shares:
        end = begin + len(share.places)
        rows[share.places] = np.arange(begin, end)
        begin = end
    return rows
