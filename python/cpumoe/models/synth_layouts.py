"""The native layouts of checkpoints: config.json, tensor names, dtypes, packing.

Each layout is the counterpart of a reader in `cpumoe.checkpoint`, which names the sources. Only
routed experts and routers are written, no attention and no embeddings.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from typing_extensions import override

from cpumoe._base.random import uniform
from cpumoe.checkpoint.writer import TensorSpec
from cpumoe.formats import QuantizedMatrix
from cpumoe.models.synth_layout import Layout, Piece
from cpumoe.models.synth_published import (
    Fp8BlocksLayout,
    ModelOptLayout,
    Nvfp4PackedLayout,
    PublishedLayout,
)

# Tokens whose hash routing is drawn at once, which bounds the [tokens, experts] temporary.
_HASH_CHUNK = 8192


class DeepseekV4Layout(Layout):
    """DeepSeek-V4: ``layers.{L}.ffn``, int8 codes and E8M0 scales, or float8_e4m3fn codes."""

    @override
    def config(self) -> dict[str, Any]:
        sizes = self.sizes
        attention_rates = [4 if i % 2 == 0 else 128 for i in range(sizes.layers)]
        return {
            "architectures": ["DeepseekV4ForCausalLM"],
            "model_type": self.spec.model_type,
            "vocab_size": self._vocab_size,
            "hidden_size": sizes.hidden,
            "moe_intermediate_size": sizes.intermediate,
            "num_hidden_layers": sizes.layers,
            "num_hash_layers": self._num_hash_layers,
            "n_routed_experts": sizes.experts,
            "n_shared_experts": 1,
            "num_experts_per_tok": sizes.top_k,
            "norm_topk_prob": True,
            "scoring_func": "sqrtsoftplus",
            "routed_scaling_factor": 1.5,
            "swiglu_limit": self.spec.activation.limit,
            "hidden_act": "silu",
            "compress_ratios": [0 if i < 2 else rate for i, rate in enumerate(attention_rates)],
            "num_nextn_predict_layers": 0,
            "expert_dtype": "fp8" if self.format.blocks else "fp4",
            "torch_dtype": "bfloat16",
            "quantization_config": {
                "activation_scheme": "dynamic",
                "fmt": "e4m3",
                "quant_method": "fp8",
                "scale_fmt": "ue8m0",
                "weight_block_size": [128, 128],
            },
        }

    @override
    def tensors(self, layer: int) -> Iterator[TensorSpec]:
        sizes, prefix = self.sizes, f"layers.{layer}.ffn"
        yield TensorSpec(f"{prefix}.gate.weight", torch.bfloat16, (sizes.experts, sizes.hidden))
        if layer < self._num_hash_layers:
            shape = (self._vocab_size, sizes.top_k)
            yield TensorSpec(f"{prefix}.gate.tid2eid", torch.int64, shape)
        else:
            yield TensorSpec(f"{prefix}.gate.bias", torch.float32, (sizes.experts,))
        for index in range(sizes.experts):
            for name, (n, k) in zip(("w1", "w3", "w2"), self.projections, strict=True):
                matrix = f"{prefix}.experts.{index}.{name}"
                codes, scales = self._dtypes
                shape = (n, k * self.format.code_bits // (8 * codes.itemsize))
                yield TensorSpec(f"{matrix}.weight", codes, shape)
                yield TensorSpec(f"{matrix}.scale", scales, self._scale_shape(n, k))

    @override
    def router(self, layer: int, generator: torch.Generator) -> Iterator[Piece]:
        sizes, prefix = self.sizes, f"layers.{layer}.ffn.gate"
        weight = self._normal(sizes.experts, sizes.hidden, generator=generator)
        yield f"{prefix}.weight", 0, weight.bfloat16()
        if layer >= self._num_hash_layers:
            yield f"{prefix}.bias", 0, self._normal(sizes.experts, generator=generator)
            return
        for start in range(0, self._vocab_size, _HASH_CHUNK):
            tokens = min(_HASH_CHUNK, self._vocab_size - start)
            keys = uniform(tokens, sizes.experts, generator=generator)
            yield f"{prefix}.tid2eid", start, keys.topk(sizes.top_k).indices

    @override
    def expert(
        self, layer: int, index: int, matrices: list[QuantizedMatrix], generator: torch.Generator
    ) -> Iterator[Piece]:
        prefix = f"layers.{layer}.ffn.experts.{index}"
        for name, matrix in zip(("w1", "w3", "w2"), matrices, strict=True):
            codes, scales = self._dtypes
            yield f"{prefix}.{name}.weight", 0, matrix.codes.view(codes)
            yield f"{prefix}.{name}.scale", 0, matrix.given_scales.view(scales)

    @property
    def _dtypes(self) -> tuple[torch.dtype, torch.dtype]:
        """The dtypes of codes and scales."""
        if self.format.blocks:
            return torch.float8_e4m3fn, torch.float32
        return torch.int8, torch.float8_e8m0fnu

    @property
    def _vocab_size(self) -> int:
        return int(self.spec.extra["vocab_size"])

    @property
    def _num_hash_layers(self) -> int:
        return min(self.sizes.layers, int(self.spec.extra["num_hash_layers"]))


class GptOssLayout(Layout):
    """gpt-oss: all experts of a layer in one tensor, gate and up rows interleaved, biases."""

    @override
    def check_k(self, k: int, what: str) -> None:
        super().check_k(k, what)
        group = self.format.group_size
        if k % group:
            raise ValueError(
                f"{self.spec.name}: {what} must be a multiple of {group}, because gpt-oss stores "
                f"whole groups, got {k}"
            )

    @override
    def config(self) -> dict[str, Any]:
        sizes, activation = self.sizes, self.spec.activation
        return {
            "architectures": ["GptOssForCausalLM"],
            "model_type": self.spec.model_type,
            "vocab_size": int(self.spec.extra["vocab_size"]),
            "hidden_size": sizes.hidden,
            "intermediate_size": sizes.intermediate,
            "num_hidden_layers": sizes.layers,
            "num_local_experts": sizes.experts,
            "num_experts_per_tok": sizes.top_k,
            "experts_per_token": sizes.top_k,
            "hidden_act": "silu",
            "swiglu_alpha": activation.alpha,
            "swiglu_limit": activation.limit,
            "torch_dtype": "bfloat16",
            "quantization_config": {
                "modules_to_not_convert": [
                    "model.layers.*.self_attn",
                    "model.layers.*.mlp.router",
                    "model.embed_tokens",
                    "lm_head",
                ],
                "quant_method": "mxfp4",
            },
        }

    @override
    def tensors(self, layer: int) -> Iterator[TensorSpec]:
        experts, hidden, inner = self.sizes.experts, self.sizes.hidden, self.sizes.intermediate
        prefix = f"model.layers.{layer}.mlp"
        yield TensorSpec(f"{prefix}.router.weight", torch.bfloat16, (experts, hidden))
        yield TensorSpec(f"{prefix}.router.bias", torch.bfloat16, (experts,))
        for name, n, k in (("gate_up_proj", 2 * inner, hidden), ("down_proj", hidden, inner)):
            matrix = f"{prefix}.experts.{name}"
            groups = k // self.format.group_size
            yield TensorSpec(f"{matrix}_blocks", torch.uint8, (experts, n, groups, 16))
            yield TensorSpec(f"{matrix}_scales", torch.uint8, (experts, n, groups))
            yield TensorSpec(f"{matrix}_bias", torch.bfloat16, (experts, n))

    @override
    def router(self, layer: int, generator: torch.Generator) -> Iterator[Piece]:
        prefix, experts = f"model.layers.{layer}.mlp.router", self.sizes.experts
        weight = self._normal(experts, self.sizes.hidden, generator=generator)
        yield f"{prefix}.weight", 0, weight.bfloat16()
        yield f"{prefix}.bias", 0, self._normal(experts, generator=generator).bfloat16()

    @override
    def expert(
        self, layer: int, index: int, matrices: list[QuantizedMatrix], generator: torch.Generator
    ) -> Iterator[Piece]:
        gate, up, down = matrices
        # Rows gate 0, up 0, gate 1, up 1, ...
        gate_up = QuantizedMatrix(
            torch.stack((gate.codes, up.codes), 1).flatten(0, 1),
            torch.stack((gate.given_scales, up.given_scales), 1).flatten(0, 1),
        )
        for name, matrix in (("gate_up_proj", gate_up), ("down_proj", down)):
            prefix = f"model.layers.{layer}.mlp.experts.{name}"
            n, groups = matrix.given_scales.shape
            yield f"{prefix}_blocks", index, matrix.codes.view(1, n, groups, 16)
            yield f"{prefix}_scales", index, matrix.given_scales[None]
            bias = self._normal(1, n, generator=generator)
            yield f"{prefix}_bias", index, bias.bfloat16()


class CompressedTensorsLayout(Layout):
    """Kimi-K2: compressed-tensors ``pack-quantized`` INT4, routed experts only."""

    scales_vary = True

    @override
    def config(self) -> dict[str, Any]:
        sizes, first = self.sizes, self.spec.first_moe_layer
        text: dict[str, Any] = {
            "architectures": ["DeepseekV3ForCausalLM"],
            "model_type": "kimi_k2",
            "vocab_size": int(self.spec.extra["vocab_size"]),
            "hidden_size": sizes.hidden,
            "moe_intermediate_size": sizes.intermediate,
            "num_hidden_layers": first + sizes.layers,
            "first_k_dense_replace": first,
            "moe_layer_freq": 1,
            "n_routed_experts": sizes.experts,
            "n_shared_experts": 1,
            "num_experts_per_tok": sizes.top_k,
            "n_group": 1,
            "topk_group": 1,
            "topk_method": "noaux_tc",
            "scoring_func": "sigmoid",
            "norm_topk_prob": True,
            "routed_scaling_factor": 2.827,
            "hidden_act": "silu",
            "torch_dtype": "bfloat16",
        }
        quantization = self._quantization()
        if self.spec.model_type == "kimi_k2":
            return {**text, "quantization_config": quantization}
        return {
            "architectures": ["KimiK25ForConditionalGeneration"],
            "model_type": self.spec.model_type,
            "text_config": text,
            "quantization_config": quantization,
        }

    @override
    def tensors(self, layer: int) -> Iterator[TensorSpec]:
        sizes, prefix = self.sizes, self._prefix(layer)
        yield TensorSpec(f"{prefix}.gate.weight", torch.bfloat16, (sizes.experts, sizes.hidden))
        bias = f"{prefix}.gate.e_score_correction_bias"
        yield TensorSpec(bias, torch.float32, (sizes.experts,))
        for index in range(sizes.experts):
            for name, (n, k) in zip(("gate", "up", "down"), self.projections, strict=True):
                matrix = f"{prefix}.experts.{index}.{name}_proj"
                yield TensorSpec(f"{matrix}.weight_packed", torch.int32, (n, -(-k // 8)))
                yield self._scales(f"{matrix}.weight_scale", n, k, torch.bfloat16)
                yield TensorSpec(f"{matrix}.weight_shape", torch.int64, (2,))

    @override
    def router(self, layer: int, generator: torch.Generator) -> Iterator[Piece]:
        prefix, experts = f"{self._prefix(layer)}.gate", self.sizes.experts
        weight = self._normal(experts, self.sizes.hidden, generator=generator)
        yield f"{prefix}.weight", 0, weight.bfloat16()
        bias = self._normal(experts, generator=generator)
        yield f"{prefix}.e_score_correction_bias", 0, bias

    @override
    def expert(
        self, layer: int, index: int, matrices: list[QuantizedMatrix], generator: torch.Generator
    ) -> Iterator[Piece]:
        prefix = f"{self._prefix(layer)}.experts.{index}"
        for name, matrix in zip(("gate", "up", "down"), matrices, strict=True):
            words = torch.nn.functional.pad(matrix.codes, (0, -matrix.codes.shape[1] % 4))
            yield f"{prefix}.{name}_proj.weight_packed", 0, words.view(torch.int32)
            yield f"{prefix}.{name}_proj.weight_scale", 0, matrix.given_scales
            yield f"{prefix}.{name}_proj.weight_shape", 0, torch.tensor(matrix.shape, device="cpu")

    def _prefix(self, layer: int) -> str:
        return f"{self.spec.extra['prefix']}layers.{layer}.mlp"

    def _quantization(self) -> dict[str, Any]:
        return {
            "config_groups": {
                "group_0": {
                    "input_activations": None,
                    "output_activations": None,
                    "targets": ["Linear"],
                    "weights": {
                        "actorder": None,
                        "block_structure": None,
                        "dynamic": False,
                        "group_size": None if self.scales.by_row else self._group_size,
                        "num_bits": self.format.code_bits,
                        "observer": "minmax",
                        "observer_kwargs": {},
                        "strategy": "channel" if self.scales.by_row else "group",
                        "symmetric": True,
                        "type": "int",
                    },
                }
            },
            "format": "pack-quantized",
            "ignore": [
                "lm_head",
                "re:.*self_attn.*",
                "re:.*shared_experts.*",
                "re:.*mlp\\.(gate|up|gate_up|down)_proj.*",
            ],
            "kv_cache_scheme": None,
            "quant_method": "compressed-tensors",
            "quantization_status": "compressed",
        }


LAYOUTS: dict[str, type[Layout]] = {
    "deepseek_v4": DeepseekV4Layout,
    "gpt_oss": GptOssLayout,
    "compressed_tensors": CompressedTensorsLayout,
    "published": PublishedLayout,
    "fp8_blocks": Fp8BlocksLayout,
    "modelopt": ModelOptLayout,
    "nvfp4_packed": Nvfp4PackedLayout,
}
