"""The interface that every checkpoint reader implements."""

from __future__ import annotations

import itertools
import re
from abc import ABC, abstractmethod
from bisect import bisect_left
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from types import TracebackType
from typing import ClassVar

import torch

from cpumoe._base.renamed import old_attribute
from cpumoe._base.scalars import integer
from cpumoe.checkpoint.activations import activation_of
from cpumoe.checkpoint.config import MoeConfig
from cpumoe.checkpoint.files import CheckpointError, shown, shown_value
from cpumoe.checkpoint.header import TORCH_DTYPES
from cpumoe.checkpoint.shards import SafetensorsFolder
from cpumoe.formats import WEIGHT_FORMATS, QuantizedMatrix, WeightFormat
from cpumoe.formats.quantized_matrix import BLOCK
from cpumoe.numerics.glu import GLU

# A tensor's name, accepted dtypes and shape: the arguments of `SafetensorsFolder.tensor`.
ExpectedTensor = tuple[str, Collection[torch.dtype], tuple[int, ...]]

# The names before ``layers.3.``: none, or those of the language model within a larger model.
MODEL = r"(?:(?:language_)?model\.|backbone\.|llm\.|thinker\.)*"
LAYER = r"(?P<layer>[0-9]{1,9})"
# Any tensor of a layer, with transformers' or OpenAI's name.
_OF_A_LAYER = re.compile(rf"(?:^|\.)(?:layers|block)\.{LAYER}\.")


# A norm of each expert's output, which all experts of a layer share.
OUTPUT_NORM = "post_expert_norm.weight"
# Part of the names of modules with experts for the tokens of images, in ERNIE 4.5 VL.
VISION_EXPERTS = ".vision_moe."

# Group sizes that stand for a row of any length, and for a whole matrix.
WHOLE_ROW, WHOLE_MATRIX = -1, -2


class UnsupportedFormatError(CheckpointError):
    """The checkpoint is sound, but its experts' format (or activation) is not supported."""


