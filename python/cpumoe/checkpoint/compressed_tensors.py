"""compressed-tensors ``pack-quantized``: symmetric INT4 in groups of 32, as Kimi-K2 ships it.

``{prefix}layers.{L}.mlp.experts.{e}.{gate,up,down}_proj.{weight_packed,weight_scale,weight_shape}``
with prefix ``model.`` or ``language_model.model.``: weight_packed int32 ``[N, K/8]``, weight_scale
bf16 ``[N, K/32]``, weight_shape int64 (some files int32) ``[2]`` = N, K. As little-endian bytes a
packed row is two offset-binary codes per byte, low nibble = even k. Source: compressed-tensors 0.20
``compressors/pack_quantized``.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from typing_extensions import override

from cpumoe.checkpoint.config import PLAIN_SWIGLU_MODEL_TYPES, MoeConfig
from cpumoe.checkpoint.files import CheckpointError, shown, shown_value
from cpumoe.checkpoint.patterns import ModulePatterns
from cpumoe.checkpoint.reader import (
    LAYER,
    MODEL,
    ExpectedTensor,
    ExpertReader,
    ExpertsInfo,
    ExpertWeights,
)
from cpumoe.checkpoint.shards import SafetensorsFolder
from cpumoe.formats import WEIGHT_FORMATS, QuantizedMatrix
from cpumoe.swiglu import SwiGLU

_PROJECTIONS = {
    "mlp.experts.": ("gate_proj", "up_proj", "down_proj"),
    "block_sparse_moe.experts.": ("w1", "w3", "w2"),
}
# In targets and ignore, beside module names and patterns: the class of all modules.
_CLASS = "Linear"
_EXPERT_MODULE = re.compile(
    rf"({MODEL}layers\.[0-9]+\.(?:mlp|block_sparse_moe)\.experts\.)"
    r"[0-9]+\.(\w+)(?=\.weight(?:_packed)?$)"
)
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

    _EXPERT = re.compile(
        rf"(?P<prefix>{MODEL}layers\.{LAYER}\.(?:mlp|block_sparse_moe)\.experts\.)[0-9]"
    )

    @override
    @staticmethod
    def _identify(folder: SafetensorsFolder, config: MoeConfig) -> ExpertsInfo:
        name, unsupported = _experts_format(folder, config.quantization)
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
    def _expert_tensors(self, prefix: str, index: int) -> Iterator[ExpectedTensor]:
        for name, n, k in self._named_sizes(prefix, index):
            yield from self._projection(name, n, k)

    @override
    def _read_expert(self, prefix: str, index: int) -> ExpertWeights:
        gate, up, down = (
            self._read_projection(*named) for named in self._named_sizes(prefix, index)
        )
        return ExpertWeights(gate, up, down)

    def _named_sizes(self, prefix: str, index: int) -> Iterator[tuple[str, int, int]]:
        projections = next(p for e, p in _PROJECTIONS.items() if prefix.endswith(e))
        for name, (n, k) in zip(projections, self._projection_sizes(), strict=True):
            yield f"{prefix}{index}.{name}", n, k

    def _projection(
        self, name: str, n: int, k: int
    ) -> tuple[ExpectedTensor, ExpectedTensor, ExpectedTensor]:
        fmt = self._weight_format
        return (
            (f"{name}.weight_packed", (torch.int32,), (n, k // 8)),
            (f"{name}.weight_scale", fmt.scale_dtypes, (n, k // fmt.group_size)),
            (f"{name}.weight_shape", (torch.int64, torch.int32), (2,)),
        )

    def _read_projection(self, name: str, n: int, k: int) -> QuantizedMatrix:
        codes, scales, stored_shape = self._projection(name, n, k)
        tensors = self.folder.tensor(*codes), self.folder.tensor(*scales)
        shape = self.folder.tensor(*stored_shape).tolist()
        if shape != [n, k]:
            raise CheckpointError(f"{stored_shape[0]}: expected {[n, k]}, got {shape}")
        return self._matrix(*tensors, codes[0], scales[0])


def _experts_format(
    folder: SafetensorsFolder, quantization: Mapping[str, Any]
) -> tuple[str, tuple[str, ...]]:
    """Returns the experts' format name and the reasons why it is not supported."""
    patterns = ModulePatterns()
    groups = _config_groups(quantization, patterns)
    ignore = patterns.checked(quantization.get("ignore") or [], "ignore")
    modules = _expert_modules(folder)
    if not modules:
        name = shown(str(quantization.get("format")))
        return name, ("no routed expert's tensor has a known name",)
    ignored = _ignored_expert(folder, modules, ignore, patterns)
    if ignored is not None:
        entry, module = ignored
        return "unquantized", (f"ignore: {shown_value(entry)} leaves {shown(module)} unquantized",)
    return _group_format(_experts_group(groups, modules[0], patterns), quantization)


