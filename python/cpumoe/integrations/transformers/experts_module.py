"""The module that stands in a model where its routed experts were."""

from __future__ import annotations

import time

import torch
from torch import nn
from typing_extensions import override

from cpumoe.checkpoint import ExpertReader
from cpumoe.experts import Experts
from cpumoe.integrations.transformers.options import ExpertsOptions
from cpumoe.swiglu import SwiGLU


class CpuExperts(nn.Module):
    """Routed experts of one layer, computed by `cpumoe.Experts`; has no parameters.

    Attributes:
        num_experts: routed experts of the layer.
        experts: the packed experts; None until `pack`.
        seconds: wall time spent in `forward` so far.
        calls: calls of `forward` so far.
    """

    def __init__(self, layer: int, num_experts: int, swiglu: SwiGLU) -> None:
        """Makes the module for a decoder layer; `pack` gives it weights."""
        super().__init__()
        self.layer = layer
        self.num_experts = num_experts
        self.swiglu = swiglu
        self.experts: Experts | None = None
        self.seconds = 0.0
        self.calls = 0

    def pack(self, reader: ExpertReader, options: ExpertsOptions) -> None:
        """Packs the layer's experts from a checkpoint; see `cpumoe.Experts.from_checkpoint`."""
        self.experts = Experts.from_checkpoint(
            reader,
            self.layer,
            swiglu=self.swiglu,
            runtime=options.runtime,
            compute=options.compute,
            isa=options.isa,
            batch_invariant=options.batch_invariant,
            progress=False,
        )

    @override
    def forward(
        self,
        hidden_states: torch.Tensor,
        top_k_index: torch.Tensor,
        top_k_weights: torch.Tensor,
    ) -> torch.Tensor:
        """Computes the weighted sum of each token's experts.

        Args:
            hidden_states: ``[..., hidden]`` bf16, fp16 or fp32, on any device.
            top_k_index: ``[tokens, top_k]``; `num_experts` means "not mine".
            top_k_weights: ``[tokens, top_k]``, normalised and scaled by the host.

        Returns:
            hidden_states' shape, dtype and device.

        Raises:
            RuntimeError: the weights are not there yet, or the model is in training mode.
        """
        start = time.perf_counter()
        experts = self._ready()
        device, shape = hidden_states.device, hidden_states.shape
        flat = hidden_states.detach().reshape(-1, shape[-1])
        if device.type == "cpu":
            output = experts(flat, top_k_index, top_k_weights.detach())
        else:
            arguments = (tensor.detach().cpu() for tensor in (flat, top_k_index, top_k_weights))
            output = experts(*arguments).to(device)
        self.calls += 1
        self.seconds += time.perf_counter() - start
        return output.view(shape)

    def _ready(self) -> Experts:
        if self.experts is None:
            raise RuntimeError(f"layer {self.layer}: the experts have no weights yet: call pack")
        if self.training:
            raise RuntimeError(
                f"layer {self.layer}: cpumoe's experts record no gradient and cannot train: "
                f"call model.eval()"
            )
        return self.experts

    @override
    def extra_repr(self) -> str:
        """What ``print(model)`` shows."""
        return f"layer={self.layer}, {self.experts or 'not packed'}"
