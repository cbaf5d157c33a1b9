"""Layers of the engine compute no gradients, and asking for one is an error."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, NoReturn, cast

import torch
from torch.autograd import forward_ad
from typing_extensions import override

from cpumoe._base.operators import define

_NO_GRADIENTS = (
    "cpumoe's layers compute no gradients; call them under torch.no_grad() or "
    "torch.inference_mode(), or train with the model's own layers"
)


class _Result(NamedTuple):
    """Hides a tensor from autograd, which would otherwise take it for an input."""

    tensor: torch.Tensor


class _NoGradients(torch.autograd.Function):
    """Passes the result through. Its derivative, backward or forward, is an error."""

    @staticmethod
    @override
    def forward(ctx: Any, result: _Result, *inputs: torch.Tensor) -> torch.Tensor:
        ctx.inputs = [(tensor.shape, tensor.dtype) for tensor in inputs]
        return result.tensor

    @staticmethod
    @override
    def backward(ctx: Any, *gradients: Any) -> Any:
        # An operator, because compilers run this to record it. Running the record is the error.
        refused = torch.ops.cpumoe.no_gradient
        needed = ctx.needs_input_grad[1:]
        return None, *(
            refused(*gradients, shape, dtype) if wanted else None
            for wanted, (shape, dtype) in zip(needed, ctx.inputs, strict=True)
        )

    @staticmethod
    @override
    def jvp(ctx: Any, *tangents: Any) -> NoReturn:
        raise RuntimeError(_NO_GRADIENTS)


def _refuse(gradient: torch.Tensor, shape: Sequence[int], dtype: torch.dtype) -> NoReturn:
    raise RuntimeError(_NO_GRADIENTS)


def _fake(gradient: torch.Tensor, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    return gradient.new_empty(shape, dtype=dtype)


_LIBRARY = define(
    "no_gradient(Tensor gradient, SymInt[] shape, ScalarType dtype) -> Tensor", _refuse, _fake
)


def without_gradients(result: torch.Tensor, *inputs: torch.Tensor) -> torch.Tensor:
    """Returns a result as a function of its inputs that has no derivative.

    Args:
        result: a tensor of any shape. The returned tensor shares its memory.
        inputs: the tensors from which the result was, or will be, computed.

    Returns:
        `result` itself if nobody can ask for a derivative with respect to an input.

    Raises:
        RuntimeError: an input has a tangent, so that forward-mode differentiation is in progress.
    """
    wanted = forward_ad._current_level >= 0
    if torch.is_grad_enabled():
        for tensor in inputs:  # any() takes 0.3 us longer
            wanted = wanted or tensor.requires_grad
    if not wanted:
        return result
    connected = _NoGradients.apply(_Result(result), *inputs)  # type: ignore[no-untyped-call]
    return cast("torch.Tensor", connected)


def refuse_gradients(out: torch.Tensor, *inputs: torch.Tensor) -> None:
    """Raises RuntimeError if somebody can ask for a derivative of a caller's output buffer.

    PyTorch's own functions refuse ``out=`` in the same case.

    Args:
        out: the buffer that the call will write.
        inputs: the tensors from which its content will be computed.
    """
    tensors = (out, *inputs)
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        raise RuntimeError(f"out: expected no tensor that requires a gradient; {_NO_GRADIENTS}")
    without_gradients(out, *tensors)  # refuses tangents


def refuse_derivatives(name: str, library: torch.library.Library, inputs: Sequence[int]) -> None:
    """Makes derivatives of an operator an error, and so the transforms of torch.func.

    Args:
        name: the operator's name in its namespace.
        library: what `define` returned for the operator.
        inputs: the places of the arguments that may require gradients. Optional ones may be None.
    """
    operator = getattr(torch.ops.cpumoe, name).default

    # Dynamo must not look into what the dispatcher calls.
    @torch._disable_dynamo  # type: ignore[attr-defined]
    def autograd(keyset: Any, *arguments: Any, **options: Any) -> torch.Tensor:
        for tensor in arguments:
            if isinstance(tensor, torch.Tensor) and torch._C._functorch.is_gradtrackingtensor(
                tensor
            ):
                raise TypeError(
                    f"cpumoe::{name}: expected plain tensors, got one that torch.func (grad, jvp) "
                    "is transforming; cpumoe computes no gradients, so keep its layers out of the "
                    "transformed function"
                )
        keyset &= torch._C._after_autograd_keyset
        with torch._C._AutoDispatchBelowAutograd():
            result = operator.redispatch(keyset, *arguments, **options)
        # The dispatcher leaves out last arguments that have their default value.
        given = (arguments[i] for i in inputs if i < len(arguments))
        return without_gradients(result, *(tensor for tensor in given if tensor is not None))

    def vmap(*_: Any, **__: Any) -> NoReturn:
        raise TypeError(
            f"cpumoe::{name}: expected plain tensors, got one that torch.func.vmap is "
            "transforming; put all tokens into one dimension"
        )

    library.impl(name, autograd, "Autograd", with_keyset=True)  # type: ignore[no-untyped-call]
    torch.library.register_vmap(f"cpumoe::{name}", vmap, lib=library)
