"""Experts as most families publish them: numbers without scales, in bf16, fp16 or fp32.

`LAYOUTS` lists where such checkpoints keep gate, up and down. A matrix is ``[N, K]`` with N output
rows. A family has either a tensor for each expert's projection, or one tensor that stacks all
experts of a layer. Where gate and up share a tensor, their rows follow each other (all of gate,
then all of up) or alternate (gate 0, up 0, gate 1, ...).

Experts have the format fp16 if the first of them does, and bf16 otherwise. Rows in the format's
dtype are views of the mapped file. There are two copies, of one expert at a time:

- Some families store the transposed matrix ``[K, N]``. The shapes of both tensors of a layer show
  it: ``[2I, H]`` and ``[H, I]``, or ``[H, 2I]`` and ``[I, H]``, cannot be equal.
- Among bf16 experts, fp16 and fp32 weights become bf16 if they are bf16 numbers. Others are
  refused.

Sources: transformers 5.23 ``conversion_mapping.py``, and the modeling files of the families.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from typing_extensions import override

from cpumoe._base.tensors import dtype_name
from cpumoe.checkpoint.config import MoeConfig
from cpumoe.checkpoint.files import shown
from cpumoe.checkpoint.gpt_oss import MODEL_TYPE as GPT_OSS
from cpumoe.checkpoint.header import TORCH_DTYPES
from cpumoe.checkpoint.reader import (
    LAYER,
    MODEL,
    OUTPUT_NORM,
    VISION_EXPERTS,
    ExpectedTensor,
    ExpertReader,
    ExpertsInfo,
    ExpertWeights,
    UnsupportedFormatError,
)
from cpumoe.checkpoint.shards import SafetensorsFolder
from cpumoe.formats import QuantizedMatrix

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# Accepted dtypes of weights in each format.
_WEIGHT_DTYPES = {"bf16": _DTYPES, "fp16": (torch.float16,)}
_EXPERTS = r"(?:\w+\.)?(?:text_moe\.)?experts\."
_NUMBER = "{}"


class _Layout(NamedTuple):
    """Names of a layer's tensors.

    Attributes:
        prefix: pattern of what lies between ``layers.3.`` and the names below.
        gate: name of the gate projections. ``{}`` is the expert's number. A name without it
            belongs to a tensor that stacks all experts.
        up: name of the up projections. If it is that of `gate`, the two share a tensor.
        down: name of the down projections.
        alternating: whether rows of gate and up alternate in their tensor.
        without_gate: whether experts have no gate projection. `gate` is then the name of up.
        model_types: the values of ``model_type`` that have this layout; empty: any.
    """

    prefix: str
    gate: str
    up: str
    down: str
    alternating: bool = False
    without_gate: bool = False
    model_types: tuple[str, ...] = ()

    @property
    def is_stacked(self) -> bool:
        """Whether a tensor holds all experts of a layer."""
        return _NUMBER not in self.gate

    @property
    def is_fused(self) -> bool:
        """Whether gate and up share a tensor."""
        return self.gate == self.up and not self.without_gate


LAYOUTS = (
    _Layout(
        _EXPERTS, "{}.up_proj.weight", "{}.up_proj.weight", "{}.down_proj.weight",
        without_gate=True, model_types=("nemotron_h",),
    ),
    # Qwen, DeepSeek, GLM, OLMoE, Ernie and most others
    _Layout(_EXPERTS, "{}.gate_proj.weight", "{}.up_proj.weight", "{}.down_proj.weight"),
    # Mixtral, MiniMax, Kimi-Linear, Phi, LFM2
    _Layout(_EXPERTS, "{}.w1.weight", "{}.w3.weight", "{}.w2.weight"),
    _Layout(
        _EXPERTS, "gate_up_proj", "gate_up_proj", "down_proj", alternating=True,
        model_types=(GPT_OSS,),
    ),
    # Qwen3-VL, Qwen3.5, Gemma and other families that use transformers' own form
    _Layout(_EXPERTS, "gate_up_proj", "gate_up_proj", "down_proj"),
    _Layout(_EXPERTS, "w13_weight", "w13_weight", "w2_weight", alternating=True),  # Inkling
    _Layout(_EXPERTS, "fc1.weight", "fc1.weight", "fc2.weight"),  # Aria
    _Layout(  # Granite
        r"block_sparse_moe\.", "input_linear.weight", "input_linear.weight", "output_linear.weight"
    ),
    _Layout(r"moe\.", "gate_proj.weight", "up_proj.weight", "down_proj.weight"),  # Step 3.7
)  # fmt: skip


def _pattern(name: str) -> str:
    return re.escape(name).replace(re.escape(_NUMBER), "[0-9]+")


# By the up projections, because some experts have no gate.
_UPS = "|".join(f"{layout.prefix}(?={_pattern(layout.up)}$)" for layout in LAYOUTS)
# Ends of the names of quantized experts' tensors.
_QUANTIZED = (
    "_packed", "_scale", "_scale_inv", "_blocks", ".scale", ".scales", "qweight", ".absmax",
)  # fmt: skip
# Tensors below ``experts.`` that belong to the router.
_ROUTERS = ("e_score_correction_bias",)


@dataclass(frozen=True)
class _Part:
    """Where an expert's gate, up or down lies.

    Attributes:
        weights: the tensor that holds it.
        bias: the tensor that holds its bias.
        index: the expert's place in a stack; None: the tensor is the expert's alone.
        rows: the matrix' rows ``[N, K]`` within the tensor's.
        transposed: whether the tensor has the transposed matrix.
    """

    weights: ExpectedTensor
    bias: ExpectedTensor
    index: int | None
    rows: slice
    transposed: bool

    @property
    def label(self) -> str:
        """The name in messages."""
        return self.weights[0] if self.index is None else f"{self.weights[0]}[{self.index}]"


class PublishedReader(ExpertReader):
    """Reads experts that are not quantized. The module's documentation says how they lie."""

    _EXPERT = re.compile(rf"(?P<prefix>{MODEL}layers\.{LAYER}\.(?:{_UPS}))")

    def __init__(
        self,
        folder: SafetensorsFolder,
        config: MoeConfig,
        info: ExpertsInfo,
        layers: Collection[int] | None = None,
    ) -> None:
        """Opens the experts; see `ExpertReader`."""
        super().__init__(folder, config, info, layers)
        if not self.unsupported:
            if self.output_norm is not None:
                self.activation = None  # whoever names it computes the norm
            self.has_bias = any(map(self._biases_in, self._prefixes.values()))

    def _biases_in(self, prefix: str) -> bool:
        """Whether a layer's first expert has any bias, so that it needs all three."""
        layout = _layout_of(self.folder, self.config, prefix)
        names = (layout.gate, layout.up, layout.down)
        return any(_bias_name(f"{prefix}{name.format(0)}") in self.folder for name in names)

    @override
    @classmethod
    def open(
        cls,
        folder: SafetensorsFolder,
        config: MoeConfig,
        layers: Collection[int] | None = None,
    ) -> ExpertReader:
        """Opens the experts of some layers, or of all; see `ExpertReader.open`."""
        matches = (
            match
            for match in filter(None, map(cls._EXPERT.match, folder.names()))
            if layers is None or int(match["layer"]) in layers
        )
        first = next(matches, None)
        fmt = "bf16"
        if first is None:
            reason: str | None = "no tensor of an unquantized expert has a known name"
        else:
            prefix = first["prefix"]
            reason = _unsupported(folder, prefix, _layout_of(folder, config, prefix))
            if reason is None and _is_fp16(folder, first.string):
                fmt = "fp16"
        return cls(folder, config, ExpertsInfo(fmt, (reason,) if reason else ()), layers)

    @override
    def of_module(self, name: str) -> ExpertReader:
        """Returns the reader of one of two lists of experts; see `ExpertReader.of_module`."""
        inner = self.config.vision_intermediate_size
        if inner is None or VISION_EXPERTS not in name:
            return super().of_module(name)
        config = dataclasses.replace(self.config, intermediate_size=inner)
        vision = _VisionReader(self.folder, config, ExpertsInfo(self.format), self._only)
        vision.module = name
        return vision

    @override
    @classmethod
    def matches(cls, folder: SafetensorsFolder, config: MoeConfig) -> bool:
        """Whether experts have known names, and none of them is quantized."""
        names = folder.names()
        return any(map(cls._EXPERT.match, names)) and not any(
            name.endswith(_QUANTIZED) and ".experts." in name for name in names
        )

    @override
    def tensor_names(self) -> dict[int, list[str]]:
        """Returns the names of each layer's expert tensors, without those of its router."""
        found = {}
        for layer, names in super().tensor_names().items():
            prefix = self._prefixes[layer]
            is_known = _known_names(_layout_of(self.folder, self.config, prefix)).fullmatch
            found[layer] = [name for name in names if is_known(name.removeprefix(prefix))]
        return found

    def _first_of(self, prefix: str) -> int:
        """The number that a layer's first expert has in the names of tensors."""
        return 0

    @override
    def _expert_tensors(self, prefix: str, index: int) -> Iterator[ExpectedTensor]:
        parts = self._parts(prefix, index)
        yield from {part.weights[0]: part.weights for part in parts}.values()
        if self.has_bias:
            yield from {part.bias[0]: part.bias for part in parts}.values()

    @override
    def _read_expert(self, prefix: str, index: int) -> ExpertWeights:
        parts = self._parts(prefix, index)
        biases = [self._read_bias(part) for part in parts] if self.has_bias else []
        without_gate = parts[0] == parts[1]
        *gate, up, down = map(self._read_matrix, parts[without_gate:])
        return ExpertWeights(gate[0] if gate else up, up, down, *biases)

    def _parts(self, prefix: str, index: int) -> list[_Part]:
        """Returns the parts of gate, up and down."""
        index += self._first_of(prefix)
        layout = _layout_of(self.folder, self.config, prefix, index)
        inner = self.intermediate_size
        rows = [slice(0, inner), slice(0, inner), slice(0, self.hidden_size)]
        sizes = list(self._projection_sizes())
        if layout.is_fused:
            alternating = slice(0, None, 2), slice(1, None, 2)
            rows[:2] = alternating if layout.alternating else (rows[0], slice(inner, None))
            sizes[:2] = 2 * [(2 * inner, self.hidden_size)]
        transposed = layout.is_fused and self._is_transposed(prefix, layout, sizes)
        parts = []
        names = (layout.gate, layout.up, layout.down)
        for name, (n, k), chosen in zip(names, sizes, rows, strict=True):
            tensor = f"{prefix}{name.format(index)}"
            stack = (self.num_experts,) if layout.is_stacked else ()
            shape = (*stack, k, n) if transposed else (*stack, n, k)
            parts.append(
                _Part(
                    weights=(tensor, _WEIGHT_DTYPES[self.format], shape),
                    bias=(_bias_name(tensor), _DTYPES, (*stack, n)),
                    index=index if layout.is_stacked else None,
                    rows=chosen,
                    transposed=transposed,
                )
            )
        return parts

    def _is_transposed(self, prefix: str, layout: _Layout, sizes: list[tuple[int, int]]) -> bool:
        shapes = [
            self.folder.info(f"{prefix}{name}").shape[-2:]
            if f"{prefix}{name}" in self.folder
            else ()
            for name in (layout.up, layout.down)
        ]
        return shapes == [(k, n) for n, k in sizes[1:]]

    def _read_matrix(self, part: _Part) -> QuantizedMatrix:
        tensor = self.folder.tensor(*part.weights)
        matrix = tensor if part.index is None else tensor[part.index]
        rows = (matrix.T if part.transposed else matrix)[part.rows]
        codes = rows if self.format == "fp16" else _as_bf16(rows, part.label)
        return QuantizedMatrix(codes.contiguous() if part.transposed else codes, name=part.label)

    def _read_bias(self, part: _Part) -> torch.Tensor:
        tensor = self.folder.tensor(*part.bias)
        bias = tensor if part.index is None else tensor[part.index]
        return bias[part.rows].contiguous()


