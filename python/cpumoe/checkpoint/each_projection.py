"""What readers of quantized experts with tensors for each projection of each expert share.

Tensors are called ``layers.{L}.{block}.experts.{e}.{gate_proj,up_proj,down_proj}.{kind}``. Some
checkpoints call gate, up and down w1, w3, w2. The block is ``mlp``, ``block_sparse_moe``,
``feed_forward`` or another single name.
"""

from __future__ import annotations

import re
from abc import abstractmethod
from collections.abc import Iterator

import torch
from typing_extensions import override

from cpumoe.checkpoint.config import MoeConfig
from cpumoe.checkpoint.files import CheckpointError, shown
from cpumoe.checkpoint.reader import LAYER, MODEL, ExpectedTensor, ExpertReader, ExpertWeights
from cpumoe.formats import QuantizedMatrix

EXPERTS = rf"(?P<prefix>{MODEL}layers\.{LAYER}\.\w+\.experts\.)[0-9]+\."
# Names of gate, up and down.
_PROJECTIONS = (("gate_proj", "up_proj", "down_proj"), ("w1", "w3", "w2"))
# Without a gate projection, up takes its place (`ExpertWeights`).
_WITHOUT_GATE = (("up_proj", "up_proj", "down_proj"),)
_MODELS_WITHOUT_GATE = ("nemotron_h",)


def projections_of(config: MoeConfig) -> tuple[tuple[str, str, str], ...]:
    """Returns the names that gate, up and down of a model's experts may have."""
    without_gate = config.model_type in _MODELS_WITHOUT_GATE
    return _WITHOUT_GATE if without_gate else _PROJECTIONS


class EachProjectionReader(ExpertReader):
    """Reads gate, up and down of an expert one by one."""

    _EXPERT = re.compile(EXPERTS)

    @property
    def _codes_kind(self) -> str:
        """The kind of the tensors that hold codes."""
        return "weight"

    @abstractmethod
    def _projection(self, name: str, n: int, k: int) -> list[ExpectedTensor]:
        """Returns the tensors of the projection `name`, whose weights are ``[n, k]``."""

    @abstractmethod
    def _read_projection(self, name: str, n: int, k: int) -> QuantizedMatrix:
        """Reads a projection; see `_projection`."""

    @override
    def _expert_tensors(self, prefix: str, index: int) -> Iterator[ExpectedTensor]:
        for name, n, k in self._named_sizes(prefix, index):
            yield from self._projection(name, n, k)

    @override
    def _read_expert(self, prefix: str, index: int) -> ExpertWeights:
        named = dict.fromkeys(self._named_sizes(prefix, index))
        *gate, up, down = (self._read_projection(*each) for each in named)
        return ExpertWeights(gate[0] if gate else up, up, down)

    def _number(self, name: str) -> ExpectedTensor:
        """Returns a tensor of one number that multiplies or divides all weights of a matrix."""
        return name, (torch.float32,), self._scalar_shape(name)

    def _read_number(self, number: ExpectedTensor, *, inverse: bool = False) -> torch.Tensor:
        """Returns the factor of a matrix, float32 ``[]``: a number, or one divided by it.

        Raises:
            CheckpointError: the factor is negative or not finite.
        """
        stored = self.folder.tensor(*number).reshape(())
        factor = stored.reciprocal() if inverse else stored
        if not (factor.isfinite() and stored.isfinite() and stored >= 0):
            wanted = "positive and finite" if inverse else "at least 0 and finite"
            raise CheckpointError(
                f"{shown(number[0])}: expected a number that is {wanted}, got {stored.item()}; the "
                f"checkpoint is damaged"
            )
        return factor

    def _named_sizes(self, prefix: str, index: int) -> Iterator[tuple[str, int, int]]:
        """Yields name, N and K of gate, up and down."""
        expert = f"{prefix}{index}."

        def has(projections: tuple[str, ...]) -> bool:
            return any(f"{expert}{name}.{self._codes_kind}" in self.folder for name in projections)

        known = projections_of(self.config)
        projections = next(filter(has, known), known[0])
        for name, (n, k) in zip(projections, self._projection_sizes(), strict=True):
            yield f"{expert}{name}", n, k
