"""compressed-tensors: routed experts in symmetric INT4 (Kimi-K2), MXFP4 or FP8.

Tensors are called ``layers.{L}.{block}.experts.{e}.{gate_proj,up_proj,down_proj}.{kind}``. Some
checkpoints call gate, up and down w1, w3, w2. The block is ``mlp``, ``block_sparse_moe``,
``feed_forward`` or another single name.

``pack-quantized`` is INT4: weight_packed int32 ``[N, K/8]``, weight_scale bf16 ``[N, K/group]``,
and optionally weight_shape int64 or int32 ``[2]`` = N, K. The group is any multiple of 32, or a row
(strategy "channel"). The little-endian bytes of a packed row hold two offset-binary codes each, low
nibble = even k. ``mxfp4-pack-quantized`` has weight_packed uint8
``[N, K/2]`` and weight_scale uint8 (E8M0) ``[N, K/32]``. ``float-quantized`` is FP8: weight
float8_e4m3fn ``[N, K]`` and weight_scale, float32 or bfloat16, ``[N, 1]`` (strategy "channel") or
``[ceil(N/128), ceil(K/128)]`` (strategy "block"). If a checkpoint asks for dynamically
quantized activations, cpumoe does not quantize them. Source: compressed-tensors 0.20
``compressors/pack_quantized``, ``compressors/mxfp4`` and ``compressors/naive_quantized``.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from typing_extensions import override

from cpumoe.checkpoint.config import PLAIN_SWIGLU_MODEL_TYPES, MoeConfig
from cpumoe.checkpoint.files import CheckpointError, shown, shown_value
from cpumoe.checkpoint.patterns import ModulePatterns
from cpumoe.checkpoint.reader import (
    LAYER,
    MODEL,
    WHOLE_ROW,
    ExpectedTensor,
    ExpertReader,
    ExpertsInfo,
    ExpertWeights,
)
from cpumoe.checkpoint.shards import SafetensorsFolder
from cpumoe.formats import WEIGHT_FORMATS, QuantizedMatrix
from cpumoe.formats.quantized_matrix import BLOCK
from cpumoe.numerics.glu import SwiGLU

# Names of gate, up and down.
_PROJECTIONS = (("gate_proj", "up_proj", "down_proj"), ("w1", "w3", "w2"))
# The class of all modules, which targets and ignore may name beside module names and patterns.
_CLASS = "Linear"
_EXPERTS = rf"(?P<prefix>{MODEL}layers\.{LAYER}\.\w+\.experts\.)[0-9]+\."
_EXPERT_MODULE = re.compile(rf"{_EXPERTS}(?P<name>\w+)(?=\.weight(?:_packed)?$)")
_EXPERT_BIAS = re.compile(rf"{_EXPERTS}\w+\.bias$")


class _Stored(NamedTuple):
    """A format of compressed-tensors: its name here, its codes' dtype, type and name."""

    name: str
    codes: torch.dtype
    type: str
    tensor: str = "weight_packed"


_STORED = {
    "pack-quantized": _Stored("int4", torch.int32, "int"),
    "mxfp4-pack-quantized": _Stored("mxfp4", torch.uint8, "float"),
    "float-quantized": _Stored("fp8", torch.float8_e4m3fn, "float", "weight"),
}
_BY_NAME = {stored.name: stored for stored in _STORED.values()}


class CompressedTensorsReader(ExpertReader):
    """Reads ``quant_method: compressed-tensors``. The module's documentation has the names."""

    _EXPERT = re.compile(_EXPERTS)

    @override
    @staticmethod
    def _identify(folder: SafetensorsFolder, config: MoeConfig) -> ExpertsInfo:
        name, unsupported, group_size = _experts_format(folder, config.quantization)
        plain = config.model_type in PLAIN_SWIGLU_MODEL_TYPES
        return ExpertsInfo(name, SwiGLU() if plain else None, unsupported, group_size)

    @override
    @classmethod
    def matches(cls, folder: SafetensorsFolder, config: MoeConfig) -> bool:
        """Whether this is a compressed-tensors checkpoint, supported or not."""
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
        def has(projections: tuple[str, ...]) -> bool:
            tensor = _BY_NAME[self.format].tensor
            return any(f"{prefix}{index}.{p}.{tensor}" in self.folder for p in projections)

        projections = next(filter(has, _PROJECTIONS), _PROJECTIONS[0])
        for name, (n, k) in zip(projections, self._projection_sizes(), strict=True):
            yield f"{prefix}{index}.{name}", n, k

    def _projection(self, name: str, n: int, k: int) -> list[ExpectedTensor]:
        stored = _BY_NAME[self.format]
        pair = self._code_and_scale_tensors(
            (f"{name}.{stored.tensor}", n, k), f"{name}.weight_scale", (stored.codes,)
        )
        tensors = list(pair)
        # weight_shape repeats the config and the other two tensors. Some exporters leave it out.
        if f"{name}.weight_shape" in self.folder:
            tensors.append((f"{name}.weight_shape", (torch.int64, torch.int32), (2,)))
        return tensors

    def _read_projection(self, name: str, n: int, k: int) -> QuantizedMatrix:
        codes, scales, *stored_shape = self._projection(name, n, k)
        matrix = self._read_pair(codes, scales)
        for expected in stored_shape:
            shape = self.folder.tensor(*expected).tolist()
            if shape != [n, k]:
                raise CheckpointError(f"{expected[0]}: expected {[n, k]}, got {shape}")
        return matrix