class _VisionReader(PublishedReader):
    """Reads experts for the tokens of images.

    They have a prefix of their own, or their numbers follow those of the experts for text.
    """

    _EXPERT = re.compile(PublishedReader._EXPERT.pattern.replace("text_moe", "vision_moe"))

    @override
    def _first_of(self, prefix: str) -> int:
        return 0 if VISION_EXPERTS in prefix else self.num_experts


def _layout_of(
    folder: SafetensorsFolder, config: MoeConfig, prefix: str, index: int = 0
) -> _Layout:
    """Returns the layout of a layer's experts, by the names of one expert's tensors."""
    fitting = [
        layout
        for layout in LAYOUTS
        if not layout.model_types or config.model_type in layout.model_types
    ]
    for layout in fitting:
        names = (layout.gate, layout.up, layout.down)
        if any(f"{prefix}{name.format(index)}" in folder for name in names):
            return layout
    # The files have no tensor of the expert. The error names the one of the first layout.
    return fitting[0] if index == 0 else _layout_of(folder, config, prefix)


def _is_fp16(folder: SafetensorsFolder, tensor: str) -> bool:
    try:
        return TORCH_DTYPES.get(folder.info(tensor).dtype) == torch.float16
    except FileNotFoundError:  # whoever reads the tensor is told
        return False


