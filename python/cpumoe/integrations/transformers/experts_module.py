"""The module that replaces the routed experts of a model."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn
from typing_extensions import override

from cpumoe.checkpoint import ExpertReader
from cpumoe.experts import Experts
from cpumoe.integrations.transformers.options import ExpertsOptions
from cpumoe.numerics.glu import GLU

if TYPE_CHECKING:
    from cpumoe.distributed import LedExperts


@dataclass(frozen=True)
class Spent:
    """Number and time of a module's calls.

    Attributes:
        calls: number of calls that succeeded.
        seconds: time that these calls computed, see `cpumoe.Experts.statistics`.
    """

    calls: int = 0
    seconds: float = 0.0


def normed_sum(
    compute: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor],
    norm: nn.Module,
    hidden_states: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
) -> torch.Tensor:
    """Computes experts whose outputs a norm changes before they are weighted and added.

    Each expert of each token is a call's token of its own, with the weight 1.

    Args:
        compute: computes the weighted sum of each token's experts.
        norm: the norm, of ``[tokens, hidden]``.
        hidden_states: ``[tokens, hidden]``.
        top_k_index: ``[tokens, top_k]``.
        top_k_weights: ``[tokens, top_k]``.
    """
    tokens, top_k = top_k_index.shape
    ones = torch.ones((tokens * top_k, 1), dtype=torch.float32, device=hidden_states.device)
    each = compute(hidden_states.repeat_interleave(top_k, 0), top_k_index.reshape(-1, 1), ones)
    normed: torch.Tensor = norm(each).view(tokens, top_k, -1)
    return (normed * top_k_weights.unsqueeze(-1)).sum(1).to(hidden_states.dtype)


class CpuExperts(nn.Module):
    """Routed experts of one layer, computed by `cpumoe.Experts`.

    The module has no parameters, except those of a norm.

    Attributes:
        layer: index of the decoder layer.
        num_experts: number of routed experts of the layer.
        experts: the packed experts; None before `pack`.
        idle: whether calls compute and count nothing, and return zeros.
        post_expert_norm: the host's norm of each expert's output; None: there is none.
    """

    def __init__(
        self,
        layer: int,
        num_experts: int,
        activation: GLU,
        *,
        name: str = "",
        post_expert_norm: nn.Module | None = None,
    ) -> None:
        """Makes the module for a decoder layer. `pack` gives it weights.

        Args:
            layer: index of the decoder layer.
            num_experts: number of routed experts.
            activation: the experts' activation.
            name: name of the module that it replaces (see `ExpertReader.of_module`).
            post_expert_norm: the host's norm of each expert's output.
        """
        super().__init__()
        self._name = name
        self.post_expert_norm = post_expert_norm
        self.layer = layer
        self.num_experts = num_experts
        self.activation = activation
        self.experts: Experts | LedExperts | None = None
        self.idle = False

    def pack(self, reader: ExpertReader, options: ExpertsOptions) -> None:
        """Packs the layer's experts from a checkpoint; see `cpumoe.Experts.from_checkpoint`.

        If other ranks share them, those may still be packing; see `Ranks.wait`.
        """
        if options.ranks is not None:
            self.experts = options.ranks.experts(
                reader, self.layer, module=self._name, activation=self.activation, options=options
            )
            return
        self.experts = Experts.from_checkpoint(
            reader.of_module(self._name),
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
        if self.idle:
            return torch.zeros_like(hidden_states)
        shape = hidden_states.shape
        arguments = (
            hidden_states if len(shape) == 2 else hidden_states.reshape(-1, shape[-1]),
            top_k_index,
            top_k_weights,
        )
        if self.post_expert_norm is None:
            output = _on_cpu(experts, *arguments)
        else:
            compute = functools.partial(_on_cpu, experts)
            output = normed_sum(compute, self.post_expert_norm, *arguments)
        return output if len(shape) == 2 else output.view(shape)

    def _ready(self) -> Experts | LedExperts:
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


def _on_cpu(experts: Experts | LedExperts, *arguments: torch.Tensor) -> torch.Tensor:
    """Calls the experts with tensors on any device, and returns their sum there."""
    device = arguments[0].device
    if device.type in ("cpu", "meta"):
        return experts(*arguments)
    return experts(*(tensor.cpu() for tensor in arguments)).to(device)
