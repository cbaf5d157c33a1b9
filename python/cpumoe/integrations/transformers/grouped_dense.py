"""Dense layers that multiply each part of a token's input by a matrix of its own.

DeepSeek-V4 projects its attention's output so: each group of heads has a matrix. The host's module
is a `torch.nn.Linear` of a derived class, whose weights are the matrices' rows, one matrix after
the other. A trial with small random weights shows whether a derived class computes this. Names do
not matter.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import nn
from typing_extensions import override

import cpumoe
from cpumoe.formats import QuantizedMatrix, stacked_rows

_TOLERANCE = 1e-5
_OWN = ("in_features", "out_features")


class GroupedLinear(nn.Module):
    """Matrices, each of which multiplies one part of a token's input.

    Attributes:
        layers: the matrices.
    """

    def __init__(self, layers: Sequence[cpumoe.Linear]) -> None:
        """Makes a layer of matrices ``[out_features, in_features]`` of one format and size."""
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self._each = tuple(layers)

    @override
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Returns ``[..., groups, out_features]`` for an input ``[..., groups, in_features]``."""
        tokens = input.flatten(0, -3) if input.dim() > 2 else input.unsqueeze(0)
        parts = zip(self._each, tokens.unbind(1), strict=True)
        result = torch.stack([layer(part) for layer, part in parts], 1)
        return result.view(*input.shape[:-1], self._each[0].out_features)

    def export(self) -> QuantizedMatrix:
        """Returns all rows as they were stored, bit for bit, one matrix after the other."""
        rows = stacked_rows([layer.export() for layer in self._each])
        assert rows is not None
        return rows

    @property
    def format(self) -> str:
        """Name of the weight format, e.g. "fp8"."""
        return self._each[0].format


def groups_of(module: nn.Linear) -> int:
    """Returns of how many matrices a module of a derived class consists.

    Returns:
        1 for a `torch.nn.Linear` itself; 0 if the class computes something else, or is not known to
        compute this.
    """
    if type(module) is nn.Linear:
        return 1
    parts = {**module._parameters, **module._buffers, **module._modules}
    if [name for name, part in parts.items() if part is not None] != ["weight"]:
        return 0
    numbers = {v for name, v in vars(module).items() if type(v) is int and name not in _OWN}
    for number in sorted(numbers):
        divides = number > 1 and module.out_features % number == 0
        if divides and _multiplies_parts(module, number):
            return number
    return 0


def pack_groups(
    matrix: QuantizedMatrix,
    groups: int,
    *,
    format: str,
    bias: torch.Tensor | None,
    options: cpumoe.ExpertsOptions,
) -> cpumoe.Linear | GroupedLinear:
    """Packs the weights of a module, which are those of so many matrices; see `groups_of`."""
    if groups == 1:
        return cpumoe.Linear(matrix, format=format, bias=bias, options=options)
    parts = split_rows(matrix, groups)
    assert parts is not None
    return GroupedLinear([cpumoe.Linear(part, format=format, options=options) for part in parts])


def split_rows(matrix: QuantizedMatrix, groups: int) -> list[QuantizedMatrix] | None:
    """Returns so many equal matrices, one after the other; None: they share scales."""
    rows = matrix.shape[0] // groups
    try:
        return [matrix[start : start + rows] for start in range(0, groups * rows, rows)]
    except ValueError:
        return None


def _multiplies_parts(module: nn.Linear, groups: int) -> bool:
    """Whether a module with other weights multiplies each of `groups` parts by a matrix."""
    rng = torch.Generator("cpu").manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=rng, dtype=torch.float32, device="cpu")

    rows, width = 3, 5
    weight = random(groups, rows, width)
    trial = copy.copy(module)  # shares parameters with the module until it gets its own
    trial.__dict__["_parameters"] = {"weight": nn.Parameter(weight.flatten(0, 1)), "bias": None}
    trial.in_features, trial.out_features = width, groups * rows
    with torch.no_grad():
        for lead in ((2, 4), (1, 1)):
            x = random(*lead, groups, width)
            expected = torch.einsum("...gk,gnk->...gn", x, weight)
            try:
                actual = trial(x)
            except Exception:  # whatever the class refuses
                return False
            if not isinstance(actual, torch.Tensor) or actual.shape != expected.shape:
                return False
            if not ((actual - expected).norm() <= _TOLERANCE * expected.norm()):
                return False
    return True
