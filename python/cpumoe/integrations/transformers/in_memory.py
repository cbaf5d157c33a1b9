"""``experts_implementation="cpumoe"``: experts whose dense weights are already in memory.

If transformers dequantized an MXFP4 model, its bf16 weights are exactly E2M1 values times a power
of two. The first call packs them as MXFP4 again, which restores the checkpoint's values exactly.
Other weights are packed as bf16 if they are bf16 numbers, and as fp16 if they are fp16 numbers.
Weights that need more bits are refused, because rounding them would change the model.
`ExpertsOptions` with a `weight_format` asks for that: weights are rounded to the nearest values of
the format.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Iterator
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from cpumoe._base.tensors import is_recorded
from cpumoe._engine.custom_op import new_handle, record_call
from cpumoe._engine.gradients import without_gradients
from cpumoe.checkpoint import ExpertWeights, UnsupportedFormatError
from cpumoe.experts import Experts
from cpumoe.formats import WeightFormat, weight_format
from cpumoe.integrations.transformers.activation import module_activation
from cpumoe.integrations.transformers.experts_module import normed_sum
from cpumoe.integrations.transformers.options import current_options

# The formats that may hold weights exactly, the smallest and fastest first.
_FORMATS = (weight_format("mxfp4"), weight_format("bf16"), weight_format("fp16"))


class _InMemory:
    """A module's experts, which are packed again when the module's parameters have changed.

    Attributes:
        experts: the packed experts; None: no call was made yet.
        handle: by which a recorded call finds this object.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = weakref.ref(module)
        self._state: tuple[Any, ...] = ()
        self.experts: Experts | None = None
        self.handle = new_handle(self)

    def __call__(
        self,
        hidden_states: torch.Tensor,
        topk_ids: torch.Tensor,
        topk_weights: torch.Tensor,
        *,
        out_dtype: torch.dtype | None = None,
    ) -> torch.Tensor:
        module: Any = self._module()
        # Parameters made in inference mode have no versions, so changes in place go unnoticed.
        state = tuple(
            (p.data_ptr(), None if p.is_inference() else p._version) for p in module.parameters()
        )
        if self.experts is None or self._state != state:
            self.experts, self._state = _pack(module), state
        return self.experts(hidden_states, topk_ids, topk_weights, out_dtype=out_dtype)


_known: WeakKeyDictionary[nn.Module, _InMemory] = WeakKeyDictionary()


def experts_forward(
    module: Any,
    hidden_states: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
) -> torch.Tensor:
    """Computes an experts module of transformers, which defines the signature.

    Args:
        module: the module, with `gate_up_proj` and `down_proj`, and biases if `has_bias`.
        hidden_states: ``[tokens, hidden]``.
        top_k_index: ``[tokens, top_k]``.
        top_k_weights: ``[tokens, top_k]``.

    Returns:
        ``[tokens, hidden]`` in the dtype of `hidden_states`. See `cpumoe.Experts` for gradients.

    Raises:
        UnsupportedFormatError: the weights are no bf16 or fp16 numbers, and the options name no
            format.
        RuntimeError: the module is in training mode.
        ValueError: cpumoe does not support the module's activation, or it is not on the CPU.
    """
    if module.training:
        raise RuntimeError(
            "cpumoe's experts compute no gradients and cannot train; call model.eval()"
        )
    compute = _each_normed if module.has_post_expert_norm else _weighted_sum
    output = compute(module, hidden_states, top_k_index, top_k_weights)
    if torch.is_grad_enabled() and any(p.requires_grad for p in module.parameters()):
        output = _without_gradients(output, *module.parameters())
    return output


def _weighted_sum(
    module: Any,
    hidden_states: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
) -> torch.Tensor:
    arguments = (hidden_states, top_k_index, top_k_weights)
    # What is recorded packs the experts when it runs, because the parameters have values then.
    if torch.compiler.is_dynamo_compiling():
        return record_call(int(_handle_text(module)), None, arguments)
    if is_recorded(*arguments):
        return record_call(_in_memory(module).handle.number, None, arguments)
    return _in_memory(module)(*arguments)


def _each_normed(module: Any, *arguments: torch.Tensor) -> torch.Tensor:
    compute = functools.partial(_weighted_sum, module)
    return normed_sum(compute, module.post_expert_norm, *arguments)


# Dynamo cannot trace what this calls, and breaks its graph.
_without_gradients = torch.compiler.disable(without_gradients)  # type: ignore[no-untyped-call]


