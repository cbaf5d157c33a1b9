"""The model registry: names, aliases, expert shapes and formats of known MoE models.

Sizes are those of each model's published ``config.json``.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Literal

from cpumoe._base.renamed import old_attribute
from cpumoe.formats import WEIGHT_FORMATS
from cpumoe.numerics.glu import GLU, SwiGLU

CheckpointLayout = Literal[
    "deepseek_v4",
    "gpt_oss",
    "compressed_tensors",
    "published",
    "fp8_blocks",
    "modelopt",
    "nvfp4_packed",
    "other",
]

PLAIN_SWIGLU = SwiGLU()
DEEPSEEK_V4_SWIGLU = SwiGLU(limit=10.0)
GPT_OSS_SWIGLU = SwiGLU(alpha=1.702, limit=7.0, up_offset=1.0)

# Stored bits per weight of checkpoint formats that are not in WEIGHT_FORMATS. MXFP8 has one E8M0
# scale per 32 weights.
_OTHER_FORMAT_BITS = {"mxfp8": 8 + 8 / 32}


@dataclass(frozen=True)
class ModelSpec:
    """One MoE model.

    Attributes:
        name: canonical name.
        aliases: Hugging Face repository ids and short names.
        model_type: ``model_type`` in config.json.
        layout: tensor names and config of the checkpoint; ``"other"`` has no reader yet.
        hidden_size: width of the residual stream.
        moe_intermediate_size: inner width of one routed expert.
        num_hidden_layers: number of decoder layers, dense ones included.
        num_experts: number of routed experts per MoE layer.
        top_k: number of routed experts per token.
        weight_format: format of the routed experts in the published checkpoint.
        first_moe_layer: number of dense layers before the first MoE layer.
        activation: the experts' activation.
        has_bias: whether the experts' projections have biases.
        extra: further parameters of the checkpoint layout (``vocab_size``, ``num_hash_layers``,
            ``prefix``).
    """

    name: str
    aliases: tuple[str, ...]
    model_type: str
    layout: CheckpointLayout
    hidden_size: int
    moe_intermediate_size: int
    num_hidden_layers: int
    num_experts: int
    top_k: int
    weight_format: str
    first_moe_layer: int = 0
    activation: GLU = PLAIN_SWIGLU
    has_bias: bool = False
    extra: Mapping[str, int | str] = field(default_factory=dict)

    swiglu = old_attribute("ModelSpec", "swiglu", "activation")

    @property
    def num_moe_layers(self) -> int:
        """Layers with routed experts."""
        return self.num_hidden_layers - self.first_moe_layer

    @property
    def bits_per_weight(self) -> float:
        """Stored bits per routed-expert weight, scales included."""
        if self.weight_format in WEIGHT_FORMATS:
            return WEIGHT_FORMATS[self.weight_format].bits_per_weight
        return _OTHER_FORMAT_BITS[self.weight_format]

    @property
    def expert_params(self) -> int:
        """Weights of one routed expert: gate, up and down, without biases."""
        return 3 * self.hidden_size * self.moe_intermediate_size

    @property
    def expert_bytes(self) -> int:
        """Stored bytes of one routed expert, with bf16 biases where it has them."""
        bias_bytes = 2 * (2 * self.moe_intermediate_size + self.hidden_size) * self.has_bias
        return int(self.expert_params * self.bits_per_weight / 8) + bias_bytes

    @property
    def layer_bytes(self) -> int:
        """Stored bytes of one layer's routed experts."""
        return self.num_experts * self.expert_bytes

    @property
    def routed_expert_bytes(self) -> int:
        """Stored bytes of all routed experts."""
        return self.num_moe_layers * self.layer_bytes

    @property
    def token_bytes(self) -> int:
        """Bytes of routed-expert weights that one token reads in all layers."""
        return self.num_moe_layers * self.top_k * self.expert_bytes


def _spec(
    name: str,
    aliases: tuple[str, ...],
    model_type: str,
    sizes: tuple[int, int, int, int, int],
    weight_format: str,
    *,
    first_moe_layer: int = 0,
    layout: CheckpointLayout = "other",
    activation: GLU = PLAIN_SWIGLU,
    has_bias: bool = False,
    **extra: int | str,
) -> ModelSpec:
    hidden, intermediate, layers, experts, top_k = sizes
    return ModelSpec(
        name=name,
        aliases=aliases,
        model_type=model_type,
        layout=layout,
        hidden_size=hidden,
        moe_intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_experts=experts,
        top_k=top_k,
        weight_format=weight_format,
        first_moe_layer=first_moe_layer,
        activation=activation,
        has_bias=has_bias,
        extra=extra,
    )


def _gpt_oss(name: str, layers: int, experts: int) -> ModelSpec:
    return _spec(
        name,
        (f"openai/{name}",),
        "gpt_oss",
        (2880, 2880, layers, experts, 4),
        "mxfp4",
        layout="gpt_oss",
        activation=GPT_OSS_SWIGLU,
        has_bias=True,
        vocab_size=201088,
    )


def _kimi_int4(name: str, short: str, model_type: str, prefix: str) -> ModelSpec:
    return _spec(
        name,
        (f"moonshotai/{name}", short),
        model_type,
        (7168, 2048, 61, 384, 8),
        "int4",
        first_moe_layer=1,
        layout="compressed_tensors",
        vocab_size=163840,
        prefix=prefix,
    )


