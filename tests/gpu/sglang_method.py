"""Runs the installed SGLang's KTEPWrapperMethod, unmodified, without the rest of SGLang.

The experts of the GPU are computed by PyTorch, and those of the CPU by cpumoe. SGLang itself and
its fork sglang-kt both have the class, with other settings.
"""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import sys
from collections.abc import Callable
from importlib.metadata import packages_distributions, version
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from tests.gpu.gpu_tools import (
    Batch,
    Device,
    Sizes,
    arguments,
    call,
    make_batch,
    make_layers,
)
from tests.gpu.results import PASS, SKIPPED, check, report, run_parts

from cpumoe import open_checkpoint, weight_format
from cpumoe.integrations.sglang import kt_kernel

SIZES = Sizes(layers=2)
GPU_EXPERTS = 6
TOLERANCE = 1e-2  # relative to the norm; both halves are rounded to bf16
HOST = "sglang.srt.layers.moe.kt_ep_wrapper"
LOCATIONS = "sglang.srt.eplb.expert_location_dispatch"


class TorchExperts(torch.nn.Module):
    """The GPU's half: experts in bf16 that a graph can capture."""

    def __init__(self, folder: Path, layer: int, device: torch.device) -> None:
        """Reads the experts."""
        super().__init__()
        dequantize = weight_format("mxfp4").dequantize
        with open_checkpoint(folder) as reader:
            experts = [reader.expert(layer, expert) for expert in range(GPU_EXPERTS)]
            limit = reader.known_activation().limit
        self.limit = float("inf") if limit is None else limit
        self.gate, self.up, self.down = (
            torch.stack([dequantize(*_parts(getattr(e, name))) for e in experts])
            .to(torch.bfloat16)
            .to(device)
            for name in ("gate", "up", "down")
        )

    def create_weights(self, layer: torch.nn.Module, **_: object) -> None:
        """Gives the layer a parameter, which says where the layer is."""
        layer.register_parameter(
            "probe", torch.nn.Parameter(torch.zeros(1, device=self.gate.device))
        )

    def create_moe_runner(self, layer: torch.nn.Module, config: object) -> None:
        """Needs none."""

    def apply(self, layer: torch.nn.Module, dispatch: Any) -> Any:
        """Computes the experts whose ids are not negative."""
        from sglang.srt.layers.moe.token_dispatcher import StandardCombineInput

        x, topk = dispatch.hidden_states, dispatch.topk_output
        total = torch.zeros_like(x, dtype=torch.float32)
        for expert in range(GPU_EXPERTS):
            share = (topk.topk_weights * (topk.topk_ids == expert)).sum(-1, keepdim=True)
            gate = (x @ self.gate[expert].T).clamp(max=self.limit)
            up = (x @ self.up[expert].T).clamp(-self.limit, self.limit)
            inner = torch.nn.functional.silu(gate.float()) * up.float()
            total += share * (inner.to(x.dtype) @ self.down[expert].T).float()
        return StandardCombineInput(hidden_states=total.to(x.dtype))


def _parts(matrix: Any) -> tuple[torch.Tensor, torch.Tensor]:
    return matrix.codes, matrix.scales


class Method:
    """A layer whose experts KTEPWrapperMethod divides."""

    def __init__(self, host: ModuleType, folder: Path, index: int, device: torch.device) -> None:
        """Goes through SGLang's steps of loading a model."""
        mask = torch.arange(SIZES.experts) < GPU_EXPERTS
        values = {
            "layer_idx": index,
            "num_gpu_experts": GPU_EXPERTS,
            "gpu_experts_mask": mask,
            "cpuinfer_threads": None,
            "threadpool_count": 1,
            "weight_path": str(folder),
            "chunked_prefill_size": 512,
            "method": "MXFP4",
            "max_deferred_experts_per_token": None,
            "num_layers": SIZES.layers,
        }
        fields = {field.name for field in dataclasses.fields(host.KTConfig)}
        config = host.KTConfig(**{name: v for name, v in values.items() if name in fields})
        self.method = host.KTEPWrapperMethod(TorchExperts(folder, index, device), config)
        self.layer = torch.nn.Module()
        self.layer.top_k = SIZES.top_k
        self.layer.num_experts = SIZES.experts
        self.layer.moe_tp_size = 1
        self.layer.intermediate_size_per_partition = SIZES.intermediate
        self.method.create_weights(
            self.layer, SIZES.experts, SIZES.hidden, SIZES.intermediate, torch.bfloat16
        )
        runner = SimpleNamespace(activation="silu", num_local_experts=SIZES.experts)
        self.method.moe_runner_config = runner
        self.method.process_weights_after_loading(self.layer)

    def __call__(self, batch: Batch) -> torch.Tensor:
        """Computes all experts of a batch, whose ids are overwritten."""
        from sglang.srt.layers.moe.token_dispatcher import StandardDispatchOutput
        from sglang.srt.layers.moe.topk import StandardTopKOutput

        topk = StandardTopKOutput(
            topk_weights=batch.topk_weights, topk_ids=batch.topk_ids, router_logits=None
        )
        dispatch = StandardDispatchOutput(
            hidden_states=batch.hidden_states, hidden_states_scale=None, topk_output=topk
        )
        output: torch.Tensor = self.method.apply(self.layer, dispatch).hidden_states
        return output


