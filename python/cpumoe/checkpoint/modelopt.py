"""Experts that NVIDIA's Model Optimizer ("ModelOpt") has quantized to NVFP4 or FP8.

quantization_config in config.json names the algorithm or, in older checkpoints,
hf_quant_config.json does. `each_projection` has the names of the tensors:

- NVFP4 has ``weight`` uint8 ``[N, K/2]``, ``weight_scale`` float8_e4m3fn ``[N, K/16]``, and
  ``weight_scale_2``, a float32 number that multiplies all weights of the matrix.
- FP8 has ``weight`` float8_e4m3fn ``[N, K]`` and ``weight_scale``, a float32 number that multiplies
  all weights. The reader returns it once per row.

In mixed checkpoints, the names of a layer's tensors say which of the two it is, or that it is not
quantized. Activations are not quantized, so ``input_scale`` is not read. Source: ModelOpt's
``nvfp4_tensor.py`` and ``export/quant_utils.py``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from typing_extensions import override

from cpumoe.checkpoint.config import MoeConfig
from cpumoe.checkpoint.each_projection import EachProjectionReader
from cpumoe.checkpoint.files import CONFIG_LIMIT, read_json, shown, shown_value
from cpumoe.checkpoint.mixed import by_endings
from cpumoe.checkpoint.reader import WHOLE_MATRIX, ExpectedTensor, ExpertReader, ExpertsInfo
from cpumoe.checkpoint.shards import SafetensorsFolder
from cpumoe.formats import QuantizedMatrix

_CONFIG_NAME = "hf_quant_config.json"
_SCALES, _FACTOR = "weight_scale", "weight_scale_2"
# AWQ multiplies the inputs of a projection by these numbers.
_INPUT_FACTORS = ".pre_quant_scale"
_NVFP4 = ExpertsInfo("nvfp4")
_FP8 = ExpertsInfo("fp8", group_size=WHOLE_MATRIX)
# The forms of experts, by algorithm and by the ends of names that tell them apart.
_ALGORITHMS = {
    "NVFP4": {f".{_FACTOR}": _NVFP4, f".{_SCALES}": _NVFP4},
    "W4A16_NVFP4": {f".{_FACTOR}": _NVFP4, f".{_SCALES}": _NVFP4},
    "FP8": {f".{_SCALES}": _FP8},
    "MIXED_PRECISION": {f".{_FACTOR}": _NVFP4, f".{_SCALES}": _FP8},
}


class ModelOptReader(EachProjectionReader):
    """Reads checkpoints of ModelOpt. The module's documentation has the names."""

    @override
    @classmethod
    def open(cls, folder: SafetensorsFolder, config: MoeConfig) -> ExpertReader:
        """Opens the experts; see `ExpertReader.open`."""
        algorithm = _quantization(folder, config).get("quant_algo")
        forms = _ALGORITHMS.get(algorithm) if isinstance(algorithm, str) else None
        name = shown(str(algorithm)).lower()
        if forms is None:
            known = ", ".join(map(repr, _ALGORITHMS))
            reason = f"quant_algo {shown_value(algorithm)} is not supported, only {known}"
            return cls(folder, config, ExpertsInfo(name, (reason,)))
        experts = list(filter(cls._EXPERT.match, folder.names()))
        if not any(name.endswith(tuple(forms)) for name in experts):
            reason = f"no tensor of a routed expert has a known name that ends in .{_SCALES}"
            return cls(folder, config, ExpertsInfo(name, (reason,)))
        scaled = next((name for name in experts if name.endswith(_INPUT_FACTORS)), None)
        if scaled is not None:
            reason = f"experts whose inputs are scaled are not supported: {shown(scaled)}"
            return cls(folder, config, ExpertsInfo(name, (reason,)))
        return by_endings(cls, folder, config, forms)

    @override
    @classmethod
    def matches(cls, folder: SafetensorsFolder, config: MoeConfig) -> bool:
        """Whether ModelOpt has written the checkpoint, in a supported format or not."""
        return "quant_algo" in _quantization(folder, config)

    @override
    def _projection(self, name: str, n: int, k: int) -> list[ExpectedTensor]:
        pair = self._code_and_scale_tensors((f"{name}.weight", n, k), f"{name}.{_SCALES}")
        if self.format == _NVFP4.format:
            return [*pair, self._number(f"{name}.{_FACTOR}")]
        return [*pair]

    @override
    def _read_projection(self, name: str, n: int, k: int) -> QuantizedMatrix:
        codes, scales, *factor = self._projection(name, n, k)
        return self._read_pair(codes, scales, *map(self._read_number, factor))


def _quantization(folder: SafetensorsFolder, config: MoeConfig) -> Mapping[str, Any]:
    """Returns ModelOpt's description of the quantization; empty: there is none."""
    described: Mapping[str, Any] = config.quantization
    if not described and (folder.path / _CONFIG_NAME).is_file():
        described = read_json(folder.path / _CONFIG_NAME, CONFIG_LIMIT)
    inner = described.get("quantization")
    return inner if isinstance(inner, Mapping) else described
