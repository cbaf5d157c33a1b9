"""Packs a layer's experts from tensors that come one by one, in any order."""

from __future__ import annotations

from dataclasses import replace

import torch
from typing_extensions import Unpack

from cpumoe import _core
from cpumoe._base.scalars import boolean, integer
from cpumoe._engine.arguments import checked_biases, normalized, require_shape
from cpumoe._engine.config import checked_activation, layer_config
from cpumoe._engine.export import feature_range
from cpumoe._engine.packing import ExpertForm
from cpumoe._engine.shards import columns_of, rows_of
from cpumoe._engine.sources import InOrder
from cpumoe.checkpoint import ExpertWeights
from cpumoe.experts import Experts
from cpumoe.formats import QuantizedMatrix, weight_format
from cpumoe.isa import select_isa
from cpumoe.numerics.glu import GLU
from cpumoe.options import ExpertsKeywords, ExpertsOptions, with_overrides
from cpumoe.runtime import default_runtime


class ExpertsBuilder:
    """Packs the experts of one layer while their tensors arrive, in any order.

    An expert is packed as soon as it is complete, or a few experts later, so that each thread has
    one to pack. Then the builder lets go of the expert's tensors. Loading thus needs little more
    memory than the packed layer. With int4, the experts that are packed first decide which dtypes
    of scales the layer takes, as in `Experts`.

    A builder can take a shard of each expert, for tensor parallelism: some of the intermediate
    features, which are rows of gate and up and columns of down. `add` still gets whole matrices.
    The shards' results add up to the layer's. Give zeros as biases of down to all shards but one.

    Example::

        builder = cpumoe.ExpertsBuilder(
            format="mxfp4", num_experts=32, hidden_size=2880, intermediate_size=2880
        )
        for expert, projection, codes, scales in tensors:  # "gate", "up" or "down"
            builder.add(expert, projection, codes, scales)
        experts = builder.build()

    Args:
        format: the weight format, as in `Experts.from_tensors`.
        num_experts: number of experts.
        hidden_size: width of the hidden states.
        intermediate_size: inner width of a whole expert.
        activation: the activation, a `SwiGLU` or another `GLU`; default: plain ``silu(g) * u``.
        has_bias: whether the experts have biases.
        intermediate: the intermediate features to pack, whole groups of 32, and of the weights that
            share a scale. Default: all.
        options: threads, precision, variant and kernels; default: `ExpertsOptions()`.
        **overrides: fields of `ExpertsOptions` by name. They take precedence over `options`.

    Raises:
        TypeError: an argument is of another type.
        ValueError: the format is unknown, the engine does not support a size, `intermediate` has no
            whole groups, or this CPU cannot run the variant.
    """

    def __init__(
        self,
        *,
        format: str,
        num_experts: int,
        hidden_size: int,
        intermediate_size: int,
        activation: GLU | None = None,
        has_bias: bool = False,
        intermediate: slice | range | None = None,
        options: ExpertsOptions | None = None,
        **overrides: Unpack[ExpertsKeywords],
    ) -> None:
        """Checks the arguments. Nothing is packed yet."""
        self._options = with_overrides(options, overrides, "ExpertsBuilder")
        self._activation = checked_activation(activation)
        self._num_experts = integer(num_experts, "num_experts")
        self._has_bias = boolean(has_bias, "has_bias")
        self._form = ExpertForm(
            weight_format(format),
            integer(hidden_size, "hidden_size"),
            integer(intermediate_size, "intermediate_size"),
            self._activation.gated,
        )
        self._form.fmt.check_k(self._form.intermediate_size, "intermediate_size")
        self._features = feature_range(intermediate, self._form)
        config = layer_config(
            num_experts=self._num_experts,
            hidden_size=self._form.hidden_size,
            intermediate_size=len(self._features),
            activation=self._activation,
            has_bias=self._has_bias,
            precision=self._options.precision,
            batch_invariant=self._options.batch_invariant,
            few_token_limit=self._options.few_token_limit,
            copy_of=(),
        )
        isa, origin = select_isa(self._options.isa)
        # The engine refuses sizes and variants here, before the first tensor arrives.
        _core.Layer(isa=isa, origin=origin, format=self._form.fmt.name, config=config)
        self._arriving: dict[int, _Parts] = {}
        self._complete: dict[int, ExpertWeights] = {}  # not packed yet
        self._taken: set[int] = set()  # complete or packed
        self._experts: Experts | None = None
        self._built = False

    @property
    def waiting(self) -> int:
        """Number of experts that are complete and not packed yet: always fewer than threads.

        Tensors of experts that are packed may be changed or freed.
        """
        return len(self._complete)

    def add(
        self,
        expert: int,
        projection: str,
        codes: torch.Tensor | QuantizedMatrix | None = None,
        scales: torch.Tensor | None = None,
        factor: torch.Tensor | None = None,
        *,
        bias: torch.Tensor | None = None,
    ) -> None:
        """Takes tensors of one projection of an expert.

        The parts of a projection may come in several calls. Kind, dtype and shape of a part are
        checked when it comes. The tensors must stay unchanged until their expert is packed
        (`waiting`). If an argument is refused, the builder is as before. If packing fails, for
        example because a scale is NaN, make another builder.

        Args:
            expert: the expert's index in the layer.
            projection: "gate", "up" or "down". Experts without gate projections have no "gate".
            codes: gate and up ``[intermediate, hidden]``, down ``[hidden, intermediate]``, in the
                dtypes and packed shapes that `Experts.from_tensors` lists for one expert; or a
                `QuantizedMatrix`, which has all parts but the bias.
            scales: the scales of the codes, in the format's dtypes and shapes.
            factor: float32, one element (nvfp4).
            bias: ``[intermediate]``, or ``[hidden]`` for down, bf16, fp16 or fp32.

        Raises:
            TypeError: the format does not have a tensor's dtype or part, or a tensor is not in
                memory on the CPU.
            ValueError: there is no such projection, a part came before, shapes do not fit the
                layer, the chosen features cut a group, a scale is NaN, or no tensor is given.
            IndexError: there is no such expert.
            RuntimeError: `build` was called.
        """
        if self._built:
            raise RuntimeError("ExpertsBuilder: build was called; make another builder")
        index = integer(expert, "expert")
        if not 0 <= index < self._num_experts:
            raise IndexError(f"expert: expected 0..{self._num_experts - 1}, got {expert}")
        if projection not in self._form.projections:
            known = ", ".join(map(repr, self._form.projections))
            raise ValueError(f"projection: expected one of {known}, got {projection!r}")
        if isinstance(codes, QuantizedMatrix):
            if scales is not None or factor is not None:
                raise TypeError(
                    "codes: expected a tensor with scales or a factor beside it, got a "
                    "QuantizedMatrix; pass it alone"
                )
            scales, factor, codes = codes.scales, codes.factor, codes.codes
        given = {"codes": codes, "scales": scales, "factor": factor, "bias": bias}
        name = f"expert {index}: {projection}"
        present = {part: tensor for part, tensor in given.items() if tensor is not None}
        if not present:
            raise ValueError(f"{name}: expected codes, scales, factor or bias, got none of them")
        before = self._arriving.get(index, _Parts())
        parts = before.copy()
        for part, tensor in present.items():
            if index in self._taken or parts.has(projection, part):
                raise ValueError(f"{name} {part}: expected one tensor, got a second one")
            self._check_expected(name, part)
            if part != "bias":
                self._check_part(projection, part, tensor, f"{name} {part}")
            parts.tensors[projection, part] = tensor
        if "bias" in present:
            parts.biases[projection] = self._shard_of_bias(projection, present["bias"], name)
        wanted = self._wanted_parts
        if set(present) & set(wanted) and all(parts.has(projection, part) for part in wanted):
            matrix = QuantizedMatrix(*(parts.tensors[projection, part] for part in wanted))
            parts.matrices[projection] = self._shard_of(projection, matrix, name)
        self._arriving[index] = parts
        if not self._missing(parts):
            self._take(index, parts)

    def build(self) -> Experts:
        """Returns the packed layer. The builder takes no more tensors afterwards.

        Raises:
            ValueError: an expert lacks a part, or a scale is NaN.
            RuntimeError: `build` was called before, or the runtime is closed.
        """
        if self._built:
            raise RuntimeError("ExpertsBuilder: build was called before; make another builder")
        for expert in range(self._num_experts):
            if expert not in self._taken:
                missing = self._missing(self._arriving.get(expert, _Parts()))
                raise ValueError(
                    f"expert {expert}: expected all parts before build, got no "
                    f"{', '.join(missing)}; add them first"
                )
        self._pack()
        assert self._experts is not None
        self._experts.expert_mask = None
        self._built = True
        experts, self._experts = self._experts, None
        return experts

    @property
    def _wanted_parts(self) -> tuple[str, ...]:
        return ("codes", "scales", "factor")[: self._form.fmt.num_parts]

    def _check_expected(self, name: str, part: str) -> None:
        """Raises TypeError if no expert of the layer has such a part."""
        if part == "bias":
            if not self._has_bias:
                raise TypeError(f"{name} bias: expected None without has_bias=True, got a tensor")
        elif part not in self._wanted_parts:
            raise TypeError(f"{name} {part}: expected None in {self._form.fmt.name}, got a tensor")

    def _check_part(self, projection: str, part: str, tensor: torch.Tensor, name: str) -> None:
        """Checks what can be checked of a part without the others; see `add`."""
        fmt = self._form.fmt
        if part == "factor":
            fmt.normalize_factor(tensor, (), name)
            return
        rows, columns = self._shape(projection)
        if part == "codes":
            codes = fmt.normalize_codes(tensor, name)
            got = QuantizedMatrix(codes).shape
            require_shape(
                got,
                self._shape(projection),
                name.removesuffix(" codes"),
                "pass whole matrices of the layer's sizes",
            )
        else:
            scales = fmt.normalize_scales(tensor, name)
            assert scales is not None
            fmt.check_scale_shape((rows,), columns, scales, name.removesuffix(" scales"))

    def _shape(self, projection: str) -> tuple[int, int]:
        hidden, intermediate = self._form.hidden_size, self._form.intermediate_size
        return (hidden, intermediate) if projection == "down" else (intermediate, hidden)

    def _missing(self, parts: _Parts) -> list[str]:
        wanted = (*self._wanted_parts, "bias") if self._has_bias else self._wanted_parts
        return [
            f"{projection} {part}"
            for projection in self._form.projections
            for part in wanted
            if not parts.has(projection, part)
        ]

    def _shard_of(self, projection: str, matrix: QuantizedMatrix, name: str) -> QuantizedMatrix:
        """Returns the chosen features of a projection, checked and named."""
        form, features = self._form, self._features
        matrix = normalized(form.fmt, matrix, name, stacked=False)
        if len(features) == form.intermediate_size:
            return matrix
        shard = (columns_of if projection == "down" else rows_of)(matrix, features)
        return replace(shard, name=name)

    def _shard_of_bias(self, projection: str, bias: torch.Tensor, name: str) -> torch.Tensor:
        is_down = projection == "down"
        width = self._form.hidden_size if is_down else self._form.intermediate_size
        (checked,) = checked_biases([bias], {f"{name} bias": width})
        return checked if is_down else checked[self._features.start : self._features.stop]

    def _take(self, expert: int, parts: _Parts) -> None:
        """Packs an expert that is complete, if there are enough for all threads."""
        matrices = parts.matrices
        biases = {f"{name}_bias": bias for name, bias in parts.biases.items()}
        gate = matrices.get("gate", matrices["up"])
        weights = ExpertWeights(gate, matrices["up"], matrices["down"], **biases)
        del self._arriving[expert]
        self._complete[expert] = weights
        self._taken.add(expert)
        runtime = self._options.runtime or default_runtime()
        if len(self._complete) >= runtime.threads:
            self._pack()

    def _pack(self) -> None:
        if not self._complete:
            return
        if self._experts is None:
            # Masked experts need no weights, so the layer can be made before all have come.
            self._experts = Experts(
                InOrder(self._complete.values(), self._num_experts),
                format=self._form.fmt.name,
                num_experts=self._num_experts,
                hidden_size=self._form.hidden_size,
                intermediate_size=len(self._features),
                activation=self._activation,
                has_bias=self._has_bias,
                expert_mask=torch.ones(self._num_experts, dtype=torch.bool, device="cpu"),
                pack_masked=False,
                options=self._options,
            )
        self._experts.pack(list(self._complete), self._complete.__getitem__)
        self._complete.clear()


class _Parts:
    """What has come of an expert."""

    def __init__(self) -> None:
        self.tensors: dict[tuple[str, str], torch.Tensor] = {}  # by projection and part
        self.matrices: dict[str, QuantizedMatrix] = {}  # complete ones, by projection
        self.biases: dict[str, torch.Tensor] = {}

    def copy(self) -> _Parts:
        made = _Parts()
        made.tensors, made.matrices = dict(self.tensors), dict(self.matrices)
        made.biases = dict(self.biases)
        return made

    def has(self, projection: str, part: str) -> bool:
        return (projection, part) in self.tensors
