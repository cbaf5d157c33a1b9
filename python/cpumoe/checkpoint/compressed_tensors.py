"""compressed-tensors ``pack-quantized``: symmetric INT4 in groups of 32, as Kimi-K2 ships it.

``{prefix}layers.{L}.mlp.experts.{e}.{gate,up,down}_proj.{weight_packed,weight_scale,weight_shape}``
with prefix ``model.`` or ``language_model.model.``: weight_packed int32 ``[N, K/8]``, weight_scale
bf16 ``[N, K/32]``, weight_shape int64 (some files int32) ``[2]`` = N, K. As little-endian bytes a
packed row is two offset-binary codes per byte, low nibble = even k. Source: compressed-tensors 0.20
``compressors/pack_quantized``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from typing_extensions import override

from cpumoe.checkpoint.config import PLAIN_SWIGLU_MODEL_TYPES, MoeConfig
from cpumoe.checkpoint.reader import ExpertReader, ExpertsInfo, ExpertWeights
from cpumoe.checkpoint.shards import CheckpointError, SafetensorsFolder
from cpumoe.formats import WEIGHT_FORMATS, QuantizedMatrix
from cpumoe.swiglu import SwiGLU

_PREFIXES = ("model.", "language_model.model.", "")
_EXPERTS = ("mlp.experts.", "block_sparse_moe.experts.")
_PROJECTIONS = {
    "mlp.experts.": ("gate_proj", "up_proj", "down_proj"),
    "block_sparse_moe.experts.": ("w1", "w3", "w2"),
}
# What a group of quantization_config must say of the experts' weights.
_REQUIRED: dict[str, tuple[Any, ...]] = {
    "num_bits": (4,),
    "type": ("int",),
    "strategy": ("group",),
    "group_size": (WEIGHT_FORMATS["int4"].group_size,),
    "symmetric": (True,),
    # "group" reorders the groups' inputs (g_idx); the others store k in order.
    "actorder": (None, False, "weight", "static"),
}


class CompressedTensorsReader(ExpertReader):
    """Reads ``quant_method: compressed-tensors`` (see the module for names)."""

    @override
    @staticmethod
    def _identify(folder: SafetensorsFolder, config: MoeConfig) -> ExpertsInfo:
        name, unsupported = _experts_format(config.quantization)
        if config.model_type not in PLAIN_SWIGLU_MODEL_TYPES:
            unsupported += (
                f"the activation of model_type {config.model_type!r} is not known "
                f"(known: {', '.join(sorted(PLAIN_SWIGLU_MODEL_TYPES))})",
            )
        return ExpertsInfo(name, SwiGLU(), unsupported)

    @override
    @classmethod
    def matches(cls, folder: SafetensorsFolder, config: MoeConfig) -> bool:
        """Any compressed-tensors checkpoint, supported or not."""
        method = config.quantization.get("quant_method")
        return method == "compressed-tensors" or "config_groups" in config.quantization

    @override
    def _layer_prefix(self, layer: int) -> str | None:
        for prefix in _PREFIXES:
            for experts in _EXPERTS:
                name = f"{prefix}layers.{layer}.{experts}"
                first = f"{name}0.{_PROJECTIONS[experts][0]}."
                if any(f"{first}{kind}" in self.folder for kind in ("weight_packed", "weight")):
                    return name
        return None

    @override
    def _read_expert(self, prefix: str, index: int) -> ExpertWeights:
        projections = next(p for e, p in _PROJECTIONS.items() if prefix.endswith(e))
        gate, up, down = (
            self._read_projection(f"{prefix}{index}.{name}", n, k)
            for name, (n, k) in zip(projections, self._projection_sizes(), strict=True)
        )
        return ExpertWeights(gate, up, down)

    def _read_projection(self, name: str, n: int, k: int) -> QuantizedMatrix:
        fmt = self._weight_format
        codes_name, scales_name = f"{name}.weight_packed", f"{name}.weight_scale"
        codes = self.folder.tensor(codes_name, (torch.int32,), (n, k // 8))
        scales = self.folder.tensor(scales_name, fmt.scale_dtypes, (n, k // fmt.group_size))
        shape_name = f"{name}.weight_shape"
        shape = self.folder.tensor(shape_name, (torch.int64, torch.int32), (2,)).tolist()
        if shape != [n, k]:
            raise CheckpointError(f"{shape_name}: expected {[n, k]}, got {shape}")
        return self._matrix(codes, scales, codes_name, scales_name)


def _experts_format(quantization: Mapping[str, Any]) -> tuple[str, tuple[str, ...]]:
    """Returns the experts' format name and the reasons why it is not supported."""
    group = _experts_group(quantization)
    weights = group.get("weights") or {}
    stored = group.get("format") or quantization.get("format")
    if stored != "pack-quantized":
        return str(stored), (f"format {stored!r} is not supported yet, only 'pack-quantized'",)
    wrong = [key for key, allowed in _REQUIRED.items() if weights.get(key) not in allowed]
    reasons = tuple(
        f"{key} {weights.get(key)!r} is not supported, only {_REQUIRED[key][0]!r}" for key in wrong
    )
    if group.get("input_activations") is not None:
        reasons += ("quantized activations (input_activations) are not supported",)
    bits, symmetric = weights.get("num_bits"), weights.get("symmetric")
    plain = not set(wrong) & {"num_bits", "type", "symmetric"}
    name = "int4" if plain else f"int{bits}{'' if symmetric else '-asymmetric'}"
    return name, reasons


def _experts_group(quantization: Mapping[str, Any]) -> Mapping[str, Any]:
    """The config group that applies to an expert's projection: by name first, then by class."""
    groups = quantization.get("config_groups")
    if not isinstance(groups, Mapping) or not all(isinstance(g, Mapping) for g in groups.values()):
        raise CheckpointError(f"config.json: config_groups: expected objects, got {groups!r}")
    sample = "model.layers.1.mlp.experts.0.gate_proj"
    by_class: Mapping[str, Any] = {}
    group: Mapping[str, Any]
    for group in groups.values():
        for target in group.get("targets", ()):
            if target.startswith("re:") and re.match(target[3:], sample):
                return group
            if target == "Linear":
                by_class = group
    if not by_class:
        raise CheckpointError("config.json: config_groups: no group targets the experts")
    return by_class
