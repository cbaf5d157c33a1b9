"""How each layer's experts are stored, according to compressed-tensors' quantization_config.

`CompressedTensorsReader` explains the formats. A target, or an entry of ``ignore``, is a class of
modules, a module's name, or a pattern. Source: compressed-tensors 0.20 ``utils/match.py``.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch

from cpumoe.checkpoint.config import MoeConfig
from cpumoe.checkpoint.each_projection import EXPERTS, projections_of
from cpumoe.checkpoint.files import CheckpointError, shown, shown_value
from cpumoe.checkpoint.patterns import ModulePatterns
from cpumoe.checkpoint.reader import WHOLE_MATRIX, WHOLE_ROW, ExpertsInfo
from cpumoe.checkpoint.shards import SafetensorsFolder
from cpumoe.formats import WEIGHT_FORMATS
from cpumoe.formats.quantized_matrix import BLOCK

# The form of experts that are not quantized.
UNQUANTIZED = ExpertsInfo("unquantized")

# The class of all modules, which targets and ignore may name beside module names and patterns.
_CLASS = "Linear"
_TENSOR = re.compile(rf"{EXPERTS}(?P<projection>\w+)\.(?P<kind>\w+)$")
# Kinds of tensors: codes or weights, and what only quantized experts have.
_WEIGHTS = ("weight", "weight_packed")
_QUANTIZED = ("weight_packed", "weight_scale")


class Stored(NamedTuple):
    """A format of compressed-tensors.

    Attributes:
        name: its name here.
        codes: the dtype of codes.
        type: the type of a code.
        tensor: the name of the codes.
        strategy: which weights share a scale.
        divisor: the name of a number that divides all weights of a matrix; None: there is none.
    """

    name: str
    codes: torch.dtype
    type: str
    tensor: str = "weight_packed"
    strategy: str = "group"
    divisor: str | None = None


STORED = {
    "pack-quantized": Stored("int4", torch.int32, "int"),
    "mxfp4-pack-quantized": Stored("mxfp4", torch.uint8, "float"),
    "nvfp4-pack-quantized": Stored(
        "nvfp4", torch.uint8, "float", strategy="tensor_group", divisor="weight_global_scale"
    ),
    "float-quantized": Stored("fp8", torch.float8_e4m3fn, "float", "weight"),
}
BY_NAME = {stored.name: stored for stored in STORED.values()}


class Names(NamedTuple):
    """What the names of experts' tensors say.

    Attributes:
        modules: one expert's projection for each decoder layer and projection.
        quantized: the prefixes of layers that have quantized experts.
        bias: the name of a bias; None: there is none.
    """

    modules: list[_Module]
    quantized: set[str]
    bias: str | None


class _Module(NamedTuple):
    """A projection of one of a layer's experts, which stands for that projection of all."""

    name: str
    layer: int
    prefix: str
    projection: str


def expert_names(folder: SafetensorsFolder, config: MoeConfig) -> Names:
    """Returns what the names of a checkpoint's tensors say of its experts."""
    modules: dict[tuple[str, str], _Module] = {}
    quantized: set[str] = set()
    bias = None
    for match in filter(None, map(_TENSOR.match, folder.names())):
        layer, prefix = int(match["layer"]), match["prefix"]
        projection, kind = match["projection"], match["kind"]
        if kind in _QUANTIZED:
            quantized.add(prefix)
        if kind in _WEIGHTS and layer < config.num_hidden_layers:
            name = match[0].removesuffix(f".{kind}")
            modules.setdefault((prefix, projection), _Module(name, layer, prefix, projection))
        elif kind == "bias" and bias is None:
            bias = match[0]
    return Names(list(modules.values()), quantized, bias)


def layer_forms(names: Names, config: MoeConfig) -> dict[int, ExpertsInfo]:
    """Returns the form of the experts of each layer, or a reason why none can be read.

    Raises:
        CheckpointError: quantization_config is malformed, or says nothing of quantized experts.
    """
    quantization = config.quantization
    patterns = ModulePatterns()
    groups = _config_groups(quantization, patterns)
    ignore = _Ignore(patterns.checked(quantization.get("ignore") or [], "ignore"), patterns, config)
    forms: dict[int, dict[ExpertsInfo, str]] = {}
    for module in names.modules:
        is_quantized = module.prefix in names.quantized
        form = ignore.form(module, is_quantized=is_quantized)
        if form is None:
            group = _experts_group(groups, module.name, patterns)
            form = UNQUANTIZED if group is None else _group_form(group, quantization)
            if group is None and is_quantized:
                raise CheckpointError(
                    f"config.json: config_groups: no group targets the experts: expected one for "
                    f"{shown(module.name)}, got none"
                )
        forms.setdefault(module.layer, {}).setdefault(form, module.name)
    return {layer: _common(found) for layer, found in forms.items()}


def unreadable(names: Names, config: MoeConfig) -> str | None:
    """Returns a reason why cpumoe cannot compute experts with these tensors."""
    if not names.modules:
        return "no tensor of a routed expert has a known name"
    if names.bias is not None:
        return f"biases of experts are not supported in this layout: {shown(names.bias)}"
    gates = {projections[0] for projections in projections_of(config)}
    if not any(module.projection in gates for module in names.modules):
        first = names.modules[0].name
        return f"experts without a gate projection are not supported: {shown(first)}"
    return None


