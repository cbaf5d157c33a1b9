"""The module that replaces the routed experts of a model."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from typing_extensions import override

from cpumoe.checkpoint import ExpertReader
from cpumoe.experts import Experts
from cpumoe.integrations.transformers.options import ExpertsOptions
from cpumoe.numerics.glu import GLU


@dataclass(frozen=True)
class Spent:
    """Number and time of a module's calls.

    Attributes:
        calls: number of calls that succeeded.
        seconds: time that these calls computed, see `cpumoe.Experts.statistics`.
    """

    calls: int = 0
    seconds: float = 0.0


class CpuExperts(nn.Module):
    """Routed experts of one layer, computed by `cpumoe.Experts`. The module has no parameters.

    Attributes:
        layer: index of the decoder layer.
        num_experts: number of routed experts of the layer.
        experts: the packed experts; None before `pack`.
    """

    def __init__(self, layer: int, num_experts: int, activation: GLU) -> None:
        """Makes the module for a decoder layer. `pack` gives it weights."""
        super().__init__()
        self.layer = layer
        self.num_experts = num_experts
        self.activation = activation
        self.experts: Experts | None = None

    def pack(self, reader: ExpertReader, options: ExpertsOptions) -> None:
        """Packs the layer's experts from a checkpoint; see `cpumoe.Experts.from_checkpoint`."""
        self.experts = Experts.from_checkpoint(
            reader,
            self.layer,
            activation=self.activation,
            progress=False,
            options=options,
        )

    @property
    def spent(self) -> Spent:
        """Number and time of the calls so far; the engine counts, so calls of compiled code too."""
        if self.experts is None:
            return Spent()
        statistics = self.experts.statistics()
        return Spent(statistics.calls, statistics.seconds)

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
            top_k_index: ``[tokens, top_k]``. The id `num_experts` is skipped.
            top_k_weights: ``[tokens, top_k]``, normalized and scaled by the model.

        Returns:
            A tensor with shape, dtype and device of `hidden_states`. See `cpumoe.Experts` for
            gradients.

        Raises:
            RuntimeError: `pack` was not called, or the model is in training mode.
        """
        experts = self._ready()
        shape = hidden_states.shape
        arguments = (
            hidden_states if len(shape) == 2 else hidden_states.reshape(-1, shape[-1]),
            top_k_index,
            top_k_weights,
        )
        if hidden_states.is_cpu or hidden_states.is_meta:
            output = experts(*arguments)
        else:
            output = experts(*(tensor.cpu() for tensor in arguments)).to(hidden_states.device)
        return output if len(shape) == 2 else output.view(shape)

    def _ready(self) -> Experts:
        if self.experts is None:
            raise RuntimeError(f"layer {self.layer}: the experts have no weights yet; call pack")
        if self.training:
            raise RuntimeError(
                f"layer {self.layer}: cpumoe's experts compute no gradients and cannot train; "
                f"call model.eval()"
            )
        return self.experts

    @override
    def extra_repr(self) -> str:
        """Returns the text for ``print(model)``."""
        return f"layer={self.layer}, {self.experts or 'not packed'}"
