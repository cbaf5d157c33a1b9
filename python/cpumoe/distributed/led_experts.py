"""A layer whose experts are divided among ranks, as rank 0 calls it.

Rank 0 has the rest of the model, and so the tokens. It sends each rank the tokens that need the
rank's experts, computes its own experts meanwhile, and adds up what comes back.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist

from cpumoe._base.tensors import plain
from cpumoe._engine.calls import check_inputs
from cpumoe._engine.gradients import without_gradients
from cpumoe._engine.output import Destination
from cpumoe._engine.sums import WeightedSums
from cpumoe.distributed.messages import Request, Sender
from cpumoe.distributed.part import Part
from cpumoe.distributed.routing import Ints, Owners, Share, round_tokens, rows_in_order
from cpumoe.statistics import ExpertsStatistics


class LedExperts:
    """The experts of one layer, most of which other ranks have. Rank 0 calls them.

    Calls are those of `cpumoe.Experts`, with new tensors as results. With "fixed" sums the results
    are the bits of a `cpumoe.Experts` that has all experts.

    Attributes:
        local: rank 0's own experts.
    """

    def __init__(
        self,
        number: int,
        part: Part,
        owners: Owners,
        sums: str,
        senders: Sequence[Sender],
        group: Any,
        lost: Callable[[], Exception | None],
    ) -> None:
        """Makes a layer that all ranks have packed.

        Args:
            number: the layer's number in messages.
            part: rank 0's experts.
            owners: who has which experts.
            sums: "fixed" or "plain".
            senders: for each other rank, what sends it messages.
            group: the process group.
            lost: returns the error of a rank that has ended, after an error of the group.
        """
        self.local = part.experts
        self._number = number
        self._part = part
        self._owners = owners
        self._plain = sums == "plain"
        self._senders = senders
        self._group = group
        self._lost = lost
        self._sums = WeightedSums(self.local.isa)
        self._calls = 0
        self._seconds = 0.0
        self._expert_tokens = np.zeros(owners.num_experts + 2, np.int64)

    def __call__(
        self,
        hidden_states: torch.Tensor,
        topk_ids: torch.Tensor,
        topk_weights: torch.Tensor,
        *,
        out_dtype: torch.dtype | None = None,
    ) -> torch.Tensor:
        """Computes the weighted sum of each token's experts; see `cpumoe.Experts.__call__`.

        Raises:
            TypeError, ValueError, IndexError: see `cpumoe.Experts.__call__`.
            RanksError: another rank has ended.
        """
        start = time.perf_counter()
        Destination(None, out_dtype).check()
        x = plain(hidden_states, "hidden_states").detach().contiguous()
        ids = plain(topk_ids, "topk_ids")
        weights = plain(topk_weights, "topk_weights").detach()
        check_inputs(x, ids, weights, self.local.hidden_size)
        dtype = out_dtype or x.dtype
        self._owners.check(ids.numpy())
        whole = ids.long().numpy(), weights.float().contiguous().numpy()
        tokens, step = len(x), round_tokens(ids.shape[1])
        try:
            if tokens <= step:
                output = self._round(x, *whole, dtype)
            else:
                rounds = [slice(begin, begin + step) for begin in range(0, tokens, step)]
                output = torch.cat(
                    [self._round(x[part], whole[0][part], whole[1][part], dtype) for part in rounds]
                )
        except RuntimeError as error:
            raise (self._lost() or error) from error
        self._calls += 1
        self._seconds += time.perf_counter() - start
        return without_gradients(output, hidden_states, topk_weights)

    @property
    def nbytes(self) -> int:
        """Bytes of rank 0's packed weights."""
        return self.local.nbytes

    def statistics(self) -> ExpertsStatistics:
        """Returns what the ranks have computed: rank 0's own bytes, and the tokens of all experts.

        The time is that of rank 0's calls, other ranks and the network included.
        """
        return ExpertsStatistics(
            calls=self._calls,
            seconds=self._seconds,
            expert_tokens=torch.from_numpy(self._expert_tokens[: self._owners.num_experts].copy()),
            bytes_read=self.local.statistics().bytes_read,
        )

    def __repr__(self) -> str:
        """Shows rank 0's part, and how many ranks there are."""
        owners = self._owners
        return f"LedExperts({owners.num_experts} experts, ranks={owners.world}, {self.local})"

    def _round(
        self, x: torch.Tensor, ids: Ints, weights: npt.NDArray[np.float32], dtype: torch.dtype
    ) -> torch.Tensor:
        """Computes as many tokens as the engine takes together."""
        shares = self._owners.shares(ids)
        np.add.at(self._expert_tokens, ids, 1)
        requests = [self._request(x, weights, share) for share in shares]
        # Other ranks compute while rank 0 does.
        for sender, share, request in zip(self._senders, shares[1:], requests[1:], strict=True):
            if len(share.tokens):
                sender.send_request(self._number, request)
        if self._plain:
            return self._added(x, shares, requests).to(dtype)
        columns = x.shape[1]
        terms = torch.empty(
            (sum(len(share.places) for share in shares), columns), dtype=torch.float32, device="cpu"
        )
        parts = torch.split(terms, [len(share.places) for share in shares])
        waiting = self._receive(parts[1:])
        if len(parts[0]):
            self._part.terms(requests[0].x, requests[0].ids, out=parts[0])
        order = self._owners.order(ids, weights, rows_in_order(shares, ids.size))
        for work in waiting:
            work.wait()
        return self._sums(terms, order, dtype, self.local.runtime.core)

    def _added(
        self, x: torch.Tensor, shares: Sequence[Share], requests: Sequence[Request]
    ) -> torch.Tensor:
        """Returns the sum of the ranks' sums, in the order of ranks."""
        parts = [
            torch.empty((len(share.tokens), x.shape[1]), dtype=torch.float32, device="cpu")
            for share in shares
        ]
        waiting = self._receive(parts[1:])
        own = requests[0]
        assert own.weights is not None
        if len(parts[0]):
            parts[0] = self._part.sums(own.x, own.ids, own.weights)
        for work in waiting:
            work.wait()
        total = torch.zeros(x.shape, dtype=torch.float32, device="cpu")
        for share, part in zip(shares, parts, strict=True):
            if len(share.tokens) == len(x):
                total += part
            else:
                total.index_add_(0, torch.from_numpy(share.tokens), part)
        return total

    def _receive(self, parts: Sequence[torch.Tensor]) -> list[Any]:
        """Begins to receive what the other ranks compute."""
        return [
            dist.irecv(part, rank, group=self._group)
            for rank, part in enumerate(parts, start=1)
            if len(part)
        ]

    def _request(self, x: torch.Tensor, weights: npt.NDArray[np.float32], share: Share) -> Request:
        everything = len(share.tokens) == len(x)
        rows = x if everything else x[torch.from_numpy(share.tokens)]
        factors = None
        if self._plain:
            factors = torch.from_numpy(weights if everything else weights[share.tokens])
        return Request(rows, torch.from_numpy(share.experts), factors)
