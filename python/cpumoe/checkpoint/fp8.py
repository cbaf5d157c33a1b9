"""FP8 experts whose scales lie beside the weights, as DeepSeek-V3 and others publish them.

Tensors are called ``layers.{L}.{block}.experts.{e}.{gate_proj,up_proj,down_proj}.{kind}``. Some
checkpoints call gate, up and down w1, w3, w2. The block is ``mlp``, ``block_sparse_moe`` or another
single name. ``weight`` is float8_e4m3fn ``[N, K]``. The scale is multiplied, and is float32,
bfloat16 or E8M0. It has one of two shapes:

- ``weight_scale_inv [ceil(N/128), ceil(K/128)]``, if config.json has ``weight_block_size``;
- otherwise one number for the matrix, ``weight_scale_inv`` or ``weight_scale``. The reader returns
  it once per row.

Layers without scales are read as unquantized ones. Activations are not quantized, whatever
config.json says of them. Sources: transformers 5.23 ``finegrained_fp8.py``; vLLM ``fp8.py``.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from typing_extensions import override

from cpumoe.checkpoint.config import MoeConfig
from cpumoe.checkpoint.files import shown, shown_value
from cpumoe.checkpoint.mixed import with_unquantized
from cpumoe.checkpoint.reader import (
    LAYER,
    MODEL,
    WHOLE_MATRIX,
    ExpectedTensor,
    ExpertReader,
    ExpertsInfo,
    ExpertWeights,
)
from cpumoe.checkpoint.shards import SafetensorsFolder
from cpumoe.formats.quantized_matrix import BLOCK

_FORMAT = "fp8"
_SCALES = ("weight_scale_inv", "weight_scale")
# Names of gate, up and down.
_PROJECTIONS = (("gate_proj", "up_proj", "down_proj"), ("w1", "w3", "w2"))


class Fp8Reader(ExpertReader):
    """Reads ``quant_method: fp8``. The module's documentation has the names."""

    _EXPERT = re.compile(rf"(?P<prefix>{MODEL}layers\.{LAYER}\.\w+\.experts\.)[0-9]+\.")

    @override
    @classmethod
    def open(cls, folder: SafetensorsFolder, config: MoeConfig) -> ExpertReader:
        """Opens the experts; see `ExpertReader.open`."""
        block = config.quantization.get("weight_block_size")
        endings = _SCALES[:1] if block else _SCALES
        experts = list(filter(cls._EXPERT.match, folder.names()))
        reason = None
        if block not in (None, [BLOCK, BLOCK]):
            reason = (
                f"weight_block_size {shown_value(block)} is not supported, only [{BLOCK}, {BLOCK}]"
            )
        elif not experts:
            reason = "no tensor of a routed expert has a known name"
        elif not any(name.endswith(endings) for name in experts):
            reason = f"no expert has {' or '.join(endings)}, unlike FP8: {shown(min(experts))}"
        if reason is not None:
            return cls(folder, config, ExpertsInfo(_FORMAT, (reason,)))
        info = ExpertsInfo(_FORMAT, group_size=None if block else WHOLE_MATRIX)
        return with_unquantized(cls, folder, config, info, _SCALES)

    @override
    @classmethod
    def matches(cls, folder: SafetensorsFolder, config: MoeConfig) -> bool:
        """Whether the checkpoint has FP8 weights, supported or not."""
        return config.quantization.get("quant_method") == "fp8"

    @override
    def _expert_tensors(self, prefix: str, index: int) -> Iterator[ExpectedTensor]:
        for pair in self._pairs(prefix, index):
            yield from pair

    @override
    def _read_expert(self, prefix: str, index: int) -> ExpertWeights:
        gate, up, down = (self._read_pair(*pair) for pair in self._pairs(prefix, index))
        return ExpertWeights(gate, up, down)

    def _pairs(self, prefix: str, index: int) -> Iterator[tuple[ExpectedTensor, ExpectedTensor]]:
        """Yields codes and scales of gate, up and down."""

        def has(projections: tuple[str, ...]) -> bool:
            return any(f"{prefix}{index}.{p}.weight" in self.folder for p in projections)

        projections = next(filter(has, _PROJECTIONS), _PROJECTIONS[0])
        for name, (n, k) in zip(projections, self._projection_sizes(), strict=True):
            stem = f"{prefix}{index}.{name}"
            names = (f"{stem}.{scale}" for scale in _SCALES)
            scales = next(filter(self.folder.__contains__, names), f"{stem}.{_SCALES[0]}")
            yield self._code_and_scale_tensors((f"{stem}.weight", n, k), scales)
