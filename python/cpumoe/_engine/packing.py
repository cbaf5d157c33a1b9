"""Packs experts from tensors, in memory or in a mapped file."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
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

# An expert's biases by name, in the dtypes that the caller gave; empty: it has none.
Biases = dict[str, torch.Tensor]

# Each thread packs whole experts. A batch is long enough that threads seldom wait for each other,
# and short enough for a progress bar.
BATCH_PER_THREAD = 8

_SHAPES = (
    "gate and up are [experts, intermediate, hidden], and down is [experts, hidden, intermediate]"
)


@dataclass(frozen=True)
class ExpertForm:
    """What all experts of a layer have in common."""

    fmt: WeightFormat
    hidden_size: int
    intermediate_size: int


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
    shapes = (experts, intermediate, hidden), (experts, hidden, intermediate)
    require_shape(stacks[1].shape, shapes[0], "up", _SHAPES)
    require_shape(stacks[2].shape, shapes[1], "down", _SHAPES)
    given = checked_biases(biases, _bias_widths(intermediate, hidden), experts)
    return ExpertStack(stacks[0], stacks[1], stacks[2], tuple(given))


def pack_experts(
    layer: _core.Layer,
    experts: Iterable[tuple[int, ExpertWeights]],
    *,
    form: ExpertForm,
    runtime: _core.Runtime,
    batch: int,
    keep_biases: Callable[[int, Biases], None],
) -> None:
    """Packs experts by their indices. After an error some of them have no weights.

    Args:
        layer: the layer that gets the experts.
        experts: indices and weights.
        form: the form of all experts.
        runtime: the threads that pack.
        batch: number of experts that are packed together.
        keep_biases: takes a copy of an expert's biases, in the dtypes given, before it is packed.
    """
    widths = _bias_widths(form.intermediate_size, form.hidden_size)
    remaining = iter(experts)
    while part := list(itertools.islice(remaining, batch)):
        arguments = []
        sources = []  # keeps what the addresses point to
        for index, weights in part:
            if not isinstance(weights, ExpertWeights):
                raise TypeError(
                    f"expert {index}: expected ExpertWeights from the source, got "
                    f"{type(weights).__name__}; pass a source that returns them for each expert"
                )
            matrices = checked_matrices(form.fmt, index, weights)
            given = checked_biases((weights.gate_bias, weights.up_bias, weights.down_bias), widths)
            floats = [bias.float().contiguous() for bias in given]
            sources.append((matrices, floats))
            views = [matrix_view(matrix, matrix.name) for matrix in matrices]
            starts = [address(*bias) for bias in zip(floats, widths, strict=False)]
            arguments.append((views, starts or None))
            copies = (bias.clone() for bias in given)
            keep_biases(index, dict(zip(widths, copies, strict=False)))
        layer.pack(runtime=runtime, experts=[index for index, _ in part], weights=arguments)


def checked_matrices(
    fmt: WeightFormat, index: int, weights: ExpertWeights
) -> list[QuantizedMatrix]:
    """Returns an expert's gate, up and down, checked and named for the engine's errors."""
    return [
        normalized(fmt, getattr(weights, name), f"expert {index}: {name}", stacked=False)
        for name in ("gate", "up", "down")
    ]


def _bias_widths(intermediate: int, hidden: int) -> dict[str, int]:
    return {"gate_bias": intermediate, "up_bias": intermediate, "down_bias": hidden}