# Dynamo calls this at once, and keeps the text. It could keep a tensor of one module only.
@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _handle_text(module: nn.Module) -> str:
    return str(_in_memory(module).handle.number)


def packed_experts(module: nn.Module) -> Experts | None:
    """Returns what computed a module's last call; None: nothing of cpumoe has computed it."""
    known = _known.get(module)
    return None if known is None else known.experts


def _in_memory(module: nn.Module) -> _InMemory:
    known = _known.get(module)
    if known is None:
        known = _known[module] = _InMemory(module)
    return known


def _pack(module: Any) -> Experts:
    name = type(module).__name__
    activation = module_activation(module)
    if module.down_proj.device.type != "cpu":
        raise ValueError(f"{name}: expected weights on the CPU, got {module.down_proj.device}")
    hidden, inner = (module.down_proj.shape[axis] for axis in (-2, -1))
    if module.is_transposed:
        hidden, inner = inner, hidden
    options = current_options()
    rounded = options.weight_format
    fmt = _exact_format(module) if rounded is None else weight_format(rounded)
    fmt.check_k(hidden, "hidden_size")
    fmt.check_k(inner, "intermediate_size")
    return Experts(
        _encoded(module, fmt),
        format=fmt.name,
        num_experts=module.num_experts,
        hidden_size=hidden,
        intermediate_size=inner,
        activation=activation,
        has_bias=module.has_bias,
        options=options,
    )


@torch.no_grad()
def _exact_format(module: Any) -> WeightFormat:
    """Returns the smallest format that holds all of the module's weights exactly."""
    stacks = (getattr(module, _first(module)), module.down_proj)
    name = type(module).__name__
    for fmt in _FORMATS:
        if all(_holds(fmt, _rows(module, matrix), name) for stack in stacks for matrix in stack):
            return fmt
    raise UnsupportedFormatError(
        f"{name}: expected weights that are exactly "
        f"{' or '.join(fmt.name for fmt in _FORMATS)}, got others, and cpumoe does not round "
        f"weights unasked; load the model with dtype=torch.bfloat16, or name a format to which all "
        f"weights are rounded: enable(ExpertsOptions(weight_format='bf16'))"
    )


def _holds(fmt: WeightFormat, weights: torch.Tensor, name: str) -> bool:
    """Whether weights ``[N, K]`` of a module called `name` are values of the format."""
    if not fmt.values and fmt.scale_dtype is None:
        dtype = fmt.code_dtypes[0]
        return weights.dtype == dtype or torch.equal(weights.to(dtype).to(weights.dtype), weights)
    return fmt.takes_k(weights.shape[-1]) and torch.equal(
        fmt.dense(fmt.quantized(weights, name=name)), weights.float()
    )


def _rows(module: Any, matrix: torch.Tensor) -> torch.Tensor:
    """Returns an expert's matrix ``[N, K]``."""
    return matrix.T if module.is_transposed else matrix


@torch.no_grad()
def _encoded(module: Any, fmt: WeightFormat) -> Iterator[ExpertWeights]:
    name = type(module).__name__
    for index in range(module.num_experts):
        gate_up, down = (
            _rows(module, stack[index])
            for stack in (getattr(module, _first(module)), module.down_proj)
        )
        gate, up = _halves(module, gate_up)
        biases: tuple[torch.Tensor, ...] = ()
        if module.has_bias:
            biases = (
                *_halves(module, getattr(module, f"{_first(module)}_bias")[index]),
                module.down_proj_bias[index],
            )
        subject = f"{name}: expert {index}"
        quantized = fmt.quantized(up, name=f"{subject}, up")
        yield ExpertWeights(
            fmt.quantized(gate, name=f"{subject}, gate") if module.has_gate else quantized,
            quantized,
            fmt.quantized(down, name=f"{subject}, down"),
            *(bias.contiguous() for bias in biases),
        )


def _first(module: Any) -> str:
    """Returns the name of the weights that x is multiplied by."""
    return "gate_up_proj" if module.has_gate else "up_proj"


def _halves(module: Any, gate_up: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns gate and up; without a gate, up takes its place (`ExpertWeights`)."""
    if not module.has_gate:
        return gate_up, gate_up
    if module.is_concatenated:
        gate, up = gate_up.chunk(2)
        return gate, up
    return gate_up[::2], gate_up[1::2]