def _common(forms: Mapping[ExpertsInfo, str]) -> ExpertsInfo:
    """Returns the form of a layer's experts, from the forms of some modules."""
    (form, module), *others = forms.items()
    if not others or form.unsupported:
        return form
    other, other_module = others[0]
    reason = (
        f"{shown(module)} is {form.format} and {shown(other_module)} is {other.format}, in another "
        f"form; all experts of a layer must have one form"
    )
    return other if other.unsupported else ExpertsInfo(form.format, (reason,))


class _Ignore:
    """The list of modules that are not quantized."""

    def __init__(self, entries: Sequence[str], patterns: ModulePatterns, config: MoeConfig) -> None:
        self._patterns = patterns
        self._experts = config.num_experts
        self._general = [
            entry for entry in entries if entry == _CLASS or patterns.is_pattern(entry)
        ]
        # Some exporters write out the names of all experts.
        named = (_TENSOR.match(f"{entry}.weight") for entry in set(entries))
        self._named = Counter((match["prefix"], match["projection"]) for match in named if match)

    def form(self, module: _Module, *, is_quantized: bool) -> ExpertsInfo | None:
        """Returns the form of a module that is on the list; None: it is not."""
        entry = self._entry(module)
        named = self._named[module.prefix, module.projection]
        if entry is None and not named:
            return None
        if entry is None and named < self._experts:
            reason = (
                f"ignore: it names {named} of {self._experts} experts like {shown(module.name)}; "
                f"all experts of a layer must have one form"
            )
            return ExpertsInfo(UNQUANTIZED.format, (reason,))
        if is_quantized:
            reason = (
                f"ignore: {shown_value(entry or module.name)} leaves {shown(module.name)} "
                f"unquantized, but its layer's experts have scales"
            )
            return ExpertsInfo(UNQUANTIZED.format, (reason,))
        return UNQUANTIZED

    def _entry(self, module: _Module) -> str | None:
        """Returns the class or pattern that names a module."""
        for entry in self._general:
            if entry == _CLASS or self._patterns.matches(entry, module.name):
                return entry
        return None


def _group_form(group: Mapping[str, Any], quantization: Mapping[str, Any]) -> ExpertsInfo:
    """Returns the form of the weights that a config group describes."""
    weights = group.get("weights") or {}
    key = group.get("format") or quantization.get("format")
    stored = STORED.get(key) if isinstance(key, str) else None
    if stored is None:
        reason = (
            f"format {shown_value(key)} is not supported yet, only {', '.join(map(repr, STORED))}"
        )
        return ExpertsInfo(shown(str(key)), (reason,))
    required = _required(stored)
    wrong = [key for key, allowed in required.items() if weights.get(key) not in allowed]
    reasons = tuple(
        f"{key} {shown_value(weights.get(key))} is not supported, only {required[key][0]!r}"
        for key in wrong
    )
    group_size, unsupported = _group_size(stored, weights)
    reasons += unsupported
    bits, symmetric = weights.get("num_bits"), weights.get("symmetric")
    plain = not set(wrong) & {"num_bits", "type", "symmetric"}
    if plain:
        return ExpertsInfo(stored.name, reasons, group_size)
    kind = "" if symmetric else "-asymmetric"
    return ExpertsInfo(f"{stored.type}{shown_value(bits)}{kind}", reasons)


def _group_size(stored: Stored, weights: Mapping[str, Any]) -> tuple[int | None, tuple[str, ...]]:
    """Returns how many weights share a scale, and reasons why that is not supported."""
    fmt = WEIGHT_FORMATS[stored.name]
    size, strategy = weights.get("group_size"), weights.get("strategy")
    if (fmt.groups_vary or fmt.blocks) and strategy == "channel":
        return WHOLE_ROW, ()
    if fmt.blocks and strategy == "tensor":
        return WHOLE_MATRIX, ()
    if fmt.blocks:
        block = weights.get("block_structure")
        if strategy == "block" and block == [BLOCK, BLOCK]:
            return None, ()
        got = f"block_structure {shown_value(block)} of strategy {shown_value(strategy)}"
        wanted = f"[{BLOCK}, {BLOCK}] of 'block', and strategies 'channel' and 'tensor'"
        return None, (f"{got} is not supported, only {wanted}",)
    if strategy != stored.strategy:
        known = repr(stored.strategy) + (" and 'channel'" if fmt.groups_vary else "")
        return None, (f"strategy {shown_value(strategy)} is not supported, only {known}",)
    if isinstance(size, int) and not isinstance(size, bool):
        multiple = size > 0 and size % fmt.group_size == 0
        if size == fmt.group_size or (fmt.groups_vary and multiple):
            return size, ()
    known = f"multiples of {fmt.group_size}" if fmt.groups_vary else str(fmt.group_size)
    return None, (f"group_size {shown_value(size)} is not supported, only {known}",)


def _required(stored: Stored) -> dict[str, tuple[Any, ...]]:
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
) -> Mapping[str, Any] | None:
    """Returns the config group for a module: by name first, then by class; None: there is none."""
    for group in groups.values():
        if any(patterns.matches(target, module) for target in group["targets"]):
            return group
    by_class = [group for group in groups.values() if _CLASS in group["targets"]]
    return by_class[-1] if by_class else None


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
