"""Adds up the results of experts that were computed apart from each other."""

from __future__ import annotations

from typing import NamedTuple

import torch

from cpumoe import _core
from cpumoe._base.tensors import address, contiguous
from cpumoe._engine.output import ELEMENTS


class SumOrder(NamedTuple):
    """Which terms each token's sum has, in the order of the additions.

    Attributes:
        begins: int64 ``[tokens + 1]``; the terms of token t are ``begins[t]`` to ``begins[t + 1]``
            of the two lists below.
        rows: int64, the row of each term.
        weights: float32, the factor of each term.
    """

    begins: torch.Tensor
    rows: torch.Tensor
    weights: torch.Tensor


class WeightedSums:
    """Adds terms as a variant's forward pass does: one after the other, in float32."""

    def __init__(self, isa: str) -> None:
        """Makes sums with the roundings of a variant."""
        self._sums = _core.WeightedSums(isa=isa, origin="isa")

    def __call__(
        self, terms: torch.Tensor, order: SumOrder, dtype: torch.dtype, runtime: _core.Runtime
    ) -> torch.Tensor:
        """Returns the sums ``[tokens, columns]``, rounded once to `dtype`.

        Args:
            terms: float32 ``[rows, columns]``.
            order: the terms of each token.
            dtype: the dtype of the result: bf16, fp16 or fp32.
            runtime: the threads that compute.

        Raises:
            IndexError: there is no such row.
            RuntimeError: the runtime is closed, or belongs to the parent of a forked process.
        """
        terms, first_term, (count, columns) = contiguous(terms, "terms")
        # Tensors that had to be copied live until the call has ended.
        parts = [contiguous(tensor, name) for name, tensor in order._asdict().items()]
        first_begin, first_row, first_weight = (start for _, start, _ in parts)
        sums = torch.empty((len(order.begins) - 1, columns), dtype=dtype, device="cpu")
        self._sums.run(
            runtime,
            ELEMENTS[dtype],
            len(sums),
            columns,
            first_term,
            count,
            first_begin,
            first_row,
            first_weight,
            address(sums, "sums"),
        )
        return sums
