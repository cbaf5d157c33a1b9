"""FP8 experts whose scales lie beside the weights, as DeepSeek-V3 and others publish them.

`each_projection` has the names of the tensors. ``weight`` is float8_e4m3fn ``[N, K]``. The scale is
multiplied, and is float32, bfloat16 or E8M0. It has one of two shapes:

- ``weight_scale_inv [ceil(N/128), ceil(K/128)]``, if config.json has ``weight_block_size``;
- otherwise one number for the matrix, ``weight_scale_inv`` or ``weight_scale``. The reader returns
  it once per row.

Layers without scales are read as unquantized ones. Activations are not quantized, whatever
config.json says of them. Sources: transformers 5.23 ``finegrained_fp8.py``; vLLM ``fp8.py``.
"""

from __future__ import annotations

from typing_extensions import override

from cpumoe.checkpoint.config import MoeConfig
from cpumoe.checkpoint.each_projection import EachProjectionReader
from cpumoe.checkpoint.files import shown, shown_value
from cpumoe.checkpoint.mixed import by_endings
from cpumoe.checkpoint.reader import WHOLE_MATRIX, ExpectedTensor, ExpertReader, ExpertsInfo
from cpumoe.checkpoint.shards import SafetensorsFolder
from cpumoe.formats import QuantizedMatrix
from cpumoe.formats.quantized_matrix import BLOCK

_FORMAT = "fp8"
_SCALES = ("weight_scale_inv", "weight_scale")


class Fp8Reader(EachProjectionReader):
    """Reads ``quant_method: fp8``. The module's documentation has the names."""

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
        return by_endings(cls, folder, config, dict.fromkeys(_SCALES, info))

    @override
    @classmethod
    def matches(cls, folder: SafetensorsFolder, config: MoeConfig) -> bool:
        """Whether the checkpoint has FP8 weights, supported or not."""
        return config.quantization.get("quant_method") == "fp8"

    @override
    def _projection(self, name: str, n: int, k: int) -> list[ExpectedTensor]:
        names = (f"{name}.{scales}" for scales in _SCALES)
        scales = next(filter(self.folder.__contains__, names), f"{name}.{_SCALES[0]}")
        return [*self._code_and_scale_tensors((f"{name}.weight", n, k), scales)]

    @override
    def _read_projection(self, name: str, n: int, k: int) -> QuantizedMatrix:
        codes, scales = self._projection(name, n, k)
        return self._read_pair(codes, scales)
