"""A checkpoint whose layers differ in format, such as one with layers that were left unquantized.

Each kind of layers has a reader of its own, which knows only these layers. All experts of a layer
have one format.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property

from typing_extensions import override

from cpumoe.checkpoint.config import MoeConfig
from cpumoe.checkpoint.published import PublishedReader
from cpumoe.checkpoint.reader import ExpectedTensor, ExpertReader, ExpertsInfo, ExpertWeights
from cpumoe.checkpoint.shards import SafetensorsFolder


class MixedReader(ExpertReader):
    """Reads each layer with the reader for it."""

    def __init__(self, parts: Sequence[ExpertReader]) -> None:
        """Joins readers of one folder, each of which has other layers."""
        parts = sorted(parts, key=lambda part: part.layers()[:1])
        formats = dict.fromkeys(part.format for part in parts)
        reasons = [reason for part in parts for reason in part.unsupported]
        biases = {part.has_bias for part in parts if not part.unsupported}
        if len(biases) > 1:
            reasons.append("biases of experts in some layers alone are not supported")
        self._part_of = {layer: part for part in parts for layer in part.layers()}
        first = parts[0]
        super().__init__(first.folder, first.config, ExpertsInfo("+".join(formats), (*reasons,)))
        self.has_bias = True in biases

    @override
    @classmethod
    def open(cls, folder: SafetensorsFolder, config: MoeConfig) -> ExpertReader:
        raise NotImplementedError  # other readers' `open` makes this one

    @override
    @classmethod
    def matches(cls, folder: SafetensorsFolder, config: MoeConfig) -> bool:
        """Matches nothing by itself."""
        return False

    @override
    def layer_format(self, layer: int) -> str:
        self._prefix(layer)
        return self._part_of[layer].format

    @override
    def group_size(self, layer: int, k: int) -> int:
        self._prefix(layer)
        return self._part_of[layer].group_size(layer, k)

    @override
    def scales_by_row(self, layer: int) -> bool:
        self._prefix(layer)
        return self._part_of[layer].scales_by_row(layer)

    @override
    def tensor_names(self) -> dict[int, list[str]]:
        names = {}
        for part in dict.fromkeys(self._part_of.values()):
            names.update(part.tensor_names())
        return dict(sorted(names.items()))

    @override
    def _check_sizes(self) -> None:
        """Checks nothing, because each part has checked its format."""

    @cached_property
    def _prefixes(self) -> dict[int, str]:
        return {layer: self._part_of[layer]._prefixes[layer] for layer in sorted(self._part_of)}

    @cached_property
    def _by_prefix(self) -> dict[str, ExpertReader]:
        return {prefix: self._part_of[layer] for layer, prefix in self._prefixes.items()}

    @override
    def _expert_tensors(self, prefix: str, index: int) -> Iterator[ExpectedTensor]:
        return self._by_prefix[prefix]._expert_tensors(prefix, index)

    @override
    def _read_expert(self, prefix: str, index: int) -> ExpertWeights:
        return self._by_prefix[prefix]._read_expert(prefix, index)


def joined(parts: Iterable[ExpertReader]) -> ExpertReader:
    """Returns a reader for the layers of several readers of one folder."""
    first, *others = parts
    return MixedReader([first, *others]) if others else first


def by_endings(
    reader: type[ExpertReader],
    folder: SafetensorsFolder,
    config: MoeConfig,
    forms: Mapping[str, ExpertsInfo],
) -> ExpertReader:
    """Returns a reader for layers that the ends of their tensors' names tell apart.

    Layers that have none of these names are read as unquantized.

    Args:
        reader: the class that reads quantized experts.
        folder: the checkpoint.
        config: the sizes from config.json.
        forms: the form of quantized experts by an end that only their tensors' names have. If a
            layer has several of them, the first counts.
    """
    rank = {ending: number for number, ending in enumerate(forms)}
    found: dict[int, str] = {}
    others: list[tuple[str, int | None]] = []  # names without an end, and the expert's layer
    for name in folder.names():
        match = reader._EXPERT.match(name)
        layer = int(match["layer"]) if match else None
        ending = next(filter(name.endswith, forms), None)
        if layer is None or ending is None:
            others.append((name, layer))
        elif rank[ending] < rank.get(found.get(layer, ""), len(rank)):
            found[layer] = ending
    # Checkpoints have hundreds of thousands of names, most of them in layers that were found.
    plain = (PublishedReader._EXPERT.match(name) for name, layer in others if layer not in found)
    unquantized = {int(match["layer"]) for match in plain if match} - found.keys()
    unquantized = {layer for layer in unquantized if layer < config.num_hidden_layers}
    layers_of: dict[ExpertsInfo, set[int]] = {}
    for layer, ending in found.items():
        if layer < config.num_hidden_layers:
            layers_of.setdefault(forms[ending], set()).add(layer)
    if not unquantized and len(layers_of) < 2:
        return reader(folder, config, next(iter(layers_of or forms.values())))
    parts = [reader(folder, config, info, layers) for info, layers in layers_of.items()]
    if unquantized:
        parts.append(PublishedReader.open(folder, config, unquantized))
    return joined(parts)