def _group_format(
    group: Mapping[str, Any], quantization: Mapping[str, Any]
) -> tuple[str, tuple[str, ...]]:
    weights = group.get("weights") or {}
    stored = group.get("format") or quantization.get("format")
    if stored != "pack-quantized":
        reason = f"format {shown_value(stored)} is not supported yet, only 'pack-quantized'"
        return shown(str(stored)), (reason,)
    wrong = [key for key, allowed in _REQUIRED.items() if weights.get(key) not in allowed]
    reasons = tuple(
        f"{key} {shown_value(weights.get(key))} is not supported, only {_REQUIRED[key][0]!r}"
        for key in wrong
    )
    if group.get("input_activations") is not None:
        reasons += ("quantized activations (input_activations) are not supported",)
    bits, symmetric = weights.get("num_bits"), weights.get("symmetric")
    plain = not set(wrong) & {"num_bits", "type", "symmetric"}
    name = "int4" if plain else f"int{shown_value(bits)}{'' if symmetric else '-asymmetric'}"
    return name, reasons


def _experts_group(
    groups: Mapping[str, Mapping[str, Any]], module: str, patterns: ModulePatterns
) -> Mapping[str, Any]:
    """The config group that applies to an expert's projection: by name first, then by class."""
    for group in groups.values():
        if any(patterns.matches(target, module) for target in group["targets"]):
            return group
    by_class = [group for group in groups.values() if _CLASS in group["targets"]]
    if not by_class:
        raise CheckpointError("config.json: config_groups: no group targets the experts")
    return by_class[-1]


def _expert_modules(folder: SafetensorsFolder) -> list[str]:
    """Returns the name of one expert's projection for each layer and projection."""
    modules: dict[tuple[str, str], str] = {}
    for name in folder.names():
        match = _EXPERT_MODULE.match(name)
        if match is not None:
            modules.setdefault((match[1], match[2]), match[0])
    return list(modules.values())


def _ignored_expert(
    folder: SafetensorsFolder, modules: list[str], ignore: list[str], patterns: ModulePatterns
) -> tuple[str, str] | None:
    """Returns an entry of the ignore list and an expert's projection that it names, if any."""
    for entry in ignore:
        if entry == _CLASS:
            return entry, modules[0]
        if patterns.is_pattern(entry):
            found = (module for module in modules if patterns.matches(entry, module))
            module = next(found, None)
            if module is not None:
                return entry, module
        for kind in ("weight", "weight_packed"):
            tensor = f"{entry}.{kind}"
            if tensor in folder and _EXPERT_MODULE.match(tensor):
                return entry, entry
    return None


def _config_groups(
    quantization: Mapping[str, Any], patterns: ModulePatterns
) -> Mapping[str, Mapping[str, Any]]:
    groups = quantization.get("config_groups")
    if not isinstance(groups, Mapping) or not all(isinstance(g, Mapping) for g in groups.values()):
        raise CheckpointError(
            f"config.json: config_groups: expected objects, got {shown_value(groups)}"
        )
    for name, group in groups.items():
        key = f"config_groups.{shown(name)}"
        patterns.checked(group.get("targets"), f"{key}.targets")
        weights = group.get("weights")
        if weights is not None and not isinstance(weights, Mapping):
            raise CheckpointError(
                f"config.json: {key}.weights: expected an object, got {shown_value(weights)}"
            )
    return groups
