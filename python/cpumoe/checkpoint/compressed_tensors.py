"""compressed-tensors: routed experts in symmetric INT4 (Kimi-K2), MXFP4, NVFP4 or FP8.

`each_projection` has the names of the tensors.

- ``pack-quantized`` is INT4: weight_packed int32 ``[N, ceil(K/8)]``, weight_scale bf16
  ``[N, K/group]``, and optionally weight_shape int64 or int32 ``[2]`` = N, K. The group is any
  multiple of 32, or a row (strategy "channel"). The little-endian bytes of a packed row hold two
  offset-binary codes each, low nibble = even k. The last word may have codes behind the row's last.
- ``mxfp4-pack-quantized`` has weight_packed uint8 ``[N, K/2]`` and weight_scale uint8 (E8M0)
  ``[N, K/32]``.
- ``nvfp4-pack-quantized`` has weight_packed uint8 ``[N, K/2]``, weight_scale float8_e4m3fn
  ``[N, K/16]``, and weight_global_scale, a float32 number that divides all weights of the matrix.
- ``float-quantized`` is FP8: weight float8_e4m3fn ``[N, K]`` and weight_scale, float32 or bfloat16.
  It is ``[N, 1]`` (strategy "channel"), ``[ceil(N/128), ceil(K/128)]`` ("block"), or one number,
  which the reader returns once per row ("tensor").

Layers may differ: the entry of ``config_groups`` that targets a layer's experts says how they are
stored, and those that ``ignore`` names, or no group targets, are not quantized. Activations are not
quantized, whatever config.json says of them. Source: compressed-tensors 0.20
``compressors/pack_quantized``, ``compressors/mxfp4``, ``compressors/nvfp4`` and
``compressors/naive_quantized``.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from typing_extensions import override

from cpumoe.checkpoint.compressed_layers import (
    BY_NAME,
    UNQUANTIZED,
    expert_names,
    layer_forms,
    unreadable,
)
from cpumoe.checkpoint.config import MoeConfig
from cpumoe.checkpoint.each_projection import EachProjectionReader
from cpumoe.checkpoint.files import CheckpointError, shown
from cpumoe.checkpoint.mixed import joined
from cpumoe.checkpoint.published import PublishedReader
from cpumoe.checkpoint.reader import ExpectedTensor, ExpertReader, ExpertsInfo
from cpumoe.checkpoint.shards import SafetensorsFolder
from cpumoe.formats import QuantizedMatrix

_SHAPE = "weight_shape"


class CompressedTensorsReader(EachProjectionReader):
    """Reads ``quant_method: compressed-tensors``. The module's documentation has the names."""

    @override
    @classmethod
    def open(cls, folder: SafetensorsFolder, config: MoeConfig) -> ExpertReader:
        """Opens the experts; see `ExpertReader.open`."""
        names = expert_names(folder, config)
        reason = unreadable(names, config)
        if reason is not None:
            name = shown(str(config.quantization.get("format")))
            return cls(folder, config, ExpertsInfo(name, (reason,)))
        layers_of: dict[ExpertsInfo, set[int]] = {}
        for layer, info in layer_forms(names, config).items():
            layers_of.setdefault(info, set()).add(layer)
        return joined(
            PublishedReader.open(folder, config, layers)
            if info == UNQUANTIZED
            else cls(folder, config, info, layers)
            for info, layers in layers_of.items()
        )

    @override
    @classmethod
    def matches(cls, folder: SafetensorsFolder, config: MoeConfig) -> bool:
        """Whether this is a compressed-tensors checkpoint, supported or not."""
        method = config.quantization.get("quant_method")
        return method == "compressed-tensors" or "config_groups" in config.quantization

    @property
    @override
    def _codes_kind(self) -> str:
        return BY_NAME[self.format].tensor

    @override
    def _projection(self, name: str, n: int, k: int) -> list[ExpectedTensor]:
        stored = BY_NAME[self.format]
        tensors = [
            *self._code_and_scale_tensors(
                (f"{name}.{stored.tensor}", n, k), f"{name}.weight_scale", (stored.codes,)
            )
        ]
        if stored.divisor is not None:
            tensors.append(self._number(f"{name}.{stored.divisor}"))
        # weight_shape repeats the config and the other two tensors. Some exporters leave it out.
        if f"{name}.{_SHAPE}" in self.folder:
            tensors.append((f"{name}.{_SHAPE}", (torch.int64, torch.int32), (2,)))
        return tensors

    @override
    def _read_projection(self, name: str, n: int, k: int) -> QuantizedMatrix:
        codes, scales, *others = self._projection(name, n, k)
        factor = None
        for expected in others:
            if expected[0].endswith(_SHAPE):
                shape = self.folder.tensor(*expected).tolist()
                if shape != [n, k]:
                    raise CheckpointError(f"{expected[0]}: expected {[n, k]}, got {shape}")
            else:
                factor = self._read_number(expected, inverse=True)
        matrix = self._read_pair(codes, scales, factor)
        row_bytes = k * self._weight_format.code_bits // 8
        return replace(matrix, codes=matrix.codes[:, :row_bytes])