@dataclass(frozen=True)
class ExpertWeights:
    """One routed expert, as views of the mapped checkpoint.

    Attributes:
        gate: ``[intermediate, hidden]``; rows may be strided. Without a gate projection
            (``GLU(gated=False)``), it is `up`, and nothing reads it.
        up: ``[intermediate, hidden]``; rows may be strided.
        down: ``[hidden, intermediate]``.
        gate_bias: ``[intermediate]`` or None.
        up_bias: ``[intermediate]`` or None.
        down_bias: ``[hidden]`` or None.
    """

    gate: QuantizedMatrix
    up: QuantizedMatrix
    down: QuantizedMatrix
    gate_bias: torch.Tensor | None = None
    up_bias: torch.Tensor | None = None
    down_bias: torch.Tensor | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of weights and scales, without biases."""
        gate = 0 if self.gate is self.up else self.gate.nbytes
        return gate + self.up.nbytes + self.down.nbytes


@dataclass(frozen=True)
class ExpertsInfo:
    """The form of experts, according to a checkpoint's config and names.

    Attributes:
        format: name of the experts' weight format, supported or not.
        unsupported: reasons why the experts cannot be read; empty if they can.
        group_size: successive weights of a row that share a scale; None: the format's usual number;
            `WHOLE_ROW`: all of them; `WHOLE_MATRIX`: all rows share one scale.
    """

    format: str
    unsupported: tuple[str, ...] = ()
    group_size: int | None = None


class ExpertReader(ABC):
    """Reads the routed experts of one kind of checkpoint.

    A subclass recognizes its checkpoints in `matches`, finds the form of their experts in `open`,
    finds experts by `_EXPERT`, and reads them in `_expert_tensors` and `_read_expert`.
    `open_checkpoint` picks the subclass from the registry.

    Attributes:
        folder: the checkpoint's tensors.
        config: the sizes from config.json.
        format: name of the experts' weight format, supported or not. If layers differ, it has the
            names of all their formats, joined by ``+``; see `layer_format`.
        unsupported: reasons why `expert` refuses; empty if the checkpoint is supported.
        activation: the experts' activation; None: config.json does not specify it. It is
            meaningless if `unsupported` is not empty.
        model_type: model_type of the checkpoint.
        num_experts: number of routed experts per layer.
        top_k: number of routed experts per token.
        hidden_size: width of an expert's input and output.
        intermediate_size: inner width of one expert.
        has_bias: whether the experts have biases.
        module: name of the module whose experts these are, if layers have several lists of them.
    """

    has_bias = False
    module = ""
    # Matches the beginning of an expert tensor's name. Group ``prefix`` is the common beginning of
    # the names of all experts of group ``layer``.
    _EXPERT: ClassVar[re.Pattern[str]]

    def __init__(
        self,
        folder: SafetensorsFolder,
        config: MoeConfig,
        info: ExpertsInfo,
        layers: Collection[int] | None = None,
    ) -> None:
        """Opens experts of `folder` that have the form `info`.

        Args:
            folder: the checkpoint.
            config: the sizes from config.json.
            info: the experts' form.
            layers: the layers whose experts have this form; None: all.
        """
        found = activation_of(config)
        self.folder = folder
        self.config = config
        self.format = info.format
        self.unsupported = tuple(dict.fromkeys(info.unsupported + found.unsupported))
        self.activation = found.glu
        self._group_size = info.group_size
        self._only = layers
        self.model_type = config.model_type
        self.num_experts = config.num_experts
        self.top_k = config.top_k
        self.hidden_size = config.hidden_size
        self.intermediate_size = config.intermediate_size
        if not self.unsupported:
            self._check_sizes()

    @classmethod
    @abstractmethod
    def matches(cls, folder: SafetensorsFolder, config: MoeConfig) -> bool:
        """Whether this reader is the one for the checkpoint."""

    @classmethod
    @abstractmethod
    def open(cls, folder: SafetensorsFolder, config: MoeConfig) -> ExpertReader:
        """Opens the experts of a checkpoint that this reader matches, supported or not."""

    @abstractmethod
    def _expert_tensors(self, prefix: str, index: int) -> Iterator[ExpectedTensor]:
        """Yields an expert's tensors, as config.json implies, in a supported checkpoint."""

    @abstractmethod
    def _read_expert(self, prefix: str, index: int) -> ExpertWeights:
        """Reads an expert of a supported checkpoint; `_EXPERT` explains `prefix`."""

    @classmethod
    def _layer_and_prefix(cls, tensor: str) -> tuple[int, str] | None:
        """Returns layer and prefix of an expert's tensor; None: it belongs to no expert."""
        match = cls._EXPERT.match(tensor)
        return (int(match["layer"]), match["prefix"]) if match else None

    def layers(self) -> list[int]:
        """Returns the layers that have routed experts, ascending."""
        return list(self._prefixes)

    def layer_format(self, layer: int) -> str:
        """Returns the name of the weight format of a layer's experts, supported or not.

        Raises:
            TypeError: `layer` is not an int.
            IndexError: there is no such layer.
        """
        self._prefix(layer)
        return self.format

    def tensor_names(self) -> dict[int, list[str]]:
        """Returns the names of each layer's expert tensors, supported or not."""
        names = sorted(self.folder.names())

        def starting_with(prefix: str) -> list[str]:
            # By index, because `islice` would walk to the beginning of its range.
            rest = (names[i] for i in range(bisect_left(names, prefix), len(names)))
            return list(itertools.takewhile(lambda name: name.startswith(prefix), rest))

        return {layer: starting_with(prefix) for layer, prefix in self._prefixes.items()}

    def expert(self, layer: int, index: int, *, check_scales: bool = True) -> ExpertWeights:
        """Returns expert `index` of `layer` as views of the mapped file.

        Args:
            layer: index of the decoder layer.
            index: index of the expert.
            check_scales: whether to refuse NaN scales, which reads all scales. Pass False if they
                are checked later, as packing does.

        Raises:
            UnsupportedFormatError: see `unsupported`.
            TypeError: `layer` or `index` is not an int.
            IndexError: there is no such layer or expert.
            FileNotFoundError: a shard is missing.
            OSError: a shard cannot be read or mapped.
            CheckpointError: a shard is damaged, or a tensor is missing or has a wrong dtype or
                shape.
            ValueError: a scale is NaN, or the checkpoint is closed.
        """
        prefix = self._supported_prefix(layer)
        index = integer(index, "index")
        if not 0 <= index < self.num_experts:
            raise IndexError(
                f"layer {layer}: expected expert 0..{self.num_experts - 1}, got {index}"
            )
        weights = self._read_expert(prefix, index)
        if check_scales:
            fmt = WEIGHT_FORMATS[self.layer_format(layer)]
            for matrix in (weights.gate, weights.up, weights.down):
                fmt.check_scales(matrix.scales, matrix.name)
        return weights

    def scale_dtypes(self, layer: int, experts: Iterable[int]) -> set[torch.dtype]:
        """Returns the dtypes of the scales of a layer's experts, from the shards' headers.

        Errors are those of `check_layer`.
        """
        prefix = self._supported_prefix(layer)
        accepted = WEIGHT_FORMATS[self.layer_format(layer)].scale_dtypes
        names = (
            name
            for index in set(experts)
            for name, dtypes, _ in self._expert_tensors(prefix, index)
            if dtypes is accepted  # and so the tensor has scales
        )
        found = {self.folder.info(name).dtype for name in names}
        return {TORCH_DTYPES[name] for name in found if name in TORCH_DTYPES}

    def check_supported(self) -> None:
        """Raises UnsupportedFormatError if `unsupported` has reasons."""
        if self.unsupported:
            raise UnsupportedFormatError(
                f"{self.folder.path}: {self.format} experts: {'; '.join(self.unsupported)}. "
                f"Supported formats: {', '.join(WEIGHT_FORMATS)}"
            )

    def check_depth(self) -> None:
        """Checks, before a model is built, that the files have all layers of the config.

        Raises:
            CheckpointError: no tensor belongs to the last layer.
        """
        numbers = (_OF_A_LAYER.search(name) for name in self.folder.names())
        found = max((int(match["layer"]) for match in numbers if match), default=-1) + 1
        if found < self.config.num_hidden_layers:
            raise CheckpointError(
                f"{self.folder.path}: config.json: num_hidden_layers: expected at most {found}, as "
                f"the weights have, got {shown_value(self.config.num_hidden_layers)}"
            )

    @cached_property
    def output_norm(self) -> str | None:
        """Name of a norm of each expert's output before outputs are added; None: there is none.

        Layers of cpumoe do not compute it.
        """
        norms = (f"{prefix}{OUTPUT_NORM}" for prefix in self._prefixes.values())
        return next(filter(self.folder.__contains__, norms), None)

    def of_module(self, name: str) -> ExpertReader:
        """Returns the reader for the experts of a transformers model's module `name`.

        Most families have one list of experts in a layer, and the same reader for any name. ERNIE
        4.5 VL has a second one for the tokens of images, in modules ``vision_moe``.

        Raises:
            UnsupportedFormatError: the reader cannot read experts for the tokens of images.
        """
        if self.config.vision_intermediate_size is not None and VISION_EXPERTS in name:
            raise UnsupportedFormatError(
                f"{self.folder.path}: {name}: experts for the tokens of images are supported only "
                f"in checkpoints that are not quantized, not in {self.format}"
            )
        return self

    def known_activation(self) -> GLU:
        """Returns the experts' activation.

        Raises:
            UnsupportedFormatError: config.json does not specify it, or each expert's output passes
                a norm.
        """
        if self.output_norm is not None:
            raise UnsupportedFormatError(
                f"{self.folder.path}: {shown(self.output_norm)}: a norm of each expert's output is "
                f"not part of a layer; load the whole model with "
                f"cpumoe.integrations.transformers.from_pretrained, or pass activation= and give "
                f"the layer one expert per token"
            )
        if self.activation is None:
            raise UnsupportedFormatError(
                f"{self.folder.path}: config.json does not specify the activation of model_type "
                f"{shown_value(self.model_type)}; pass activation= to cpumoe.Experts, such as "
                f"cpumoe.SwiGLU() for silu(gate) * up"
            )
        return self.activation

    swiglu = old_attribute("ExpertReader", "swiglu", "activation")
    known_swiglu = old_attribute("ExpertReader", "known_swiglu", "known_activation")

    def check_layer(self, layer: int) -> None:
        """Compares a layer's first and last expert with the config, from the shards' headers.

        The check is cheap. It allows a caller to allocate memory by the config's sizes.

        Raises:
            UnsupportedFormatError: see `unsupported`.
            TypeError: `layer` is not an int.
            IndexError: there is no such layer.
            FileNotFoundError: a shard is missing.
            OSError: a shard cannot be read or mapped.
            CheckpointError: a shard is damaged, or a tensor is missing or has a wrong dtype or
                shape.
            ValueError: the checkpoint is closed.
        """
        prefix = self._supported_prefix(layer)
        for index in (0, self.num_experts - 1):
            try:
                for expected in self._expert_tensors(prefix, index):
                    self.folder.check(*expected)
            except CheckpointError as error:
                raise CheckpointError(
                    f"{error}; config.json: {self.num_experts} experts, hidden size "
                    f"{self.hidden_size}, intermediate size {self.intermediate_size}"
                ) from error

    def _supported_prefix(self, layer: int) -> str:
        self.check_supported()
        return self._prefix(layer)

    def _prefix(self, layer: int) -> str:
        layer = integer(layer, "layer")
        if layer not in self._prefixes:
            layers = list(self._prefixes)
            has = f"layers {layers[0]}..{layers[-1]} have" if layers else "no layer has"
            raise IndexError(f"layer {layer} has no routed experts in {self.folder.path}; {has}")
        return self._prefixes[layer]

    def close(self) -> None:
        """Closes the checkpoint's files. Tensors that were read stay valid."""
        self.folder.close()

    def __enter__(self) -> ExpertReader:
        """Returns itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Closes the reader."""
        self.close()

    @property
    def _weight_format(self) -> WeightFormat:
        return WEIGHT_FORMATS[self.format]

    def group_size(self, layer: int, k: int) -> int:
        """Returns how many successive weights of a row of `k` share a scale; 0: none does.

        Raises:
            TypeError: `layer` is not an int.
            IndexError: there is no such layer.
        """
        self._prefix(layer)
        if self._group_size in (WHOLE_ROW, WHOLE_MATRIX):
            return k
        return self._group_size or self._weight_format.group_size

    def scales_by_row(self, layer: int) -> bool:
        """Returns whether each row of a layer's matrices has one scale, or all rows share one.

        Raises:
            TypeError: `layer` is not an int.
            IndexError: there is no such layer.
        """
        self._prefix(layer)
        return self._group_size in (WHOLE_ROW, WHOLE_MATRIX)

    def _check_sizes(self) -> None:
        """Checks that the format allows the config's sizes."""
        for name in ("hidden_size", "intermediate_size"):
            k = getattr(self, name)
            self._weight_format.check_k(k, name)
            group = self._group_size or 0
            if group > 0 and not self._weight_format.has_groups(k, group):
                raise CheckpointError(
                    f"{self.folder.path}: config.json: {name}: expected a multiple of the group "
                    f"size {group}, got {k}"
                )

    def _scale_shape(self, name: str, n: int, k: int) -> tuple[int, ...]:
        """The shape of the scales `name` of weights ``[n, k]``."""
        fmt = self._weight_format
        if self._group_size == WHOLE_MATRIX:
            return self._scalar_shape(name)
        if self._group_size == WHOLE_ROW:
            return n, 1
        if fmt.blocks:
            return -(-n // BLOCK), -(-k // BLOCK)
        return n, -(-k // (self._group_size or fmt.group_size))

    def _scalar_shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor of one number, which checkpoints write as ``[]`` or ``[1]``."""
        return (1,) if self.folder.info(name).shape == (1,) else ()

    def _code_and_scale_tensors(
        self, codes: tuple[str, int, int], scales: str, code_dtypes: tuple[torch.dtype, ...] = ()
    ) -> tuple[ExpectedTensor, ExpectedTensor]:
        """Returns the tensors of a matrix in one of the formats that have scales.

        Args:
            codes: the name of the codes, and N and K of the weights.
            scales: the name of the scales.
            code_dtypes: the dtypes that codes may have; default: those of the format.
        """
        fmt = self._weight_format
        name, n, k = codes
        dtypes = code_dtypes or fmt.code_dtypes
        columns = -(-k * fmt.code_bits // (8 * dtypes[0].itemsize))
        return (name, dtypes, (n, columns)), (
            scales,
            fmt.scale_dtypes,
            self._scale_shape(scales, n, k),
        )

    def _read_pair(
        self, codes: ExpectedTensor, scales: ExpectedTensor, factor: torch.Tensor | None = None
    ) -> QuantizedMatrix:
        """Reads a matrix from its codes and scales, and a factor of all its weights."""
        matrix = self.folder.tensor(*codes)
        factors = self.folder.tensor(*scales)
        if self._group_size == WHOLE_MATRIX:  # each row gets a copy
            factors = factors.reshape(1, 1).repeat(matrix.shape[0], 1)
        return self._matrix(matrix, factors, codes[0], scales[0], factor)

    @cached_property
    def _prefixes(self) -> dict[int, str]:
        # From the tensors, because the config may claim any number of layers.
        prefixes: dict[int, str] = {}
        for layer, prefix in filter(None, map(self._layer_and_prefix, self.folder.names())):
            if layer >= self.config.num_hidden_layers:  # for multi-token prediction
                continue
            if self._only is not None and layer not in self._only:
                continue
            other = prefixes.setdefault(layer, prefix)
            if other != prefix:
                raise CheckpointError(
                    f"{self.folder.path}: layer {layer}: expected one prefix of experts' names, "
                    f"got {shown(other)} and {shown(prefix)}"
                )
        return dict(sorted(prefixes.items()))

    def _projection_sizes(self) -> tuple[tuple[int, int], tuple[int, int], tuple[int, int]]:
        """[N, K] of gate, up and down."""
        hidden, inner = self.hidden_size, self.intermediate_size
        return (inner, hidden), (inner, hidden), (hidden, inner)

    def _matrix(
        self,
        codes: torch.Tensor,
        scales: torch.Tensor,
        codes_name: str,
        scales_name: str,
        factor: torch.Tensor | None = None,
    ) -> QuantizedMatrix:
        """Normalizes one matrix."""
        fmt = self._weight_format
        return QuantizedMatrix(
            fmt.normalize_codes(codes, codes_name),
            fmt.normalize_scales(scales, scales_name),
            factor,
            name=scales_name,
        )
