"""FP8 experts in blocks, as DeepSeek-V3 and others publish them.

Tensors are called ``layers.{L}.{block}.experts.{e}.{gate_proj,up_proj,down_proj}.{kind}``. Some
checkpoints call gate, up and down w1, w3, w2. The block is ``mlp``, ``block_sparse_moe`` or another
single name. ``weight`` is float8_e4m3fn ``[N, K]``. ``weight_scale_inv``, which is multiplied, is
float32, bfloat16 or E8M0 ``[ceil(N/128), ceil(K/128)]``. If a checkpoint asks for dynamically
quantized activations, cpumoe does not quantize them. Source: transformers 5.23
``finegrained_fp8.py``.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from typing_extensions import override

from cpumoe.checkpoint.activations import known_activation
from cpumoe.checkpoint.config import MoeConfig
from cpumoe.checkpoint.files import shown, shown_value
from cpumoe.checkpoint.reader import (
    LAYER,
    MODEL,
    ExpectedTensor,
    ExpertReader,
    ExpertsInfo,
    ExpertWeights,
)
from cpumoe.checkpoint.shards import SafetensorsFolder
from cpumoe.formats.quantized_matrix import BLOCK

_FORMAT = "fp8"
_SCALE = "weight_scale_inv"
# Names of gate, up and down.
_PROJECTIONS = (("gate_proj", "up_proj", "down_proj"), ("w1", "w3", "w2"))


class Fp8BlocksReader(ExpertReader):
    """Reads ``quant_method: fp8``. The module's documentation has the names."""

    _EXPERT = re.compile(rf"(?P<prefix>{MODEL}layers\.{LAYER}\.\w+\.experts\.)[0-9]+\.")

    @override
    @staticmethod
    def _identify(folder: SafetensorsFolder, config: MoeConfig) -> ExpertsInfo:
        reasons = tuple(_reasons(folder, config))
        return ExpertsInfo(_FORMAT, known_activation(config), reasons)

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
            yield self._code_and_scale_tensors(
                (f"{prefix}{index}.{name}.weight", n, k), f"{prefix}{index}.{name}.{_SCALE}"
            )


def _reasons(folder: SafetensorsFolder, config: MoeConfig) -> Iterator[str]:
    """Yields reasons why the experts are not supported."""
    block = config.quantization.get("weight_block_size")
    if block != [BLOCK, BLOCK]:
        yield f"weight_block_size {shown_value(block)} is not supported, only [{BLOCK}, {BLOCK}]"
    scheme = config.quantization.get("activation_scheme", "dynamic")
    if scheme != "dynamic":
        yield f"activation_scheme {shown_value(scheme)} is not supported, only 'dynamic'"
    experts = list(filter(Fp8BlocksReader._EXPERT.match, folder.names()))
    if not experts:
        yield "no tensor of a routed expert has a known name"
    elif not any(name.endswith(_SCALE) for name in experts):
        yield f"no expert has {_SCALE}, unlike blocks of FP8: {shown(min(experts))}"
