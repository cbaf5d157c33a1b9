"""Layouts with a tensor for each projection of each expert: bf16, FP8 in blocks, and NVFP4."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar, NamedTuple

import torch
from typing_extensions import override

from cpumoe.checkpoint.writer import TensorSpec
from cpumoe.formats import QuantizedMatrix
from cpumoe.formats.quantized_matrix import BLOCK
from cpumoe.models.synth_layout import Layout, Piece

_ONE = torch.ones((), dtype=torch.float32, device="cpu")


class _Family(NamedTuple):
    """What config and tensors of a family are called."""

    architecture: str
    experts: str = "num_experts"
    inner: str = "moe_intermediate_size"
    block: str = "mlp"
    names: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")


_BLOCK_SPARSE = _Family(
    "MixtralForCausalLM",
    experts="num_local_experts",
    inner="intermediate_size",
    block="block_sparse_moe",
    names=("w1", "w3", "w2"),
)
_FAMILIES = {
    "deepseek_v3": _Family("DeepseekV3ForCausalLM", experts="n_routed_experts"),
    "kimi_k2": _Family("DeepseekV3ForCausalLM", experts="n_routed_experts"),
    "minimax_m2": _BLOCK_SPARSE._replace(architecture="MiniMaxM2ForCausalLM"),
    "deepseek_v2": _Family("DeepseekV2ForCausalLM", experts="n_routed_experts"),
    "glm4_moe": _Family("Glm4MoeForCausalLM", experts="n_routed_experts"),
    "mixtral": _BLOCK_SPARSE,
    "olmoe": _Family("OlmoeForCausalLM", inner="intermediate_size"),
    "qwen3_moe": _Family("Qwen3MoeForCausalLM"),
    "qwen3_next": _Family("Qwen3NextForCausalLM"),
}


class PublishedLayout(Layout):
    """bf16 as most families publish it: a tensor for each projection of each expert."""

    @override
    def config(self) -> dict[str, Any]:
        sizes, first, family = self.sizes, self.spec.first_moe_layer, self._family
        text: dict[str, Any] = {
            "architectures": [family.architecture],
            "model_type": self.spec.model_type,
            "vocab_size": int(self.spec.extra["vocab_size"]),
            "hidden_size": sizes.hidden,
            family.inner: sizes.intermediate,
            "num_hidden_layers": first + sizes.layers,
            family.experts: sizes.experts,
            "num_experts_per_tok": sizes.top_k,
            "hidden_act": "silu",
            "torch_dtype": "bfloat16",
        }
        return {**text, "first_k_dense_replace": first} if first else text

    @override
    def tensors(self, layer: int) -> Iterator[TensorSpec]:
        sizes, prefix = self.sizes, self._prefix(layer)
        yield TensorSpec(f"{prefix}.gate.weight", torch.bfloat16, (sizes.experts, sizes.hidden))
        for index in range(sizes.experts):
            for name, shape in zip(self._family.names, self.projections, strict=True):
                yield TensorSpec(f"{prefix}.experts.{index}.{name}.weight", torch.bfloat16, shape)

    @override
    def router(self, layer: int, generator: torch.Generator) -> Iterator[Piece]:
        weight = self._normal(self.sizes.experts, self.sizes.hidden, generator=generator)
        yield f"{self._prefix(layer)}.gate.weight", 0, weight.bfloat16()

    @override
    def expert(
        self, layer: int, index: int, matrices: list[QuantizedMatrix], generator: torch.Generator
    ) -> Iterator[Piece]:
        for name, matrix in zip(self._family.names, matrices, strict=True):
            yield f"{self._prefix(layer)}.experts.{index}.{name}.weight", 0, matrix.codes

    def _prefix(self, layer: int) -> str:
        return f"model.layers.{layer}.{self._family.block}"

    @property
    def _family(self) -> _Family:
        return _FAMILIES[self.spec.model_type]


class Fp8BlocksLayout(PublishedLayout):
    """FP8 with scales beside each projection of each expert.

    Scales of blocks are called ``weight_scale_inv``. With scales of rows, this is
    compressed-tensors' ``float-quantized``.
    """

    scales_vary = True

    @override
    def config(self) -> dict[str, Any]:
        quantization: dict[str, Any] = {
            "activation_scheme": "dynamic",
            "fmt": "e4m3",
            "quant_method": "fp8",
            "weight_block_size": [BLOCK, BLOCK],
        }
        if self.scales.by_row:
            weights = {"num_bits": 8, "strategy": "channel", "symmetric": True, "type": "float"}
            group = {"input_activations": None, "targets": ["Linear"], "weights": weights}
            quantization = {
                "config_groups": {"group_0": group},
                "format": "float-quantized",
                "ignore": ["lm_head", "re:.*self_attn.*", "re:.*mlp\\.gate$"],
                "quant_method": "compressed-tensors",
                "quantization_status": "compressed",
            }
        return {**super().config(), "quantization_config": quantization}

    @property
    def _scales_name(self) -> str:
        return "_scale" if self.scales.by_row else "_scale_inv"

    @override
    def tensors(self, layer: int) -> Iterator[TensorSpec]:
        experts = f"{self._prefix(layer)}.experts."
        for tensor in super().tensors(layer):
            if not tensor.name.startswith(experts):
                yield tensor
                continue
            n, k = tensor.shape
            yield TensorSpec(tensor.name, self.format.code_storage, (n, k))
            yield self._scales(f"{tensor.name}{self._scales_name}", n, k, torch.float32)

    @override
    def expert(
        self, layer: int, index: int, matrices: list[QuantizedMatrix], generator: torch.Generator
    ) -> Iterator[Piece]:
        pieces = super().expert(layer, index, matrices, generator)
        for (name, row, codes), matrix in zip(pieces, matrices, strict=True):
            yield name, row, codes
            yield f"{name}{self._scales_name}", row, matrix.given_scales


class ModelOptLayout(PublishedLayout):
    """ModelOpt's NVFP4: packed codes, ``weight_scale`` and a factor, ``weight_scale_2``."""

    _CODES, _FACTOR, _INPUT = "weight", "weight_scale_2", "input_scale"
    # The shape of a number.
    _NUMBER: ClassVar[tuple[int, ...]] = ()

    @override
    def config(self) -> dict[str, Any]:
        return {**super().config(), "quantization_config": self._quantization()}

    def _quantization(self) -> dict[str, Any]:
        weights = {"dynamic": False, "num_bits": 4, "type": "float", "group_size": 16}
        return {
            "config_groups": {
                "group_0": {"weights": weights, "input_activations": weights, "targets": ["Linear"]}
            },
            "ignore": ["lm_head", "model.layers.*.self_attn*", "model.layers.*.mlp.gate"],
            "quant_algo": "NVFP4",
            "kv_cache_scheme": {"dynamic": False, "num_bits": 8, "type": "float"},
            "producer": {"name": "modelopt", "version": "0.33.0"},
            "quant_method": "modelopt",
        }

    @override
    def tensors(self, layer: int) -> Iterator[TensorSpec]:
        experts = f"{self._prefix(layer)}.experts."
        for tensor in super().tensors(layer):
            if not tensor.name.startswith(experts):
                yield tensor
                continue
            (n, k), stem = tensor.shape, tensor.name.removesuffix("weight")
            yield TensorSpec(f"{stem}{self._CODES}", torch.uint8, (n, k // 2))
            scales = self._scale_shape(n, k)
            yield TensorSpec(f"{stem}weight_scale", torch.float8_e4m3fn, scales)
            yield TensorSpec(f"{stem}{self._FACTOR}", torch.float32, self._NUMBER)
            yield TensorSpec(f"{stem}{self._INPUT}", torch.float32, self._NUMBER)

    @override
    def expert(
        self, layer: int, index: int, matrices: list[QuantizedMatrix], generator: torch.Generator
    ) -> Iterator[Piece]:
        for name, matrix in zip(self._family.names, matrices, strict=True):
            stem = f"{self._prefix(layer)}.experts.{index}.{name}."
            assert matrix.factor is not None
            yield f"{stem}{self._CODES}", 0, matrix.codes
            yield f"{stem}weight_scale", 0, matrix.given_scales
            for kind, factor in ((self._FACTOR, matrix.factor), (self._INPUT, _ONE)):
                yield f"{stem}{kind}", 0, self._stored(factor).reshape(self._NUMBER)

    def _stored(self, factor: torch.Tensor) -> torch.Tensor:
        """Returns a factor as the checkpoint stores it."""
        return factor


class Nvfp4PackedLayout(ModelOptLayout):
    """compressed-tensors ``nvfp4-pack-quantized``, which stores 1 / factor, as ``[1]``."""

    _CODES, _FACTOR, _INPUT = "weight_packed", "weight_global_scale", "input_global_scale"
    _NUMBER = (1,)

    @override
    def _quantization(self) -> dict[str, Any]:
        weights = {
            "dynamic": False,
            "group_size": 16,
            "num_bits": 4,
            "strategy": "tensor_group",
            "symmetric": True,
            "type": "float",
        }
        group = {
            "input_activations": {**weights, "dynamic": "local"},
            "targets": ["Linear"],
            "weights": weights,
        }
        return {
            "config_groups": {"group_0": group},
            "format": "nvfp4-pack-quantized",
            "ignore": ["lm_head", "re:.*self_attn.*", "re:.*mlp\\.gate$"],
            "kv_cache_scheme": None,
            "quant_method": "compressed-tensors",
            "quantization_status": "compressed",
        }

    @override
    def _stored(self, factor: torch.Tensor) -> torch.Tensor:
        return factor.reciprocal()
