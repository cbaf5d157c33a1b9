"""Expert parallelism for hosts whose ranks all make the same calls."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from typing_extensions import Unpack

from cpumoe._base.tensors import plain
from cpumoe._engine.calls import check_inputs
from cpumoe._engine.gradients import without_gradients
from cpumoe._engine.output import ELEMENTS, Destination
from cpumoe._engine.sums import WeightedSums
from cpumoe.checkpoint import ExpertReader, open_checkpoint
from cpumoe.distributed.agreement import RanksError, difference, fingerprint, host_name, software
from cpumoe.distributed.collectives import Group
from cpumoe.distributed.messages import Request, parts_of, request_bytes, request_of
from cpumoe.distributed.part import Part, check_sums
from cpumoe.distributed.placement import PLACEMENTS, place
from cpumoe.distributed.routing import Ints, Owners, Share, round_tokens, rows_in_order
from cpumoe.experts import Experts
from cpumoe.isa import isa as default_isa
from cpumoe.numerics.glu import GLU
from cpumoe.options import ExpertsKeywords, ExpertsOptions, with_overrides

INPUTS = ("replicated", "divided")

# Up to so many bytes, each rank sends its results to all others at once. Above, each rank adds up
# some columns of all results, which sends fewer bytes in two steps.
_DIRECT_BYTES = 1 << 18
# Parts of a message begin at multiples of so many bytes.
_ALIGNMENT = 8

_DTYPES = tuple(ELEMENTS)


class DistributedExperts:
    """The routed experts of a layer, divided among the ranks of a process group.

    All ranks call the layer together, as often and in the same order. Make it with
    `from_checkpoint`, on all ranks.

    Attributes:
        local: the experts of this rank, whose ids are the rank's own.
        experts_of: the experts that each rank has.
    """

    def __init__(
        self,
        local: Experts,
        experts_of: Sequence[Sequence[int]],
        group: Any | None = None,
        *,
        inputs: str = INPUTS[0],
        sums: str = "fixed",
    ) -> None:
        """Combines experts that all ranks have packed; prefer `from_checkpoint`."""
        check_sums(sums)
        if inputs not in INPUTS:
            raise ValueError(f"inputs: expected {' or '.join(map(repr, INPUTS))}, got {inputs!r}")
        self.local = local
        self.experts_of = [list(experts) for experts in experts_of]
        self._group = Group(group)
        self._part = Part(local)
        self._owners = Owners(experts_of)
        self._replicated = inputs == INPUTS[0]
        self._plain = sums == "plain"
        self._sums = WeightedSums(local.isa)

    @classmethod
    def from_checkpoint(
        cls,
        path: str | os.PathLike[str] | ExpertReader,
        layer: int,
        *,
        group: Any | None = None,
        placement: str = PLACEMENTS[0],
        frequencies: torch.Tensor | Sequence[float] | None = None,
        inputs: str = INPUTS[0],
        sums: str = "fixed",
        activation: GLU | None = None,
        options: ExpertsOptions | None = None,
        **overrides: Unpack[ExpertsKeywords],
    ) -> DistributedExperts:
        """Packs this rank's experts of a layer. All ranks of the group must call it.

        Args:
            path: the checkpoint's folder, or a reader. Each rank reads its own experts alone.
            layer: index of the decoder layer.
            group: a process group of torch.distributed with a backend for CPU tensors, such as
                gloo. Default: the default group.
            placement: which experts a rank has: "contiguous" ones, or those that `frequencies`
                make "balanced"; see `place`.
            frequencies: ``[experts]``, how often tokens have used each expert.
            inputs: "replicated": all ranks call with the same tokens, bit for bit, and all get all
                results. "divided": each rank has tokens of its own, or none, and gets their
                results. Tokens then go to the ranks that have their experts.
            sums: "fixed": results have the bits of a `cpumoe.Experts` that computes the tokens of
                all ranks, one rank's after the other, in one call. "plain": each rank adds up its
                own experts first, which sends fewer bytes. The sum over ranks is then rounded in
                another order.
            activation: see `cpumoe.Experts.from_checkpoint`.
            options: see `cpumoe.Experts.from_checkpoint`.
            **overrides: see `cpumoe.Experts.from_checkpoint`.

        Raises:
            RanksError: ranks differ in checkpoint, layer, software, variant or options.
            RuntimeError: torch.distributed is not initialised.
            TypeError, ValueError, OSError, IndexError: see `cpumoe.Experts.from_checkpoint` and
                `place`; the group has no backend for the CPU.
        """
        options = with_overrides(options, overrides, "DistributedExperts.from_checkpoint")
        own = path if isinstance(path, ExpertReader) else open_checkpoint(path)
        try:
            ranks = Group(group)
            experts_of = place(own.num_experts, ranks.world, placement, frequencies)
            _agree(
                ranks,
                {
                    **software(),
                    "checkpoint": fingerprint(own.folder),
                    "layer": f"{own.module} {layer}".strip(),
                    "variant": options.isa or default_isa(),
                    "placement": str(experts_of),
                    "inputs": inputs,
                    "sums": sums,
                    "activation": str(activation),
                    "precision": options.precision,
                    "batch_invariant": str(options.batch_invariant),
                    "few_token_limit": str(options.few_token_limit),
                },
            )
            local = Experts.from_checkpoint(
                own,
                layer,
                experts=experts_of[ranks.rank],
                activation=activation,
                progress=False,
                options=options,
            )
            return cls(local, experts_of, group, inputs=inputs, sums=sums)
        finally:
            if own is not path:
                own.close()

    def __call__(
        self,
        hidden_states: torch.Tensor,
        topk_ids: torch.Tensor,
        topk_weights: torch.Tensor,
        *,
        out_dtype: torch.dtype | None = None,
    ) -> torch.Tensor:
        """Computes the weighted sum of each token's experts. All ranks must call it together.

        Args:
            hidden_states: ``[tokens, hidden]`` bf16, fp16 or fp32, on the CPU; tokens may be 0.
            topk_ids: ``[tokens, top_k]`` int32 or int64, ids of the whole layer. The ids -1 and
                `num_experts` are skipped.
            topk_weights: ``[tokens, top_k]`` fp32, bf16 or fp16.
            out_dtype: the result's dtype. Default: that of `hidden_states`.

        Returns:
            A new tensor ``[tokens, hidden]``.

        Raises:
            TypeError, ValueError, IndexError: see `cpumoe.Experts.__call__`. Other ranks then wait
                for this one, so that the host must end them.
            RanksError: with "divided" inputs, ranks call with other dtypes or another top_k.
            RuntimeError: another rank has ended.
        """
        Destination(None, out_dtype).check()
        x = plain(hidden_states, "hidden_states").detach().contiguous()
        ids = plain(topk_ids, "topk_ids")
        weights = plain(topk_weights, "topk_weights").detach()
        check_inputs(x, ids, weights, self.local.hidden_size)
        call = _Call(x, ids.long().numpy(), weights.float().contiguous().numpy())
        self._owners.check(call.ids)
        compute = self._of_replicated if self._replicated else self._of_divided
        output = compute(call, out_dtype or x.dtype)
        return without_gradients(output, hidden_states, topk_weights)

    @property
    def num_experts(self) -> int:
        """Number of experts of the layer, on all ranks together."""
        return self._owners.num_experts

    @property
    def nbytes(self) -> int:
        """Bytes of this rank's packed weights."""
        return self.local.nbytes

    def __repr__(self) -> str:
        """Shows this rank's part."""
        return (
            f"DistributedExperts({self.num_experts} experts, rank {self._group.rank} of "
            f"{self._group.world}: {self.local})"
        )

    # Replicated inputs: all ranks know what each of them computes.

    def _of_replicated(self, call: _Call, dtype: torch.dtype) -> torch.Tensor:
        return _joined(self._replicated_round(each, dtype) for each in call.rounds())

    def _replicated_round(self, call: _Call, dtype: torch.dtype) -> torch.Tensor:
        ranks = self._group
        shares = self._owners.shares(call.ids)
        own = shares[ranks.rank]
        if self._plain:
            total = torch.zeros(call.x.shape, dtype=torch.float32, device="cpu")
            if len(own.tokens):
                request = call.request(own, plain=True)
                assert request.weights is not None
                total[torch.from_numpy(own.tokens)] = self._part.sums(
                    request.x, request.ids, request.weights
                )
            return ranks.sum(total).to(dtype)
        counts = [len(share.places) for share in shares]
        most, columns = max(counts), call.x.shape[1]
        width = -(-columns // ranks.world)  # of the columns that a rank adds up in two steps
        others = ranks.world - 1
        direct = others * most * columns * 4
        results = sum(counts) * others // ranks.world
        two_steps = width * (results * 4 + others * len(call.x) * dtype.itemsize)
        if direct <= max(_DIRECT_BYTES, two_steps):
            return self._all_at_once(call, shares, most, dtype)
        return self._in_two_steps(call, shares, width, dtype)

    def _all_at_once(
        self, call: _Call, shares: Sequence[Share], most: int, dtype: torch.dtype
    ) -> torch.Tensor:
        """Each rank gets all results, and adds them up."""
        ranks, columns = self._group, call.x.shape[1]
        mine = torch.empty((most, columns), dtype=torch.float32, device="cpu")
        self._own_terms(call, shares[ranks.rank], mine)
        terms = ranks.equal(mine).view(-1, columns)
        rows = np.zeros(call.ids.size, np.int64)
        for rank, share in enumerate(shares):
            rows[share.places] = np.arange(len(share.places)) + rank * most
        return self._added(terms, call, rows, dtype)

    def _in_two_steps(
        self, call: _Call, shares: Sequence[Share], width: int, dtype: torch.dtype
    ) -> torch.Tensor:
        """Each rank gets some columns of all results, adds them up, and sends the sums to all."""
        ranks, columns = self._group, call.x.shape[1]
        own = shares[ranks.rank]
        # The last rank's columns are filled up, so that all have equally many.
        mine = torch.zeros(
            (len(own.places), ranks.world * width), dtype=torch.float32, device="cpu"
        )
        mine[:, :columns] = self._own_terms(call, own)
        mine = mine.view(-1, ranks.world, width).transpose(0, 1).reshape(-1, width)
        counts = [len(share.places) for share in shares]
        terms = ranks.exchange(mine, [len(own.places)] * ranks.world, counts)
        sums = self._added(terms, call, rows_in_order(shares, call.ids.size), dtype)
        every = ranks.equal(sums).transpose(0, 1).reshape(len(call.x), -1)
        return every[:, :columns].contiguous()

    def _own_terms(
        self, call: _Call, share: Share, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        if out is None:
            out = torch.empty(
                (len(share.places), call.x.shape[1]), dtype=torch.float32, device="cpu"
            )
        if len(share.places):
            request = call.request(share, plain=False)
            self._part.terms(request.x, request.ids, out=out[: len(share.places)])
        return out

    def _added(
        self, terms: torch.Tensor, call: _Call, rows: Ints, dtype: torch.dtype
    ) -> torch.Tensor:
        order = self._owners.order(call.ids, call.weights, rows)
        return self._sums(terms, order, dtype, self.local.runtime.core)

    # Divided inputs: each rank knows its own tokens alone.

    def _of_divided(self, call: _Call, dtype: torch.dtype) -> torch.Tensor:
        ranks, top_k = self._group, call.ids.shape[1]
        numbers = [len(call.x), top_k, _DTYPES.index(call.x.dtype)]
        every = ranks.equal(torch.tensor(numbers, device="cpu"))
        if not bool((every[:, 1:] == every[0, 1:]).all()):
            raise RanksError(
                f"hidden_states, topk_ids: expected one dtype and one top_k on all ranks, got "
                f"{[f'{_DTYPES[int(n[2])]}, {int(n[1])}' for n in every]}"
            )
        counts = every[:, 0].tolist()
        first, total = sum(counts[: ranks.rank]), sum(counts)
        step = round_tokens(top_k)

        def of_rounds() -> Iterator[torch.Tensor]:
            # The rounds of a call with the tokens of all ranks, one rank's after the other.
            for begin in range(0, max(total, 1), step):
                own = (min(max(n - first, 0), len(call.x)) for n in (begin, begin + step))
                yield self._divided_round(call.part(slice(next(own), next(own))), dtype)

        return _joined(of_rounds())

    def _divided_round(self, call: _Call, dtype: torch.dtype) -> torch.Tensor:
        ranks, columns = self._group, call.x.shape[1]
        top_k, plain_sums = call.ids.shape[1], self._plain
        shares = self._owners.shares(call.ids)
        sizes = (top_k, columns, call.x.dtype, plain_sums)
        numbers = [[len(share.tokens), len(share.places)] for share in shares]
        every = ranks.equal(torch.tensor(numbers, device="cpu"))[:, ranks.rank].tolist()
        message = _laid_out([call.request(share, plain=plain_sums) for share in shares])
        sent = [_room(request_bytes(len(share.tokens), *sizes)) for share in shares]
        got = [_room(request_bytes(tokens, *sizes)) for tokens, _ in every]
        received = torch.split(ranks.exchange(message, sent, got), got)
        requests = [
            request_of(bytes_of[: request_bytes(tokens, *sizes)], tokens, *sizes)
            for bytes_of, (tokens, _) in zip(received, every, strict=True)
        ]
        results = self._answered(requests)
        which = 0 if plain_sums else 1  # a result for each token, or for each pair
        back = ranks.exchange(
            results, [each[which] for each in every], [each[which] for each in numbers]
        )
        if not plain_sums:
            return self._added(back, call, rows_in_order(shares, call.ids.size), dtype)
        output = torch.zeros((len(call.x), columns), dtype=torch.float32, device="cpu")
        for share, part in zip(shares, torch.split(back, [n for n, _ in numbers]), strict=True):
            output.index_add_(0, torch.from_numpy(share.tokens), part)
        return output.to(dtype)

    def _answered(self, requests: Sequence[Request]) -> torch.Tensor:
        """Computes the requests of all ranks together, so that each expert is read once."""
        x = torch.cat([each.x for each in requests])
        ids = torch.cat([each.ids for each in requests])
        if not len(x):
            return torch.empty((0, x.shape[1]), dtype=torch.float32, device="cpu")
        if not self._plain:
            return self._part.terms(x, ids)
        weights = torch.cat([each.weights for each in requests if each.weights is not None])
        return self._part.sums(x, ids, weights)


class _Call:
    """The tensors of a call."""

    def __init__(self, x: torch.Tensor, ids: Ints, weights: Any) -> None:
        self.x = x
        self.ids = ids
        self.weights = weights

    def part(self, tokens: slice) -> _Call:
        return _Call(self.x[tokens], self.ids[tokens], self.weights[tokens])

    def rounds(self) -> list[_Call]:
        """Returns what the engine computes together, one part after the other."""
        step = round_tokens(self.ids.shape[1])
        if len(self.x) <= step:
            return [self]
        return [self.part(slice(begin, begin + step)) for begin in range(0, len(self.x), step)]

    def request(self, share: Share, *, plain: bool) -> Request:
        """Returns what a rank is asked to compute."""
        tokens = torch.from_numpy(share.tokens)
        everything = len(tokens) == len(self.x)
        weights = None
        if plain:
            weights = torch.from_numpy(self.weights[share.tokens])
        x = self.x if everything else self.x[tokens]
        return Request(x, torch.from_numpy(share.experts), weights)


def _joined(parts: Iterable[torch.Tensor]) -> torch.Tensor:
    whole = list(parts)
    return whole[0] if len(whole) == 1 else torch.cat(whole)


def _room(count: int) -> int:
    """Returns how many bytes a part of a message takes, with what follows it."""
    return -(-count // _ALIGNMENT) * _ALIGNMENT


def _laid_out(requests: Sequence[Request]) -> torch.Tensor:
    """Returns the bytes of requests, each at an aligned place."""
    filling = torch.zeros(_ALIGNMENT, dtype=torch.uint8, device="cpu")
    parts = []
    for request in requests:
        own = parts_of(request)
        count = sum(map(len, own))
        parts += [*own, filling[: _room(count) - count]]
    return torch.cat(parts)


def _agree(ranks: Group, facts: dict[str, str]) -> None:
    """Raises RanksError on all ranks if one of them differs."""
    every = ranks.objects((host_name(), facts))
    names = [f"rank {rank} ({host})" for rank, (host, _) in enumerate(every)]
    message = difference([each for _, each in every], names)
    if message is not None:
        raise RanksError(message)
