"""The engine's operations on PyTorch's own tensors, for calls that need nothing but their result.

Each returns None where only PyTorch can compute the call: the call is recorded, gradients are
wanted, there are no elements, or a tensor's memory does not hold its values.
"""

from __future__ import annotations

import torch

from cpumoe import _core
from cpumoe._base.tensors import contiguous, modes_are_active, new_strided, parameter_address
from cpumoe._engine.output import ELEMENTS

# Tokens that `row_product` takes at once (kMostRowProductTokens).
MOST_TOKENS = 4
# The dtypes that `row_product` takes.
ROW_DTYPES = (torch.bfloat16, torch.float32)

# Dynamo, which is about to trace the call, sees a function that returns True.
_seen_by_dynamo = torch.compiler.is_dynamo_compiling


def rms_norm(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    eps: float,
    *,
    one_plus: bool,
    runtime: _core.Runtime,
) -> torch.Tensor | None:
    """Computes ``x / sqrt(mean(x^2) + eps) * scale`` over the last dimension.

    The result has the dtype of `x` and is rounded once. Many rows are computed on the threads of
    the runtime.

    Args:
        x: ``[..., columns]`` bf16, fp16 or fp32.
        weight: ``[columns]`` bf16, fp16 or fp32; None: the scale is 1.
        eps: a number that is not negative.
        one_plus: whether the scale is ``1 + weight`` in fp32, else ``weight``.
        runtime: the engine's threads.

    Returns:
        A new tensor like `x`, or None.
    """
    if not _is_plain(x, weight):
        return None
    try:
        x, start, shape = contiguous(x, "x")
        scale = 0 if weight is None else parameter_address(weight)
    except TypeError:  # such a tensor is PyTorch's alone
        return None
    if not start or (weight is not None and not scale):
        return None
    columns = shape[-1]
    y, output = new_strided(tuple(shape), x.stride(), x.dtype)
    _core.rms_norm(
        runtime,
        ELEMENTS[x.dtype],
        x.numel() // columns,
        columns,
        start,
        output,
        ELEMENTS[x.dtype if weight is None else weight.dtype],
        scale,
        one_plus,
        eps,
    )
    return y


def row_product(
    x: torch.Tensor, weight: torch.Tensor, runtime: _core.Runtime
) -> torch.Tensor | None:
    """Computes ``x W^T`` of few tokens, as `torch.nn.functional.linear` does.

    Sums are fp32, and are rounded once. The weights are read where they are.

    Args:
        x: ``[..., columns]`` of at most `MOST_TOKENS` tokens, of one of `ROW_DTYPES`.
        weight: ``[rows, columns]`` in the dtype of `x`.
        runtime: the engine's threads.

    Returns:
        ``[..., rows]`` in the dtype of `x`, or None.
    """
    if not _is_plain(x, weight):
        return None
    try:
        x, start, shape = contiguous(x, "x")
        weights = parameter_address(weight)
    except TypeError:
        return None
    if not start or not weights:
        return None
    rows, columns = weight.shape
    tokens = x.numel() // columns
    y, output = new_strided((tokens, rows), (rows, 1), x.dtype)
    _core.row_product(runtime, ELEMENTS[x.dtype], tokens, rows, columns, start, weights, output)
    return y.view(*shape[:-1], rows)


def _is_plain(x: torch.Tensor, weight: torch.Tensor | None) -> bool:
    """Whether nobody follows a call, and nobody wants its gradients."""
    if _seen_by_dynamo() or modes_are_active():
        return False
    wanted = x.requires_grad or (weight is not None and weight.requires_grad)
    return not (wanted and torch.is_grad_enabled())