# The experts' format name, the reasons why it is not supported, and the group size.
_Format = tuple[str, tuple[str, ...], int | None]


def _experts_format(folder: SafetensorsFolder, quantization: Mapping[str, Any]) -> _Format:
    patterns = ModulePatterns()
    groups = _config_groups(quantization, patterns)
    ignore = patterns.checked(quantization.get("ignore") or [], "ignore")
    modules = _expert_modules(folder)
    name = shown(str(quantization.get("format")))
    if not modules:
        return name, ("no tensor of a routed expert has a known name",), None
    bias = next(filter(_EXPERT_BIAS.match, folder.names()), None)
    if bias is not None:
        reason = f"biases of experts are not supported in this layout: {shown(bias)}"
        return name, (reason,), None
    gates = {projections[0] for projections in _PROJECTIONS}
    if not any(module.rpartition(".")[2] in gates for module in modules):
        reason = f"experts without a gate projection are not supported: {shown(modules[0])}"
        return name, (reason,), None
    ignored = _ignored_expert(folder, modules, ignore, patterns)
    if ignored is not None:
        entry, module = ignored
        reason = f"ignore: {shown_value(entry)} leaves {shown(module)} unquantized"
        return "unquantized", (reason,), None
    return _group_format(_experts_group(groups, modules[0], patterns), quantization)


def _group_format(group: Mapping[str, Any], quantization: Mapping[str, Any]) -> _Format:
    weights = group.get("weights") or {}
    key = group.get("format") or quantization.get("format")
    stored = _STORED.get(key) if isinstance(key, str) else None
    if stored is None:
        reason = (
            f"format {shown_value(key)} is not supported yet, only {', '.join(map(repr, _STORED))}"
        )
        return shown(str(key)), (reason,), None
    required = _required(stored)
    wrong = [key for key, allowed in required.items() if weights.get(key) not in allowed]
    reasons = tuple(
        f"{key} {shown_value(weights.get(key))} is not supported, only {required[key][0]!r}"
        for key in wrong
    )
    group_size, unsupported = _group_size(stored, weights)
    reasons += unsupported
    activations = group.get("input_activations")
    if activations is not None and not (
        isinstance(activations, Mapping) and activations.get("dynamic")
    ):
        reasons += ("activations with static scales (input_activations) are not supported",)
    bits, symmetric = weights.get("num_bits"), weights.get("symmetric")
    plain = not set(wrong) & {"num_bits", "type", "symmetric"}
    if plain:
        return stored.name, reasons, group_size
    return f"{stored.type}{shown_value(bits)}{'' if symmetric else '-asymmetric'}", reasons, None


def _group_size(stored: _Stored, weights: Mapping[str, Any]) -> tuple[int | None, tuple[str, ...]]:
    """Returns how many weights share a scale, and reasons why that is not supported."""
    fmt = WEIGHT_FORMATS[stored.name]
    size, strategy = weights.get("group_size"), weights.get("strategy")
    if (fmt.groups_vary or fmt.blocks) and strategy == "channel":
        return WHOLE_ROW, ()
    if fmt.blocks:
        block = weights.get("block_structure")
        if strategy == "block" and block == [BLOCK, BLOCK]:
            return None, ()
        got = f"block_structure {shown_value(block)} of strategy {shown_value(strategy)}"
        wanted = f"[{BLOCK}, {BLOCK}] of 'block', and strategy 'channel'"
        return None, (f"{got} is not supported, only {wanted}",)
    if strategy != "group":
        known = "'group' and 'channel'" if fmt.groups_vary else "'group'"
        return None, (f"strategy {shown_value(strategy)} is not supported, only {known}",)
    if isinstance(size, int) and not isinstance(size, bool):
        multiple = size > 0 and size % fmt.group_size == 0
        if size == fmt.group_size or (fmt.groups_vary and multiple):
            return size, ()
    known = f"multiples of {fmt.group_size}" if fmt.groups_vary else str(fmt.group_size)
    return None, (f"group_size {shown_value(size)} is not supported, only {known}",)


def _required(stored: _Stored) -> dict[str, tuple[Any, ...]]:
    """Returns the values that quantization_config must have for the experts' weights."""
    fmt = WEIGHT_FORMATS[stored.name]
    return {
        "num_bits": (fmt.code_bits,),
        "type": (stored.type,),
        "symmetric": (True,),
        # "group" reorders the inputs of groups (g_idx). The other values store k in order.
        "actorder": (None, False, "weight", "static"),
    }


def _experts_group(
    groups: Mapping[str, Mapping[str, Any]], module: str, patterns: ModulePatterns
) -> Mapping[str, Any]:
    """Returns the config group for an expert's projection: by name first, then by class."""
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
            modules.setdefault((match["prefix"], match["name"]), match[0])
    return list(modules.values())


def _ignored_expert(
    folder: SafetensorsFolder, modules: list[str], ignore: list[str], patterns: ModulePatterns
) -> tuple[str, str] | None:
    """Returns an entry of the ignore list that names an expert's projection, and the projection."""
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
