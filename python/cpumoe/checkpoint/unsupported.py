"""Checkpoints that have routed experts, in a format without a reader: enough for ``inspect``."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from typing_extensions import override

from cpumoe.checkpoint.config import MoeConfig
from cpumoe.checkpoint.files import shown, shown_value
from cpumoe.checkpoint.reader import ExpectedTensor, ExpertReader, ExpertsInfo, ExpertWeights
from cpumoe.checkpoint.shards import SafetensorsFolder
from cpumoe.swiglu import SwiGLU


class UnsupportedReader(ExpertReader):
    """Names the format, sizes and layers; `expert` always refuses."""

    # The layers of multi-token prediction, mtp.layers.0, are no decoder layers.
    _EXPERT = re.compile(
        r"(?P<prefix>(?:(?!mtp\.)\w+\.)*?layers\.(?P<layer>[0-9]{1,9})\.(?:\w+\.)*?experts\.)"
    )

    @override
    @staticmethod
    def _identify(folder: SafetensorsFolder, config: MoeConfig) -> ExpertsInfo:
        name = _format_name(config)
        reason = f"{name} experts of model_type {shown_value(config.model_type)} have no reader yet"
        return ExpertsInfo(name, SwiGLU(), (reason,))

    @override
    @classmethod
    def matches(cls, folder: SafetensorsFolder, config: MoeConfig) -> bool:
        """Everything: it is the registry's last row."""
        return True

    @override
    def _expert_tensors(self, prefix: str, index: int) -> Iterator[ExpectedTensor]:
        raise NotImplementedError

    @override
    def _read_expert(self, prefix: str, index: int) -> ExpertWeights:
        raise NotImplementedError


def _format_name(config: MoeConfig) -> str:
    quantization: Mapping[str, Any] = config.quantization
    method = quantization.get("quant_method")
    if method == "fp8":
        return "fp8_block" if quantization.get("weight_block_size") else "fp8"
    if "quant_algo" in quantization:
        return shown(str(quantization["quant_algo"])).lower()
    if method is not None:
        return shown(str(method))
    dtype = str(config.text.get("dtype") or config.text.get("torch_dtype") or "bfloat16")
    return {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}.get(dtype, shown(dtype))
