"""Dense layers whose weights a checkpoint stores quantized, such as DeepSeek's in FP8.

transformers would dequantize such weights to twice the bytes or more. Before it reads weights, each
such layer becomes a `StoredLinear`, which has no weight: the checkpoint's tensors then match
nothing and are never read. Afterwards, cpumoe packs them from the mapped file as they are stored.

Which tensors belong to a layer is what transformers itself finds: its own renamings are applied to
the names in the checkpoint, and only layers count that nothing but its dequantizer would convert.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)
from typing_extensions import override

import cpumoe
from cpumoe._base.progress import track
from cpumoe.checkpoint import ExpertReader
from cpumoe.checkpoint.dense_matrices import StoredMatrix, has_known_blocks, stored_matrix
from cpumoe.formats import weight_format
from cpumoe.integrations.transformers.grouped_dense import (
    GroupedLinear,
    groups_of,
    pack_groups,
    split_rows,
)
from cpumoe.integrations.transformers.options import NATIVE, ExpertsOptions
from cpumoe.integrations.transformers.swap import EXPERT_KEYS

_WEIGHT = "weight"
_EXPERT = re.compile(EXPERT_KEYS)


class StoredLinear(nn.Module):
    """Stands for a dense layer while a model is loaded and tried. It notes how it is used.

    Attributes:
        in_features: width of the input.
        out_features: width of the output.
        stored: the layer's weights in the checkpoint, before `pack`.
    """

    def __init__(self, module: nn.Linear, stored: StoredMatrix) -> None:
        """Takes the place of a module, whose bias it keeps."""
        super().__init__()
        self.in_features, self.out_features = module.in_features, module.out_features
        self._host = [module]  # in a list, because it is no part of the model
        self.stored: StoredMatrix | None = stored
        self.format = stored.format
        self.register_parameter("bias", module.bias)
        self._dtype = module.weight.dtype
        self._layer: list[cpumoe.Linear | GroupedLinear] = []
        self._is_hf_initialized = True
        self.forget()

    def forget(self) -> None:
        """Forgets how the layer was used."""
        self.__dict__["called"] = self.__dict__["looked_at"] = False

    def pack(self, options: ExpertsOptions) -> None:
        """Packs the weights from the checkpoint."""
        assert self.stored is not None
        matrix, format = self.stored
        self.stored = None
        bias, groups = self._parameters["bias"], groups_of(self._host[0])
        layer = pack_groups(matrix, groups, format=format, bias=bias, options=options)
        self._layer.append(layer)

    @property
    def layer(self) -> cpumoe.Linear | GroupedLinear:
        """The packed layer."""
        return self._layer[0]

    def of_the_host(self) -> nn.Linear:
        """Returns the module that transformers would have loaded, with dequantized weights."""
        module = self._host[0]
        module.weight = nn.Parameter(self._dequantized())
        module.register_parameter("bias", self._parameters["bias"])
        return module.train(self.training)

    def _dequantized(self) -> torch.Tensor:
        if not self._layer:  # transformers initializes weights that it has not read
            return torch.empty_like(self._host[0].weight, device="meta")
        with torch.inference_mode(False), torch.no_grad():
            matrix = self.layer.export()
            return weight_format(self.format).dense(matrix).to(self._dtype)

    @override
    def __getattr__(self, name: str) -> Any:
        if name in (_WEIGHT, "bias"):
            self.__dict__["looked_at"] = True
            if name == _WEIGHT:
                return self._dequantized()
        return super().__getattr__(name)

    @override
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        self.__dict__["called"] = True
        result: torch.Tensor = self.layer(input)
        return result


def take_stored(
    model: Any,
    modules: Mapping[str, nn.Linear],
    reader: ExpertReader,
    conversions: Sequence[Any],
    dequantizer: type,
    dense: str,
) -> list[StoredLinear]:
    """Replaces dense layers of a model on the meta device, and returns the new modules.

    Args:
        model: the model, before transformers reads weights.
        modules: the dense layers that may be replaced, by name.
        reader: the model's checkpoint.
        conversions: the renamings and converters with which transformers will read it.
        dequantizer: the class of the host's operation that dequantizes a matrix.
        dense: which weights are wanted: "native", or the format that they must have.
    """
    if not has_known_blocks(reader.config.quantization):
        return []
    tied = {name for pair in model.all_tied_weights_keys.items() for name in pair}
    wanted = {f"{name}.{_WEIGHT}": name for name in modules}
    wanted = {key: name for key, name in wanted.items() if key not in tied}
    taken = {}
    for key, tensors in _tensors_of(model, wanted, reader, conversions, dequantizer).items():
        module = modules[wanted[key]]
        shape = module.out_features, module.in_features
        stored = stored_matrix(reader.folder, tensors, shape)
        if stored is None or split_rows(stored.matrix, groups_of(module)) is None:
            continue
        if dense in (NATIVE, stored.format):
            taken[wanted[key]] = StoredLinear(module, stored)
    for name, replacement in taken.items():
        path, _, child = name.rpartition(".")
        setattr(model.get_submodule(path), child, replacement)
    if taken:
        ignored = set(model._keys_to_ignore_on_load_unexpected or ())
        model._keys_to_ignore_on_load_unexpected = ignored | {_pattern(model, taken)}
    return [*taken.values()]


def pack_stored(modules: Sequence[StoredLinear], options: ExpertsOptions) -> None:
    """Packs the weights of all layers from the checkpoint; see `ExpertsOptions`."""
    for module in track(modules, "packing dense layers", enabled=options.progress):
        module.pack(options)


def _tensors_of(
    model: Any,
    wanted: Collection[str],
    reader: ExpertReader,
    conversions: Sequence[Any],
    dequantizer: type,
) -> dict[str, dict[str, str]]:
    """Returns the names of parameters' tensors by their kinds.

    Only parameters are returned whose tensors the host would do nothing with but dequantize.
    """
    own = copy.deepcopy(list(conversions))  # they remember which tensors they have renamed
    renamings = [each for each in own if isinstance(each, WeightRenaming)]
    converters = [each for each in own if isinstance(each, WeightConverter)]
    by_pattern = {pattern: each for each in converters for pattern in each.source_patterns}
    parameters = model.state_dict()
    found: dict[str, dict[str, str]] = {}
    refused = set()
    for name in sorted(reader.folder.names(), key=dot_natural_key):
        if _EXPERT.search(name):
            continue
        key, kind = rename_source_key(
            name, renamings, converters, model.base_model_prefix, parameters
        )
        if key not in wanted:
            continue
        operations = [] if kind is None else by_pattern[kind].operations
        tensors = found.setdefault(key, {})
        if len(operations) != 1 or type(operations[0]) is not dequantizer or kind in tensors:
            refused.add(key)
        else:
            tensors[kind] = name
    return {key: tensors for key, tensors in found.items() if key not in refused}


def _pattern(model: Any, taken: Collection[str]) -> str:
    """Returns a pattern of the keys that transformers finds no parameter for any more."""
    prefix = f"{model.base_model_prefix}."
    names = "|".join(re.escape(name.removeprefix(prefix)) for name in taken)
    # Experts, of which there are most, are told apart first.
    return rf"^(?!.*{EXPERT_KEYS})(?:{re.escape(prefix)})?(?:{names})\.{_WEIGHT}$"
