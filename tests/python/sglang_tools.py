"""Layers for SGLang's module, and a plain computation of what they must give."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from checkpoint_tools import write_small
from moe_tools import Inputs

import cpumoe
from cpumoe import SwiGLU, open_checkpoint
from cpumoe.integrations.sglang.kt_kernel import KTMoEWrapper

EXPERTS, HIDDEN, INTERMEDIATE, TOP_K = 8, 64, 128, 3
SIZES = {
    "experts": EXPERTS,
    "hidden": HIDDEN,
    "intermediate": INTERMEDIATE,
    "top_k": TOP_K,
}
# Relative to the norm of the result. Rounding of the output to bf16 is 1.7e-3 of it.
TOLERANCES = {torch.bfloat16: 4e-3, torch.float16: 4e-3, torch.float32: 2e-5}


METHODS = {
    ("mxfp4", False): "MXFP4",
    ("int4", False): "RAWINT4",
    ("fp8", False): "FP8",
    ("fp8", True): "FP8_PERCHANNEL",
    ("bf16", False): "BF16",
    ("nvfp4", False): "NVFP4",
}


def checkpoint(folder: Path, model: str = "v4-flash", *, layers: int = 2, **sizes: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return write_small(folder, model, **{**SIZES, "layers": layers, **sizes})


def arguments(folder: Path, **changes: Any) -> dict[str, Any]:
    """What SGLang passes for a layer of `checkpoint`."""
    reader = open_checkpoint(folder)
    common = {
        "layer_idx": reader.layers()[0],
        "num_experts": reader.num_experts,
        "num_experts_per_tok": TOP_K,
        "hidden_size": reader.hidden_size,
        "moe_intermediate_size": reader.intermediate_size,
        "cpuinfer_threads": 2,
        "threadpool_count": 1,
        "weight_path": str(folder),
        "chunked_prefill_size": 512,
        "method": METHODS[reader.format, _has_row_scales(reader)],
    }
    return {**common, **changes}


def _has_row_scales(reader: cpumoe.ExpertReader) -> bool:
    down = reader.expert(reader.layers()[0], 0).down
    return down.scales is not None and down.scales.shape == (reader.hidden_size, 1)


def loaded(folder: Path, *, slots: torch.Tensor | None = None, **changes: Any) -> KTMoEWrapper:
    wrapper = KTMoEWrapper(**arguments(folder, **changes))
    wrapper.load_weights(torch.arange(wrapper.num_experts) if slots is None else slots)
    return wrapper


def gpu(*experts: int, of: int = EXPERTS) -> torch.Tensor:
    """The mask of the experts that the GPU has."""
    mask = torch.zeros(of, dtype=torch.bool)
    mask[list(experts)] = True
    return mask


def batch(tokens: int, *, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> Inputs:
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(tokens, EXPERTS, generator=generator)
    return Inputs(
        torch.randn(tokens, HIDDEN, generator=generator).to(dtype),
        scores.topk(TOP_K).indices,
        torch.rand(tokens, TOP_K, generator=generator).softmax(-1),
    )


def oracle(
    folder: Path,
    args: Inputs,
    *,
    layer: int | None = None,
    mask: torch.Tensor | None = None,
    slots: list[int] | None = None,
    activation: SwiGLU | None = None,
) -> torch.Tensor:
    """The sum of the experts in float64, from the checkpoint's codes and scales."""
    x, ids, weights = args
    with open_checkpoint(folder) as reader:
        layer = reader.layers()[0] if layer is None else layer
        count = reader.num_experts
        experts = [reader.expert(layer, i) for i in slots or range(count)]
        known = ids.clone()
        known[(ids < 0) | (ids >= count)] = -1
        return cpumoe.reference.experts_forward(
            x,
            known,
            weights,
            [expert.gate for expert in experts],
            [expert.up for expert in experts],
            [expert.down for expert in experts],
            format=reader.format,
            activation=activation or reader.known_activation(),
            expert_mask=mask,
        )


def assert_close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    assert actual.shape == expected.shape
    error = (actual.double() - expected).norm() / expected.norm().clamp(min=1e-12)
    assert actual.numel() == 0 or float(error) <= TOLERANCES[actual.dtype], f"error {error:.2e}"


def run(wrapper: KTMoEWrapper, args: Inputs) -> torch.Tensor:
    """Makes a call as SGLang does, without a stream."""
    wrapper.submit_forward(*args, None)
    return wrapper.sync_forward(args.hidden_states, None)