class Sglang:
    """SGLang's layers, and the same layers with all experts on the CPU."""

    def __init__(self, host: ModuleType, work: Path, device: Device) -> None:
        """Makes the layers."""
        self._device = device
        self._plain = make_layers(work, SIZES)
        folder = Path(self._plain[0].weight_path)
        self._methods = [
            Method(host, folder, index, device.device) for index in range(SIZES.layers)
        ]

    def parts(self) -> dict[str, Callable[[], None]]:
        """Returns the checks by name."""
        return {"eager": self.eager, "graph": self.graph}

    def eager(self) -> None:
        """Hybrid layers against layers on the CPU."""
        errors = []
        for seed, tokens in enumerate((1, 3, 8, 64, 300)):
            batch = make_batch(SIZES, tokens, seed)
            for method, plain in zip(self._methods, self._plain, strict=True):
                actual = method(batch.to(self._device.device))
                errors.append(_error(actual, call(plain, batch, 0)))
        check("hybrid layers", max(errors) < TOLERANCE, f"errors {errors}", error=max(errors))

    def graph(self) -> None:
        """Hybrid layers in a CUDA graph, replayed with new inputs."""
        static = make_batch(SIZES, 4).to(self._device.device)
        outputs = []

        def forward() -> None:
            outputs[:] = [
                method(static._replace(topk_ids=static.topk_ids.clone()))
                for method in self._methods
            ]

        replay = self._device.capture(forward)
        errors = []
        for seed in range(100):
            batch = make_batch(SIZES, 4, seed)
            for own, new in zip(static, batch, strict=True):
                own.copy_(new)
            replay()
            self._device.synchronize()
            for output, plain in zip(outputs, self._plain, strict=True):
                errors.append(_error(output, call(plain, batch, 0)))
        check(
            "hybrid layers in a graph", max(errors) < TOLERANCE, "wrong results", error=max(errors)
        )


def _error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    actual, expected = actual.cpu().float(), expected.float()
    return float((actual - expected).norm() / expected.norm())


def import_host(device: Device) -> ModuleType:
    """Imports SGLang's module, and replaces what a running server would have set up."""
    sys.modules["kt_kernel"] = kt_kernel
    if device.device.type == "cpu":
        torch.cuda.synchronize = lambda device=None: None
        torch.cuda.current_stream = lambda device=None: SimpleNamespace(cuda_stream=0)
    host = importlib.import_module(HOST)
    for name, value in {
        "get_parallel": lambda: SimpleNamespace(tp_rank=0, tp_size=1),
        "get_tensor_model_parallel_rank": lambda: 0,
        "get_tensor_model_parallel_world_size": lambda: 1,
    }.items():
        if hasattr(host, name):
            setattr(host, name, value)
    maps = torch.arange(SIZES.experts).expand(SIZES.layers, -1)
    locations = importlib.import_module(LOCATIONS)
    locations.get_global_expert_location_metadata = lambda: SimpleNamespace(
        physical_to_logical_map_cpu=maps
    )
    return host


def main() -> None:
    """Runs the checks, if there is an SGLang."""
    work, device = arguments()
    if importlib.util.find_spec("sglang") is None:
        return report(SKIPPED, "SGLang", "neither sglang nor sglang-kt is installed")
    names = packages_distributions().get("sglang", [])
    report(PASS, "SGLang", **{name: version(name) for name in names})
    try:
        host = import_host(device)
    except ImportError as error:
        # SGLang needs packages for GPUs that are no part of its own.
        return report(SKIPPED, HOST, f"it cannot be imported: {error}")
    return run_parts(Sglang(host, work, device).parts())


if __name__ == "__main__":
    main()
