"""Which rank has which experts of a layer."""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Sequence

import torch

from cpumoe.checkpoint import ExpertReader

PLACEMENTS = ("contiguous", "balanced")


def place(
    num_experts: int,
    world: int,
    placement: str = PLACEMENTS[0],
    frequencies: torch.Tensor | Sequence[float] | None = None,
) -> list[list[int]]:
    """Returns each rank's experts, ascending. Numbers of experts differ by at most one.

    Args:
        num_experts: the number of experts of a layer.
        world: the number of ranks.
        placement: "contiguous": successive experts. "balanced": experts so that each rank gets
            about equally many tokens.
        frequencies: ``[num_experts]``, how often tokens have used each expert, for example
            ``Experts.statistics().expert_tokens``. "balanced" needs it.

    Raises:
        ValueError: the placement is unknown, there are more ranks than experts, or the frequencies
            are missing, negative, not finite or of another number.
    """
    if placement not in PLACEMENTS:
        raise ValueError(
            f"placement: expected {' or '.join(map(repr, PLACEMENTS))}, got {placement!r}"
        )
    if not 1 <= world <= num_experts:
        raise ValueError(
            f"placement: expected 1 to {num_experts} ranks, because each has at least one of "
            f"{num_experts} experts, got {world}"
        )
    if placement == "contiguous":
        bounds = [rank * num_experts // world for rank in range(world + 1)]
        return [list(range(*pair)) for pair in itertools.pairwise(bounds)]
    return _balanced(_checked(frequencies, num_experts), world)


def check_frequencies(
    frequencies: torch.Tensor, reader: ExpertReader, name: str = "frequencies"
) -> None:
    """Checks how often tokens have used the experts of a whole model.

    Args:
        frequencies: ``[layers, experts]``.
        reader: the model's checkpoint.
        name: what to call the frequencies in errors.

    Raises:
        ValueError: the checkpoint has another number of layers or experts, or a layer's experts
            were not used at all.
    """
    expected = [reader.config.num_hidden_layers, reader.num_experts]
    if list(frequencies.shape) != expected:
        raise ValueError(
            f"{name}: expected counts of {expected[0]} layers with {expected[1]} experts, as the "
            f"checkpoint has, got {list(frequencies.shape)}; record them with this model"
        )
    for layer in reader.layers():
        if not bool(frequencies[layer].any()):
            raise ValueError(
                f"{name}: layer {layer}: expected counts of its experts, got zeros; record them "
                "with all layers of this model"
            )


def _balanced(frequencies: list[float], world: int) -> list[list[int]]:
    """Gives each expert, the most frequent first, to the rank with the least work that has room.

    Source: longest processing time first (Graham 1969), with a limit on each rank's experts.
    """
    least, more = divmod(len(frequencies), world)
    ranks: list[list[int]] = [[] for _ in range(world)]
    work = [(0.0, rank) for rank in range(world)]  # a heap
    for expert in sorted(range(len(frequencies)), key=lambda each: (-frequencies[each], each)):
        load, rank = heapq.heappop(work)
        ranks[rank].append(expert)
        if len(ranks[rank]) < least + (rank < more):
            heapq.heappush(work, (load + frequencies[expert], rank))
    return [sorted(experts) for experts in ranks]


def _checked(frequencies: torch.Tensor | Sequence[float] | None, count: int) -> list[float]:
    if frequencies is None:
        raise ValueError(
            "frequencies: expected one number per expert with placement='balanced', got None; pass "
            "Experts.statistics().expert_tokens of a run"
        )
    numbers = torch.as_tensor(frequencies, dtype=torch.float64, device="cpu")
    if tuple(numbers.shape) != (count,):
        raise ValueError(f"frequencies: expected [{count}], got {list(numbers.shape)}")
    if not bool(((numbers >= 0) & numbers.isfinite()).all()):
        raise ValueError("frequencies: expected finite numbers of 0 or more")
    return [float(number) for number in numbers.tolist()]