def _each_projection(
    weight_format: str,
    layout: CheckpointLayout,
    name: str,
    owner: str,
    model_type: str,
    sizes: tuple[int, int, int, int, int],
    vocab_size: int,
    *endings: str,
    dense: int = 0,
) -> ModelSpec:
    """Returns a model with tensors for each projection of each expert.

    Its repositories are called `name` with each of the endings. Its first `dense` layers have no
    experts.
    """
    return _spec(
        name,
        tuple(f"{owner}/{name}{ending}" for ending in endings or ("",)),
        model_type,
        sizes,
        weight_format,
        first_moe_layer=dense,
        layout=layout,
        vocab_size=vocab_size,
    )


_bf16 = partial(_each_projection, "bf16", "published")
_fp8 = partial(_each_projection, "fp8", "fp8_blocks")
_V3_SIZES = (7168, 2048, 61, 256, 8)

# name, aliases, model_type, (hidden, intermediate, layers, experts, top_k), weight format
MODELS: tuple[ModelSpec, ...] = (
    _spec(
        "DeepSeek-V4-Flash",
        ("deepseek-ai/DeepSeek-V4-Flash", "v4-flash", "deepseek-v4"),
        "deepseek_v4",
        (4096, 2048, 43, 256, 6),
        "mxfp4",
        layout="deepseek_v4",
        activation=DEEPSEEK_V4_SWIGLU,
        vocab_size=129280,
        num_hash_layers=3,
    ),
    _spec(
        "DeepSeek-V4-Flash-Base",
        ("deepseek-ai/DeepSeek-V4-Flash-Base", "v4-flash-base"),
        "deepseek_v4",
        (4096, 2048, 43, 256, 6),
        "fp8",
        layout="deepseek_v4",
        activation=DEEPSEEK_V4_SWIGLU,
        vocab_size=129280,
        num_hash_layers=3,
    ),
    _gpt_oss("gpt-oss-20b", 24, 32),
    _gpt_oss("gpt-oss-120b", 36, 128),
    _kimi_int4("Kimi-K2-Thinking", "kimi-k2", "kimi_k2", "model."),
    _kimi_int4("Kimi-K2.5", "kimi-k25", "kimi_k25", "language_model.model."),
    _fp8(
        "Kimi-K2-Instruct", "moonshotai", "kimi_k2", (7168, 2048, 61, 384, 8), 163840, "", dense=1
    ),
    _fp8("DeepSeek-V3", "deepseek-ai", "deepseek_v3", _V3_SIZES, 129280, "", "-0324", dense=3),
    _fp8("DeepSeek-V3.1", "deepseek-ai", "deepseek_v3", _V3_SIZES, 129280, dense=3),
    _fp8("DeepSeek-R1", "deepseek-ai", "deepseek_v3", _V3_SIZES, 129280, "", "-0528", dense=3),
    _each_projection(
        "nvfp4",
        "modelopt",
        "DeepSeek-R1-NVFP4",
        "nvidia",
        "deepseek_v3",
        _V3_SIZES,
        129280,
        dense=3,
    ),
    _fp8("MiniMax-M2", "MiniMaxAI", "minimax_m2", (3072, 1536, 62, 256, 8), 200064),
    _bf16(
        "Qwen3-30B-A3B", "Qwen", "qwen3_moe", (2048, 768, 48, 128, 8), 151936, "", "-Instruct-2507"
    ),
    _each_projection(
        "nvfp4",
        "nvfp4_packed",
        "Qwen3-30B-A3B-NVFP4",
        "RedHatAI",
        "qwen3_moe",
        (2048, 768, 48, 128, 8),
        151936,
    ),
    _bf16(
        "Qwen3-235B-A22B",
        "Qwen",
        "qwen3_moe",
        (4096, 1536, 94, 128, 8),
        151936,
        "",
        "-Instruct-2507",
    ),
    _bf16("Qwen3-Next-80B-A3B-Instruct", "Qwen", "qwen3_next", (2048, 512, 48, 512, 10), 151936),
    _bf16(
        "Mixtral-8x7B",
        "mistralai",
        "mixtral",
        (4096, 14336, 32, 8, 2),
        32000,
        "-v0.1",
        "-Instruct-v0.1",
    ),
    _bf16("Mixtral-8x22B", "mistralai", "mixtral", (6144, 16384, 56, 8, 2), 32000, "-v0.1"),
    _bf16(
        "Mixtral-8x22B-Instruct", "mistralai", "mixtral", (6144, 16384, 56, 8, 2), 32768, "-v0.1"
    ),
    _bf16("OLMoE-1B-7B", "allenai", "olmoe", (2048, 1024, 16, 64, 8), 50304, "-0924"),
    _bf16(
        "DeepSeek-V2-Lite",
        "deepseek-ai",
        "deepseek_v2",
        (2048, 1408, 27, 64, 6),
        102400,
        dense=1,
    ),
    _bf16("GLM-4.5-Air", "zai-org", "glm4_moe", (4096, 1408, 46, 128, 8), 151552, dense=1),
    _bf16("GLM-4.6", "zai-org", "glm4_moe", (5120, 1536, 92, 160, 8), 151552, dense=3),
)

_BY_NAME = {name.lower(): spec for spec in MODELS for name in (spec.name, *spec.aliases)}


def find_model(name: str) -> ModelSpec:
    """Returns the model with this canonical name or alias, in upper or lower case.

    Raises:
        ValueError: the model is unknown; the message names close matches and the known models.
    """
    spec = _BY_NAME.get(name.strip().lower())
    if spec is not None:
        return spec
    close = difflib.get_close_matches(name.strip().lower(), _BY_NAME, n=3)
    matches = list(dict.fromkeys(_BY_NAME[key].name for key in close))
    hint = f" (did you mean {' or '.join(matches)}?)" if matches else ""
    known = ", ".join(spec.name for spec in MODELS)
    raise ValueError(f"unknown model {name!r}{hint}; known models: {known}")
