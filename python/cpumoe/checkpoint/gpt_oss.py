"""gpt-oss: MXFP4 experts, all of a layer in one tensor.

``model.layers.{L}.mlp.experts.{gate_up_proj,down_proj}_{blocks,scales,bias}``: blocks uint8
``[experts, N, K/32, 16]``, scales uint8 ``[experts, N, K/32]``, bias bf16 ``[experts, N]``. Rows of
gate_up_proj are interleaved: gate 0, up 0, gate 1, up 1, ... Source: transformers 5.23
``integrations/mxfp4.py`` and ``gpt_oss``.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from typing_extensions import override

from cpumoe.checkpoint.config import MoeConfig, limit, positive_number
from cpumoe.checkpoint.reader import ExpectedTensor, ExpertReader, ExpertsInfo, ExpertWeights
from cpumoe.checkpoint.shards import SafetensorsFolder
from cpumoe.formats import QuantizedMatrix
from cpumoe.swiglu import SwiGLU

# Published configs may leave these out; transformers' GptOssConfig has the same defaults.
_DEFAULT_SWIGLU_ALPHA = 1.702
_DEFAULT_SWIGLU_LIMIT = 7.0

_BLOCK_BYTES = 16


class GptOssReader(ExpertReader):
    """Reads ``model_type: gpt_oss`` with ``quant_method: mxfp4`` (see the module for names)."""

    has_bias = True

    @override
    @staticmethod
    def _identify(folder: SafetensorsFolder, config: MoeConfig) -> ExpertsInfo:
        swiglu = SwiGLU(
            alpha=positive_number(config.text, "swiglu_alpha", _DEFAULT_SWIGLU_ALPHA),
            limit=limit(config.text, "swiglu_limit", _DEFAULT_SWIGLU_LIMIT),
            up_offset=1.0,
        )
        return ExpertsInfo("mxfp4", swiglu)

    @override
    @classmethod
    def matches(cls, folder: SafetensorsFolder, config: MoeConfig) -> bool:
        """gpt-oss as published; its bf16 conversions are another reader's."""
        return config.model_type == "gpt_oss" and config.quantization.get("quant_method") == "mxfp4"

    @override
    def _layer_prefix(self, layer: int) -> str | None:
        name = f"model.layers.{layer}.mlp.experts."
        return name if f"{name}gate_up_proj_blocks" in self.folder else None

    @override
    def _expert_tensors(self, prefix: str, index: int) -> Iterator[ExpectedTensor]:
        hidden, inner = self.hidden_size, self.intermediate_size
        for name, n, k in (("gate_up_proj", 2 * inner, hidden), ("down_proj", hidden, inner)):
            yield from self._projection(f"{prefix}{name}", n, k)
            yield self._bias(f"{prefix}{name}_bias", n)

    @override
    def _read_expert(self, prefix: str, index: int) -> ExpertWeights:
        hidden, inner = self.hidden_size, self.intermediate_size
        gate_up = self._read_projection(f"{prefix}gate_up_proj", index, 2 * inner, hidden)
        gate_up_bias = self._read_bias(f"{prefix}gate_up_proj_bias", index, 2 * inner)
        return ExpertWeights(
            gate=_every_second_row(gate_up, 0),
            up=_every_second_row(gate_up, 1),
            down=self._read_projection(f"{prefix}down_proj", index, hidden, inner),
            gate_bias=gate_up_bias[0::2].contiguous(),
            up_bias=gate_up_bias[1::2].contiguous(),
            down_bias=self._read_bias(f"{prefix}down_proj_bias", index, hidden),
        )

    def _read_projection(self, name: str, index: int, n: int, k: int) -> QuantizedMatrix:
        codes, scales = self._projection(name, n, k)
        return self._matrix(
            self.folder.tensor(*codes)[index].view(n, k // 2),
            self.folder.tensor(*scales)[index],
            f"{codes[0]}[{index}]",
            f"{scales[0]}[{index}]",
        )

    def _read_bias(self, name: str, index: int, n: int) -> torch.Tensor:
        return self.folder.tensor(*self._bias(name, n))[index]

    def _projection(self, name: str, n: int, k: int) -> tuple[ExpectedTensor, ExpectedTensor]:
        fmt = self._weight_format
        stack = (self.num_experts, n, k // fmt.group_size)
        return (
            (f"{name}_blocks", fmt.code_dtypes, (*stack, _BLOCK_BYTES)),
            (f"{name}_scales", fmt.scale_dtypes, stack),
        )

    def _bias(self, name: str, n: int) -> ExpectedTensor:
        return name, (torch.bfloat16,), (self.num_experts, n)


def _every_second_row(matrix: QuantizedMatrix, first: int) -> QuantizedMatrix:
    name = f"{matrix.name}[{first}::2]"
    return QuantizedMatrix(matrix.codes[first::2], matrix.scales[first::2], name=name)
