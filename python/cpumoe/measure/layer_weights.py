"""One layer's experts as a checkpoint stores them, ready to be packed for any variant."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import overload

import torch
from typing_extensions import override

from cpumoe._base.random import normal
from cpumoe._base.seed import check_seed
from cpumoe.checkpoint import ExpertReader, ExpertWeights
from cpumoe.experts import Experts
from cpumoe.formats import WeightFormat, weight_format
from cpumoe.formats.scale_choice import USUAL_SCALES, ScaleChoice
from cpumoe.isa import isa
from cpumoe.models import ModelSpec
from cpumoe.models.synth import Pattern, random_matrix
from cpumoe.numerics.glu import GLU
from cpumoe.options import ExpertsOptions

_BIAS_STD = 0.02

# Called with (step in words, units done, units in all).
Progress = Callable[[str, int, int], None]


def silent(_step: str, _done: int, _total: int) -> None:
    """A `Progress` that shows nothing."""


@dataclass(frozen=True)
class LayerWeights:
    """A layer's experts as a checkpoint stores them, and the parameters to run them.

    Attributes:
        experts: the experts; views of a mapped checkpoint, or tensors in memory.
        format: name of the weight format.
        hidden_size: width of the hidden states.
        intermediate_size: inner width of one expert.
        top_k: experts per token.
        activation: the activation.
        has_bias: whether the experts have biases.
    """

    experts: Sequence[ExpertWeights]
    format: str
    hidden_size: int
    intermediate_size: int
    top_k: int
    activation: GLU
    has_bias: bool

    @property
    def num_experts(self) -> int:
        """Number of experts."""
        return len(self.experts)

    @property
    def nbytes(self) -> int:
        """Bytes of weights and scales, without biases."""
        return sum(expert.nbytes for expert in self.experts)

    @classmethod
    def from_checkpoint(
        cls, reader: ExpertReader, layer: int, *, limit: int | None = None
    ) -> LayerWeights:
        """Returns the experts of a checkpoint's layer, or the first `limit` of them.

        Raises:
            IndexError, FileNotFoundError, ValueError: see `ExpertReader.expert`.
        """
        count = _limited(reader.num_experts, limit)
        return cls._like(reader, layer, [reader.expert(layer, i) for i in range(count)])

    @classmethod
    def from_pattern(
        cls,
        reader: ExpertReader,
        layer: int,
        pattern: Pattern,
        *,
        limit: int | None = None,
        seed: int = 0,
        progress: Progress = silent,
    ) -> LayerWeights:
        """Returns made-up experts with the sizes and the format of a checkpoint's layer.

        Their scales have the type of the layer's first expert, and belong to as many weights.

        Args:
            reader: the checkpoint.
            layer: the layer.
            pattern: the weights, see `cpumoe.models.synth.random_matrix`; biases are random
                normal.
            limit: number of experts; default: as many as the checkpoint has.
            seed: seed of the random numbers, 0 to 2**63 - 1.
            progress: called for each expert.

        Raises:
            ValueError: the pattern is unknown, the format is not supported, the seed is out of
                range, or as `ExpertReader.expert`.
            IndexError, OSError: as `ExpertReader.expert`.
        """
        check_seed(seed)
        sizes = reader.hidden_size, reader.intermediate_size
        fmt = weight_format(reader.layer_format(layer))
        scales = _scales_of(reader.expert(layer, 0, check_scales=False), fmt)
        generator = torch.Generator().manual_seed(seed)
        count = _limited(reader.num_experts, limit)
        experts: list[ExpertWeights] = []
        for index in range(count):
            progress(f"making {pattern} experts", index, count)
            experts.append(_made_up(fmt, *sizes, pattern, reader.has_bias, generator, scales))
        return cls._like(reader, layer, experts)

    @classmethod
    def from_model(
        cls,
        spec: ModelSpec,
        *,
        limit: int | None = None,
        format: str | None = None,
        scales: ScaleChoice = USUAL_SCALES,
        seed: int = 0,
    ) -> LayerWeights:
        """Returns made-up experts of a model's layer. Each access to one makes it anew.

        Args:
            spec: the model.
            limit: number of experts; default, and at most: as many as the model has.
            format: weight format; default: the model's.
            scales: the type of scales, and how many weights share one.
            seed: seed of the random codes and scales.

        Raises:
            ValueError: the format is not supported, or the model's sizes or the scales do not fit
                it.
        """
        fmt = weight_format(format or spec.weight_format)
        fmt.check_k(spec.hidden_size, "hidden_size")
        fmt.check_k(spec.moe_intermediate_size, "intermediate_size")
        fmt.check_scale_choice(scales, spec.hidden_size, spec.moe_intermediate_size)
        count = _limited(spec.num_experts, limit)
        return cls(
            experts=_MadeUpExperts(spec, fmt, count, seed, scales),
            format=fmt.name,
            hidden_size=spec.hidden_size,
            intermediate_size=spec.moe_intermediate_size,
            top_k=min(spec.top_k, count),
            activation=spec.activation,
            has_bias=spec.has_bias,
        )

    @classmethod
    def _like(
        cls, reader: ExpertReader, layer: int, experts: Sequence[ExpertWeights]
    ) -> LayerWeights:
        return cls(
            experts=experts,
            format=reader.layer_format(layer),
            hidden_size=reader.hidden_size,
            intermediate_size=reader.intermediate_size,
            top_k=min(reader.top_k, len(experts)),
            activation=reader.known_activation(),
            has_bias=reader.has_bias,
        )

    def pack(self, options: ExpertsOptions, *, progress: Progress = silent) -> Experts:
        """Returns the experts, packed."""
        count = self.num_experts
        step = f"packing for {options.isa or isa()}"

        def experts() -> Iterator[ExpertWeights]:
            for index in range(count):
                progress(step, index, count)
                yield self.experts[index]

        return Experts(
            experts(),
            format=self.format,
            num_experts=self.num_experts,
            hidden_size=self.hidden_size,
            intermediate_size=self.intermediate_size,
            activation=self.activation,
            has_bias=self.has_bias,
            options=options,
        )


class _MadeUpExperts(Sequence[ExpertWeights]):
    """The experts of `LayerWeights.from_model`, made one by one: all may take gigabytes."""

    def __init__(
        self, spec: ModelSpec, fmt: WeightFormat, count: int, seed: int, scales: ScaleChoice
    ) -> None:
        self._spec, self._format, self._count, self._seed = spec, fmt, count, seed
        self._scales = scales

    @override
    def __len__(self) -> int:
        return self._count

    @overload
    def __getitem__(self, index: int) -> ExpertWeights: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[ExpertWeights]: ...
    @override
    def __getitem__(self, index: int | slice) -> ExpertWeights | Sequence[ExpertWeights]:
        chosen = range(self._count)[index]
        if isinstance(chosen, range):
            return [self[i] for i in chosen]
        generator = torch.Generator().manual_seed(self._seed + chosen)
        spec = self._spec
        sizes = spec.hidden_size, spec.moe_intermediate_size
        return _made_up(self._format, *sizes, "random", spec.has_bias, generator, self._scales)


def _made_up(
    fmt: WeightFormat,
    hidden: int,
    inner: int,
    pattern: Pattern,
    has_bias: bool,
    generator: torch.Generator,
    scales: ScaleChoice,
) -> ExpertWeights:
    gate, up, down = (
        random_matrix(fmt, n, k, pattern, generator, scales)
        for n, k in ((inner, hidden), (inner, hidden), (hidden, inner))
    )
    biases = [
        (normal(n, generator=generator) * _BIAS_STD).bfloat16()
        for n in (inner, inner, hidden)
        if has_bias
    ]
    return ExpertWeights(gate, up, down, *biases)


def _scales_of(expert: ExpertWeights, fmt: WeightFormat) -> ScaleChoice:
    """Returns the choice of scales with which an expert was made."""
    if not (fmt.groups_vary or fmt.blocks):
        return USUAL_SCALES
    dtype, by_row = expert.up.given_scales.dtype, (1, expert.up.shape[-1])
    if expert.up.scale_grid == by_row:
        return ScaleChoice(dtype, by_row=True)
    return ScaleChoice(dtype, None if fmt.blocks else expert.up.group_size)


def _limited(count: int, limit: int | None) -> int:
    if limit is not None and limit < 1:
        raise ValueError(f"experts: must be at least 1, got {limit}")
    return count if limit is None else min(count, limit)
