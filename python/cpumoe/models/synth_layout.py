"""What the native layouts of checkpoints have in common."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from cpumoe._base.random import normal
from cpumoe.checkpoint.writer import TensorSpec
from cpumoe.formats import QuantizedMatrix, WeightFormat, weight_format
from cpumoe.formats.quantized_matrix import BLOCK
from cpumoe.formats.scale_choice import USUAL_SCALES, ScaleChoice
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
    """How one model family's checkpoint looks.

    Attributes:
        scales_vary: whether checkpoints of this layout have scales of several types or groups.
    """

    scales_vary: ClassVar[bool] = False

    def __init__(self, spec: ModelSpec, sizes: Sizes, scales: ScaleChoice = USUAL_SCALES) -> None:
        """Lays out `spec` with `sizes`.

        Raises:
            ValueError: the format or the layout has no such scales.
        """
        self.spec = spec
        self.sizes = sizes
        self.format: WeightFormat = weight_format(spec.weight_format)
        self.scales = scales
        self.format.check_scale_choice(scales, sizes.hidden, sizes.intermediate)
        if scales != USUAL_SCALES and not self.scales_vary:
            raise ValueError(
                f"{spec.name}: its checkpoint layout has one type of scales, for a fixed number of "
                f"weights; choose scales of a model in int4 or fp8"
            )

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

    def check_k(self, k: int, what: str) -> None:
        """Raises ValueError unless matrices of the layout may have `k` columns."""
        self.format.check_k(k, what)

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
        if self.scales.by_row:
            return n, 1
        rows = BLOCK if self.format.blocks else 1
        return -(-n // rows), -(-k // self._group_size)

    @property
    def _group_size(self) -> int:
        """How many weights of a row share a scale, if not all do."""
        return self.scales.group_size or self.format.group_size

    def _scales(self, name: str, n: int, k: int, usual: torch.dtype) -> TensorSpec:
        """The scales of weights ``[n, k]``, whose dtype usually is `usual`."""
        return TensorSpec(name, self.scales.dtype or usual, self._scale_shape(n, k))

    def _normal(self, *shape: int, generator: torch.Generator) -> torch.Tensor:
        return normal(*shape, generator=generator) * ROUTER_STD
