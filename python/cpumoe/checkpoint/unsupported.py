"""Describes checkpoints whose experts have a format without a reader, for ``inspect``."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from typing_extensions import override

from cpumoe.checkpoint.config import MoeConfig
from cpumoe.checkpoint.files import shown, shown_value
from cpumoe.checkpoint.reader import ExpectedTensor, ExpertReader, ExpertsInfo, ExpertWeights
from cpumoe.checkpoint.shards import SafetensorsFolder

_NUMBER = re.compile("[0-9]{1,9}")
_EXPERTS = "experts"
_LAYERS = "layers"
# Layers such as mtp.layers.0 are no decoder layers.
_MULTI_TOKEN_PREDICTION = "mtp"


class UnsupportedReader(ExpertReader):
    """Has format, sizes and layers. `expert` always raises."""

    @override
    @classmethod
    def open(cls, folder: SafetensorsFolder, config: MoeConfig) -> ExpertReader:
        """Opens the experts; see `ExpertReader.open`."""
        name = _format_name(config)
        reason = f"{name} experts of model_type {shown_value(config.model_type)} have no reader yet"
        scale = None if config.quantization else _scale(folder)
        if scale is not None:
            reason = (
                f"config.json has no quantization_config, but experts have {shown(scale)}; use the "
                "config.json that was published with the weights"
            )
        return cls(folder, config, ExpertsInfo(name, (reason,)))

    @override
    @classmethod
    def matches(cls, folder: SafetensorsFolder, config: MoeConfig) -> bool:
        """Matches everything, as the registry's last row."""
        return True

    @override
    @classmethod
    def _layer_and_prefix(cls, tensor: str) -> tuple[int, str] | None:
        # By parts, because a pattern with two gaps would take quadratic time.
        parts = tensor.split(".")
        try:
            layers = parts.index(_LAYERS)
            experts = parts.index(_EXPERTS, layers + 2, len(parts) - 1)
        except ValueError:
            return None
        number = parts[layers + 1]
        if _MULTI_TOKEN_PREDICTION in parts[:layers] or not _NUMBER.fullmatch(number):
            return None
        return int(number), ".".join([*parts[: experts + 1], ""])

    @override
    def _expert_tensors(self, prefix: str, index: int) -> Iterator[ExpectedTensor]:
        raise NotImplementedError

    @override
    def _read_expert(self, prefix: str, index: int) -> ExpertWeights:
        raise NotImplementedError


def _scale(folder: SafetensorsFolder) -> str | None:
    """Returns the name of a tensor of experts' scales; None: there is none."""
    scales = (
        name
        for name in folder.names()
        if f".{_EXPERTS}." in name and "scale" in name.rpartition(".")[2]
    )
    return min(scales, default=None)


def _format_name(config: MoeConfig) -> str:
    quantization: Mapping[str, Any] = config.quantization
    method = quantization.get("quant_method")
    if method is not None:
        return shown(str(method))
    dtype = str(config.text.get("dtype") or config.text.get("torch_dtype") or "bfloat16")
    return {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}.get(dtype, shown(dtype))
