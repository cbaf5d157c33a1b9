"""Packs experts from tensors, in memory or in a mapped file."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch

from cpumoe import _core
from cpumoe._base.tensors import address
from cpumoe._engine.arguments import (
    NO_MATRIX,
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
    gated: bool = True  # whether experts have a gate projection

    @property
    def projections(self) -> tuple[str, ...]:
        """The names of an expert's matrices."""
        return ("gate", "up", "down") if self.gated else ("up", "down")


@dataclass(frozen=True)
class ExpertStack:
    """All experts of a layer as checked stacks ``[experts, N, K]``. Iterates over the experts."""

    gate: QuantizedMatrix
    up: QuantizedMatrix
    down: QuantizedMatrix
    biases: Biases

    @property
    def sizes(self) -> tuple[int, int, int]:
        """Experts, hidden size and intermediate size."""
        experts, intermediate, hidden = self.gate.shape
        return experts, hidden, intermediate

    def __iter__(self) -> Iterator[ExpertWeights]:
        """Yields each expert as views of the stacks."""
        for i in range(self.gate.shape[0]):
            up = self.up[i]
            gate = up if self.gate is self.up else self.gate[i]
            biases = {name: bias[i] for name, bias in self.biases.items()}
            yield ExpertWeights(gate, up, self.down[i], **biases)


def checked_stack(
    fmt: WeightFormat,
    gate: MatrixStack | None,
    up: MatrixStack,
    down: MatrixStack,
    biases: Mapping[str, torch.Tensor | None],
    *,
    gated: bool,
) -> ExpertStack:
    """Checks the tensors that `Experts.from_tensors` gets; `biases` has a value for each name."""
    for name, part in (("gate", gate), ("gate_bias", biases["gate_bias"])):
        require_no_gate(part, name, gated=gated)
    if gated and gate is None:
        raise TypeError(
            "gate: expected the gate projections, got None; pass them, or "
            "activation=GLU(..., gated=False) for experts that have none"
        )
    matrices = {"gate": gate, "up": up, "down": down} if gated else {"up": up, "down": down}
    stacks = {name: normalized(fmt, m, name, stacked=True) for name, m in matrices.items()}
    gate_stack = stacks.get("gate", stacks["up"])
    experts, intermediate, hidden = gate_stack.shape
    shapes = (experts, intermediate, hidden), (experts, hidden, intermediate)
    require_shape(stacks["up"].shape, shapes[0], "up", _SHAPES)
    require_shape(stacks["down"].shape, shapes[1], "down", _SHAPES)
    widths = _bias_widths(ExpertForm(fmt, hidden, intermediate, gated))
    given = checked_biases([biases[name] for name in widths], widths, experts)
    named = dict(zip(widths, given, strict=False))
    return ExpertStack(gate_stack, stacks["up"], stacks["down"], named)


def require_no_gate(part: object, name: str, *, gated: bool) -> None:
    """Raises TypeError if there is a gate, or a bias of it, that experts do not have."""
    if not gated and part is not None:
        raise TypeError(
            f"{name}: expected None, because experts have no gate projection (GLU(gated=False)), "
            f"got {type(part).__name__}; leave {name} out"
        )


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
    widths = _bias_widths(form)
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
            matrices = checked_matrices(form, index, weights)
            given = checked_biases([getattr(weights, name) for name in widths], widths)
            floats = [bias.float().contiguous() for bias in given]
            sources.append((matrices, floats))
            views = [matrix_view(matrix, matrix.name) for matrix in matrices]
            starts = [address(*bias) for bias in zip(floats, widths, strict=False)]
            if not form.gated:
                views.insert(0, NO_MATRIX)
                starts = [0, *starts] if starts else starts
            arguments.append((views, starts or None))
            copies = (bias.clone() for bias in given)
            keep_biases(index, dict(zip(widths, copies, strict=False)))
        layer.pack(runtime=runtime, experts=[index for index, _ in part], weights=arguments)


def checked_matrices(form: ExpertForm, index: int, weights: ExpertWeights) -> list[QuantizedMatrix]:
    """Returns an expert's matrices, checked and named for the engine's errors."""
    return [
        normalized(form.fmt, getattr(weights, name), f"expert {index}: {name}", stacked=False)
        for name in form.projections
    ]


def _bias_widths(form: ExpertForm) -> dict[str, int]:
    widths = {"up": form.intermediate_size, "down": form.hidden_size}
    return {f"{name}_bias": widths.get(name, widths["up"]) for name in form.projections}
