"""gpt-oss: MXFP4 experts, all of a layer in one tensor.

There are two layouts, whose tensors have equal content:

- transformers': ``model.layers.{L}.mlp.experts.{gate_up,down}_proj_{blocks,scales,bias}``.
- OpenAI's, in the folder ``original`` of the published checkpoints:
  ``block.{L}.mlp.{mlp1,mlp2}_{weight.blocks,weight.scales,bias}``. Its config.json names neither
  model type nor quantization.

Blocks are uint8 (or float4_e2m1fn_x2) ``[experts, N, K/32, 16]``, scales uint8 ``[experts, N,
K/32]``, and biases bf16, fp16 or fp32 ``[experts, N]``. Rows of the first projection are
interleaved: gate 0, up 0, gate 1, up 1, ... Sources: transformers 5.23 ``integrations/mxfp4.py``
and ``gpt_oss``; openai/gpt-oss ``torch/weights.py`` and ``torch/model.py``.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from typing import NamedTuple

import torch
from typing_extensions import override

from cpumoe.checkpoint.config import MoeConfig
from cpumoe.checkpoint.files import CheckpointError
from cpumoe.checkpoint.reader import (
    LAYER,
    MODEL,
    ExpectedTensor,
    ExpertReader,
    ExpertsInfo,
    ExpertWeights,
)
from cpumoe.checkpoint.shards import SafetensorsFolder
from cpumoe.formats import QuantizedMatrix

_BLOCK_BYTES = 16
_BIAS_DTYPES = (torch.bfloat16, torch.float16, torch.float32)

MODEL_TYPE = "gpt_oss"


class _Names(NamedTuple):
    """A layout's names of a layer's tensors, after the layer's prefix."""

    gate_up: str
    down: str
    blocks: str
    scales: str
    bias: str


_HOSTS = _Names("gate_up_proj", "down_proj", "_blocks", "_scales", "_bias")
_ORIGINAL = _Names("mlp1", "mlp2", "_weight.blocks", "_weight.scales", "_bias")


class GptOssReader(ExpertReader):
    """Reads gpt-oss with MXFP4 experts. The module's documentation has the names."""

    has_bias = True
    _NAMES = _HOSTS
    _EXPERT = re.compile(
        rf"(?P<prefix>{MODEL}layers\.{LAYER}\.mlp\.experts\.)(?:gate_up|down)_proj_"
    )

    @override
    @classmethod
    def open(cls, folder: SafetensorsFolder, config: MoeConfig) -> ExpertReader:
        """Opens the experts; see `ExpertReader.open`."""
        return cls(folder, config, ExpertsInfo("mxfp4"))

    @override
    @classmethod
    def matches(cls, folder: SafetensorsFolder, config: MoeConfig) -> bool:
        """Whether this is gpt-oss in transformers' layout. Other readers have bf16 conversions."""
        return (
            config.model_type == MODEL_TYPE and config.quantization.get("quant_method") == "mxfp4"
        )

    @override
    def _check_sizes(self) -> None:
        super()._check_sizes()
        group = self._weight_format.group_size
        for name in ("hidden_size", "intermediate_size"):
            if getattr(self, name) % group:
                raise CheckpointError(
                    f"{self.folder.path}: config.json: {name}: expected a multiple of {group}, "
                    f"because gpt-oss stores whole groups, got {getattr(self, name)}"
                )

    @override
    def _expert_tensors(self, prefix: str, index: int) -> Iterator[ExpectedTensor]:
        hidden, inner, names = self.hidden_size, self.intermediate_size, self._NAMES
        for name, n, k in ((names.gate_up, 2 * inner, hidden), (names.down, hidden, inner)):
            yield from self._projection(f"{prefix}{name}", n, k)
            yield self._bias(f"{prefix}{name}", n)

    @override
    def _read_expert(self, prefix: str, index: int) -> ExpertWeights:
        hidden, inner, names = self.hidden_size, self.intermediate_size, self._NAMES
        gate_up_name, down_name = f"{prefix}{names.gate_up}", f"{prefix}{names.down}"
        gate_up = self._read_projection(gate_up_name, index, 2 * inner, hidden)
        gate_up_bias = self._read_bias(gate_up_name, index, 2 * inner)
        return ExpertWeights(
            gate=_every_second_row(gate_up, 0),
            up=_every_second_row(gate_up, 1),
            down=self._read_projection(down_name, index, hidden, inner),
            gate_bias=gate_up_bias[0::2].contiguous(),
            up_bias=gate_up_bias[1::2].contiguous(),
            down_bias=self._read_bias(down_name, index, hidden),
        )

    def _read_projection(self, name: str, index: int, n: int, k: int) -> QuantizedMatrix:
        codes, scales = self._projection(name, n, k)
        return self._matrix(
            self.folder.tensor(*codes)[index].view(n, k // 2),
            self.folder.tensor(*scales)[index],
            f"{codes[0]}[{index}]",
            f"{scales[0]}[{index}]",
        )

    def _read_bias(self, name: str, index: int, n: int) -> torch.Tensor:
        return self.folder.tensor(*self._bias(name, n))[index]

    def _projection(self, name: str, n: int, k: int) -> tuple[ExpectedTensor, ExpectedTensor]:
        fmt = self._weight_format
        stack = (self.num_experts, n, k // fmt.group_size)
        return (
            (f"{name}{self._NAMES.blocks}", fmt.code_dtypes, (*stack, _BLOCK_BYTES)),
            (f"{name}{self._NAMES.scales}", fmt.scale_dtypes, stack),
        )

    def _bias(self, name: str, n: int) -> ExpectedTensor:
        return f"{name}{self._NAMES.bias}", _BIAS_DTYPES, (self.num_experts, n)


class OriginalGptOssReader(GptOssReader):
    """Reads gpt-oss in OpenAI's layout."""

    _EXPERT = re.compile(rf"(?P<prefix>block\.{LAYER}\.mlp\.)mlp[12]_")
    _NAMES = _ORIGINAL

    @override
    @classmethod
    def open(cls, folder: SafetensorsFolder, config: MoeConfig) -> ExpertReader:
        """Opens the experts; see `ExpertReader.open`. The config names no model type."""
        return super().open(folder, dataclasses.replace(config, model_type=MODEL_TYPE))

    @override
    @classmethod
    def matches(cls, folder: SafetensorsFolder, config: MoeConfig) -> bool:
        """Whether this is the folder ``original`` of gpt-oss, by the names of its tensors."""
        return config.model_type in ("", MODEL_TYPE) and any(map(cls._EXPERT.match, folder.names()))


def _every_second_row(matrix: QuantizedMatrix, first: int) -> QuantizedMatrix:
    name = f"{matrix.name}[{first}::2]"
    return QuantizedMatrix(matrix.codes[first::2], matrix.given_scales[first::2], name=name)
