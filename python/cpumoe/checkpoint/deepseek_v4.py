"""DeepSeek-V4: MXFP4 or FP8 experts, one tensor pair per projection.

Tensors are called ``layers.{L}.ffn.experts.{e}.{w1,w3,w2}.{weight,scale}``, with w1 = gate, w3 = up
and w2 = down. A weight is int8, uint8 or float4_e2m1fn_x2 ``[N, K/2]``. A scale is float8_e8m0fnu,
or its bytes as uint8, ``[N, K/32]``. DeepSeek-V4-Flash-Base has float8_e4m3fn weights ``[N, K]``
and scales ``[ceil(N/128), ceil(K/128)]``. The multi-token-prediction layers ``mtp.{i}`` are not
decoder layers and are ignored. Source: the published checkpoint's index and transformers 5.23
``deepseek_v4``.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from typing_extensions import override

from cpumoe.checkpoint.config import MoeConfig
from cpumoe.checkpoint.files import shown, shown_value
from cpumoe.checkpoint.header import FLOAT4_NAME
from cpumoe.checkpoint.reader import (
    LAYER,
    MODEL,
    ExpectedTensor,
    ExpertReader,
    ExpertsInfo,
    ExpertWeights,
)
from cpumoe.checkpoint.shards import SafetensorsFolder

# By ``expert_dtype``.
_FORMATS = {"fp4": "mxfp4", "fp8": "fp8"}
_WEIGHT = re.compile(rf"{MODEL}layers\.[0-9]+\.ffn\.experts\.[0-9]+\.w1\.weight$")


class DeepseekV4Reader(ExpertReader):
    """Reads ``model_type: deepseek_v4``. The module's documentation has the names."""

    _EXPERT = re.compile(rf"(?P<prefix>{MODEL}layers\.{LAYER}\.ffn\.experts\.)[0-9]")

    @override
    @classmethod
    def open(cls, folder: SafetensorsFolder, config: MoeConfig) -> ExpertReader:
        """Opens the experts; see `ExpertReader.open`."""
        expert_dtype = _expert_dtype(folder, config)
        if expert_dtype in _FORMATS:
            return cls(folder, config, ExpertsInfo(_FORMATS[expert_dtype]))
        known = " and ".join(map(repr, _FORMATS))
        reason = f"expert_dtype {shown_value(expert_dtype)} is not supported, only {known}"
        return cls(folder, config, ExpertsInfo(shown(expert_dtype), (reason,)))

    @override
    @classmethod
    def matches(cls, folder: SafetensorsFolder, config: MoeConfig) -> bool:
        """Whether this is DeepSeek-V4 as published. Other readers have requantized ones."""
        return (
            config.model_type == "deepseek_v4" and config.quantization.get("quant_method") == "fp8"
        )

    @override
    def _expert_tensors(self, prefix: str, index: int) -> Iterator[ExpectedTensor]:
        for name, (n, k) in zip(("w1", "w3", "w2"), self._projection_sizes(), strict=True):
            yield from self._projection(f"{prefix}{index}.{name}", n, k)

    @override
    def _read_expert(self, prefix: str, index: int) -> ExpertWeights:
        gate, up, down = (
            self._read_pair(*self._projection(f"{prefix}{index}.{name}", n, k))
            for name, (n, k) in zip(("w1", "w3", "w2"), self._projection_sizes(), strict=True)
        )
        return ExpertWeights(gate, up, down)

    def _projection(self, name: str, n: int, k: int) -> tuple[ExpectedTensor, ExpectedTensor]:
        return self._code_and_scale_tensors((f"{name}.weight", n, k), f"{name}.scale")


def _expert_dtype(folder: SafetensorsFolder, config: MoeConfig) -> str:
    """Returns ``"fp4"`` or ``"fp8"``, from either level of the config or from the first expert."""
    value = config.text.get("expert_dtype") or config.quantization.get("expert_dtype")
    if value is not None:
        return str(value)
    name = next(filter(_WEIGHT.match, folder.names()), None)
    packed = name is not None and folder.info(name).dtype in ("I8", "U8", FLOAT4_NAME)
    return "fp4" if packed else "fp8"