def _unsupported(folder: SafetensorsFolder, prefix: str, layout: _Layout) -> str | None:
    """Returns a reason why cpumoe cannot compute experts with these tensors, by their names."""
    names = [name for name in folder.names() if name.startswith(prefix)]
    gate = layout.gate.replace(_NUMBER, "")
    if not any(name.endswith(gate) for name in names):
        return f"experts without a gate projection are not supported: {shown(min(names))}"
    if not prefix.endswith(".experts."):  # the router's tensors have the prefix as well
        return None
    is_known = _known_names(layout).fullmatch
    rest = ((name, name.removeprefix(prefix)) for name in names)
    unknown = [
        name for name, end in rest if end not in (*_ROUTERS, OUTPUT_NORM) and not is_known(end)
    ]
    return f"experts with {shown(min(unknown))} are not supported" if unknown else None


def _known_names(layout: _Layout) -> re.Pattern[str]:
    """Returns a pattern of the names of experts' tensors, without their prefix."""
    weights = {layout.gate, layout.up, layout.down}
    return re.compile("|".join(map(_pattern, weights.union(map(_bias_name, weights)))))


def _bias_name(tensor: str) -> str:
    stem = tensor.removesuffix(".weight")
    return f"{tensor}_bias" if stem == tensor else f"{stem}.bias"


def _as_bf16(weights: torch.Tensor, name: str) -> torch.Tensor:
    """Returns weights in bf16, as a view if they are.

    Raises:
        UnsupportedFormatError: a weight is no bf16 number.
    """
    if weights.dtype == torch.bfloat16:
        return weights
    rounded = weights.to(torch.bfloat16)
    if torch.equal(rounded.to(weights.dtype), weights):
        return rounded
    other = weights[rounded.to(weights.dtype) != weights]
    raise UnsupportedFormatError(
        f"{shown(name)}: expected weights that are bf16 numbers, got {dtype_name(weights.dtype)} "
        f"with {other.numel()} of {weights.numel()} that are not, such as {other[0].item()}; "
        f"cpumoe does not round weights: convert the checkpoint to bfloat16 or quantize it"
    )
