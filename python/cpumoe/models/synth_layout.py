"""What the native layouts of checkpoints have in common."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from cpumoe._base.random import normal
from cpumoe.checkpoint.writer import TensorSpec
from cpumoe.formats import QuantizedMatrix, WeightFormat, weight_format
from cpumoe.formats.quantized_matrix import BLOCK
from cpumoe.models import ModelSpec

ROUTER_STD = 0.02

# A piece of a tensor: name, first row, data.
Piece = tuple[str, int, torch.Tensor]


@dataclass(frozen=True)
class Sizes:
    """The sizes of the checkpoint to write; `layers` counts MoE layers."""

    layers: int
    experts: int
    hidden: int
    intermediate: int
    top_k: int


class Layout(ABC):
    """How one model family's checkpoint looks."""

    def __init__(self, spec: ModelSpec, sizes: Sizes) -> None:
        """Lays out `spec` with `sizes`."""
        self.spec = spec
        self.sizes = sizes
        self.format: WeightFormat = weight_format(spec.weight_format)

    @property
    def layer_ids(self) -> range:
        """The MoE layers' indices among the decoder layers."""
        first = self.spec.first_moe_layer
        return range(first, first + self.sizes.layers)

    @property
    def projections(self) -> tuple[tuple[int, int], tuple[int, int], tuple[int, int]]:
        """[N, K] of gate, up and down."""
        hidden, inner = self.sizes.hidden, self.sizes.intermediate
        return (inner, hidden), (inner, hidden), (hidden, inner)

    @abstractmethod
    def config(self) -> dict[str, Any]:
        """Returns the content of config.json."""

    @abstractmethod
    def tensors(self, layer: int) -> Iterator[TensorSpec]:
        """Yields every tensor of a layer, in file order."""

    @abstractmethod
    def router(self, layer: int, generator: torch.Generator) -> Iterator[Piece]:
        """Yields the router's tensors."""

    @abstractmethod
    def expert(
        self, layer: int, index: int, matrices: list[QuantizedMatrix], generator: torch.Generator
    ) -> Iterator[Piece]:
        """Yields the pieces of one expert; `matrices` are gate, up, down."""

    def _scale_shape(self, n: int, k: int) -> tuple[int, int]:
        """The shape of the scales of weights ``[n, k]``."""
        rows = BLOCK if self.format.blocks else 1
        return -(-n // rows), -(-k // self.format.group_size)

    def _normal(self, *shape: int, generator: torch.Generator) -> torch.Tensor:
        return normal(*shape, generator=generator) * ROUTER_STD
