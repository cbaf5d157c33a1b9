"""Adds up the results of experts that were computed apart from each other."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch

from cpumoe import _core

# How many products are in memory at once, which bounds it to 64 MiB.
_PRODUCTS = 1 << 22
# The CPU feature of variants that add with fused multiply-adds. The others round a product first.
_FUSED = "fma"
# The bits of a float64 that a float32 does not have, and those of a value halfway between two.
_LOST_BITS, _HALF = 0x1FFFFFFF, 0x10000000
_LEAST_NORMAL = torch.finfo(torch.float32).tiny


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
        features = next(row.features for row in _core.known_isas() if row.name == isa)
        self._add: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] = _rounded_twice
        if _FUSED in features:
            self._add = _fused_by_pytorch if pytorch_fuses() else _fused

    @torch.no_grad()
    def __call__(self, terms: torch.Tensor, order: SumOrder, dtype: torch.dtype) -> torch.Tensor:
        """Returns the sums ``[tokens, columns]``, rounded once to `dtype`.

        Args:
            terms: float32 ``[rows, columns]``.
            order: the terms of each token.
            dtype: the dtype of the result.
        """
        tokens, columns = len(order.begins) - 1, terms.shape[1]
        if tokens == 1 and len(order.rows):  # the usual case, without the arithmetic below
            return self._add(terms[order.rows].unsqueeze(1), order.weights.view(-1, 1, 1)).to(dtype)
        sums = torch.zeros((tokens, columns), dtype=torch.float32, device="cpu")
        counts = order.begins.diff()
        for count in set(counts.tolist()) - {0}:
            step = max(1, _PRODUCTS // (count * max(columns, 1)))
            for chosen in torch.split((counts == count).nonzero()[:, 0], step):
                slots = torch.arange(count, dtype=torch.int64, device="cpu").unsqueeze(1)
                places = slots + order.begins[chosen]  # [count, tokens]
                sums[chosen] = self._add(
                    terms[order.rows[places]], order.weights[places].unsqueeze(-1)
                )
        return sums.to(dtype)


@functools.cache
@torch.no_grad()
def pytorch_fuses() -> bool:
    """Whether PyTorch's addcmul rounds once. That depends on how PyTorch was compiled."""
    generator = torch.Generator(device="cpu").manual_seed(0)
    for shape in ((4, 3, 67), (4, 1, 4099)):  # whole registers, and what is left
        terms, weights = (
            torch.empty((*shape[:2], last), dtype=torch.float32, device="cpu").normal_(
                generator=generator
            )
            for last in (shape[2], 1)
        )
        if not torch.equal(_fused_by_pytorch(terms, weights), _fused(terms, weights)):
            return False
    return True


def _fused_by_pytorch(terms: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    total = torch.zeros_like(terms[0])
    for term, weight in zip(terms, weights, strict=True):
        total.addcmul_(term, weight)
    return total


def _rounded_twice(terms: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    total = torch.zeros_like(terms[0])
    for term, weight in zip(terms, weights, strict=True):
        total = total + term * weight
    return total


def _fused(terms: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Returns the sum over the first dimension, with the roundings of fused multiply-adds.

    A product of float32 numbers is exact in float64. Its sum with a float32 number, rounded to
    float64 and then to float32, is what a fused multiply-add gives, unless the first rounding lands
    halfway between two float32 numbers, or among subnormal ones. Then `_rounded_to_odd` decides.
    """
    products = terms.double().mul_(weights)
    sums = torch.empty_like(products)
    total = torch.zeros_like(products[0])
    for product, exact in zip(products, sums, strict=True):
        torch.add(product, total, out=exact)
        total = exact.float().double()
    halfway = (sums.view(torch.int64) & _LOST_BITS) == _HALF
    subnormal = (sums.abs() < _LEAST_NORMAL) & (sums != 0)
    if bool((halfway | subnormal).any()):
        total.zero_()
        for product in products:
            total = _rounded_to_odd(product, total).float().double()
    return total.float()


def _rounded_to_odd(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Returns a + b in float64, with an odd last bit if it is not exact.

    Rounding such a number to fewer bits gives what rounding the exact sum gives. Source: Boldo and
    Melquiond, "Emulation of FMA and correctly rounded sums: proved algorithms using rounding to
    odd", 2008. The error of the sum is exact (Knuth's TwoSum).
    """
    total = a + b
    part = total - a
    error = (a - (total - part)) + (b - part)
    even = (total.view(torch.int64) & 1) == 0
    towards = torch.where(error > 0, torch.inf, -torch.inf).to(total.dtype)
    return torch.where((error != 0) & even, torch.nextafter(total, towards), total)
