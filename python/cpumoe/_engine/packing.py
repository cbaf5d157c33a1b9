"""Packs experts from tensors, in memory or in a mapped file, and gives them back."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch

from cpumoe import _core
from cpumoe._base.tensors import address
from cpumoe._engine.arguments import (
    MatrixStack,
    checked_biases,
    matrix_view,
    normalized,
    require_shape,
)
from cpumoe.checkpoint import ExpertWeights
from cpumoe.formats import QuantizedMatrix, WeightFormat

# An expert's gate, up and down biases, in the dtypes that the caller gave.
Biases = tuple[torch.Tensor, torch.Tensor, torch.Tensor]

# Each thread packs whole experts. A batch is long enough that threads seldom wait for each other,
# and short enough for a progress bar.
BATCH_PER_THREAD = 8


@dataclass(frozen=True)
class ExpertStack:
    """All experts of a layer as checked stacks ``[experts, N, K]``. Iterates over the experts."""

    gate: QuantizedMatrix
    up: QuantizedMatrix
    down: QuantizedMatrix
    biases: tuple[torch.Tensor, ...]

    @property
    def sizes(self) -> tuple[int, int, int]:
        """Experts, hidden size and intermediate size."""
        experts, intermediate, hidden = self.gate.shape
        return experts, hidden, intermediate

    def __iter__(self) -> Iterator[ExpertWeights]:
        """Yields each expert as views of the stacks."""
        for i in range(self.gate.shape[0]):
            biases = (bias[i] for bias in self.biases)
            yield ExpertWeights(self.gate[i], self.up[i], self.down[i], *biases)


def checked_stack(
    fmt: WeightFormat,
    gate: MatrixStack,
    up: MatrixStack,
    down: MatrixStack,
    biases: tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None],
) -> ExpertStack:
    """Checks the tensors that `Experts.from_tensors` gets."""
    stacks = [
        normalized(fmt, matrices, name, stacked=True)
        for matrices, name in ((gate, "gate"), (up, "up"), (down, "down"))
    ]
    experts, intermediate, hidden = stacks[0].shape
    require_shape(stacks[1].shape, (experts, intermediate, hidden), "up")
    require_shape(stacks[2].shape, (experts, hidden, intermediate), "down")
    given = checked_biases(biases, _bias_widths(intermediate, hidden), experts)
    return ExpertStack(stacks[0], stacks[1], stacks[2], tuple(given))


def pack_experts(
    layer: _core.Layer,
    experts: Iterable[ExpertWeights],
    *,
    fmt: WeightFormat,
    hidden_size: int,
    intermediate_size: int,
    runtime: _core.Runtime,
    threads: int,
) -> list[Biases | None]:
    """Packs experts 0, 1, ... and returns copies of their biases, in the dtypes given."""
    kept: list[Biases | None] = []
    widths = _bias_widths(intermediate_size, hidden_size)
    numbered = enumerate(experts)
    while batch := list(itertools.islice(numbered, BATCH_PER_THREAD * threads)):
        first = batch[0][0]
        arguments = []
        sources = []  # keeps what the addresses point to
        for index, weights in batch:
            matrices = _matrices(fmt, index, weights)
            given = checked_biases((weights.gate_bias, weights.up_bias, weights.down_bias), widths)
            floats = [bias.float().contiguous() for bias in given]
            sources.append((matrices, floats))
            views = [matrix_view(matrix, matrix.name) for matrix in matrices]
            starts = [address(*bias) for bias in zip(floats, widths, strict=False)]
            arguments.append((views, starts or None))
            own = [bias.clone() for bias in given]
            kept.append((own[0], own[1], own[2]) if own else None)
        layer.pack(runtime=runtime, first=first, experts=arguments)
    return kept


def unpack_expert(
    layer: _core.Layer,
    expert: int,
    *,
    fmt: WeightFormat,
    hidden_size: int,
    intermediate_size: int,
    runtime: _core.Runtime,
) -> tuple[QuantizedMatrix, QuantizedMatrix, QuantizedMatrix]:
    """Returns an expert's gate, up and down as its checkpoint stores them."""
    gate = _empty_matrix(fmt, intermediate_size, hidden_size)
    up = _empty_matrix(fmt, intermediate_size, hidden_size)
    down = _empty_matrix(fmt, hidden_size, intermediate_size)
    views = (matrix_view(gate, "gate"), matrix_view(up, "up"), matrix_view(down, "down"))
    layer.unpack(runtime=runtime, expert=expert, matrices=views, intermediate_begin=0)
    return gate, up, down


def _empty_matrix(fmt: WeightFormat, rows: int, columns: int) -> QuantizedMatrix:
    code_bytes, groups = columns * fmt.code_bits // 8, columns // fmt.group_size
    # The engine writes to CPU memory, whatever the caller's default device is.
    return QuantizedMatrix(
        torch.empty(rows, code_bytes, dtype=torch.uint8, device="cpu"),
        torch.empty(rows, groups, dtype=fmt.scale_storage, device="cpu"),
    )


def _matrices(fmt: WeightFormat, index: int, weights: ExpertWeights) -> list[QuantizedMatrix]:
    """Returns an expert's gate, up and down, checked and named for the engine's errors."""
    return [
        normalized(fmt, getattr(weights, name), f"expert {index}: {name}", stacked=False)
        for name in ("gate", "up", "down")
    ]


def _bias_widths(intermediate: int, hidden: int) -> dict[str, int]:
    return {"gate_bias": intermediate, "up_bias": intermediate, "down_bias": hidden}
