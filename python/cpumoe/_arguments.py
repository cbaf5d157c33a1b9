"""Checks of tensors that callers pass in, and the addresses that the engine takes instead."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch

from cpumoe import _core
from cpumoe.formats import QuantizedMatrix, WeightFormat, describe

# A stack of matrices [experts, N, K]: a QuantizedMatrix, or a tuple (codes, scales).
MatrixStack = QuantizedMatrix | tuple[torch.Tensor, torch.Tensor]

_ELEMENTS = {
    torch.bfloat16: _core.DType.BF16,
    torch.float16: _core.DType.FP16,
    torch.float32: _core.DType.FP32,
}


class Call(NamedTuple):
    """A forward call's addresses, its output, and what the addresses point into."""

    tensors: _core.ForwardTensors
    output: torch.Tensor
    inputs: tuple[torch.Tensor | None, ...]


def prepare_call(
    hidden_states: torch.Tensor,
    topk_ids: torch.Tensor,
    topk_weights: torch.Tensor,
    mask: torch.Tensor | None,
    num_experts: int,
    hidden_size: int,
) -> Call:
    """Checks a forward call's tensors (see `Experts.__call__`) and allocates its output."""
    for tensor, name in (
        (hidden_states, "hidden_states"),
        (topk_ids, "topk_ids"),
        (topk_weights, "topk_weights"),
    ):
        require_dense_cpu(tensor, name)
    element = _ELEMENTS.get(hidden_states.dtype)
    if element is None:
        raise TypeError(
            f"hidden_states: expected bfloat16, float16 or float32, got {describe(hidden_states)}"
        )
    if hidden_states.dim() != 2 or hidden_states.shape[1] != hidden_size:
        raise ValueError(
            f"hidden_states: expected [tokens, {hidden_size}], got {list(hidden_states.shape)}"
        )
    tokens = hidden_states.shape[0]
    if topk_ids.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"topk_ids: expected int32 or int64, got {describe(topk_ids)}")
    if topk_ids.dim() != 2 or topk_ids.shape[0] != tokens:
        raise ValueError(f"topk_ids: expected [{tokens}, top_k], got {list(topk_ids.shape)}")
    if topk_weights.shape != topk_ids.shape:
        raise ValueError(
            f"topk_weights: expected {list(topk_ids.shape)} like topk_ids, "
            f"got {list(topk_weights.shape)}"
        )
    if topk_weights.dtype != torch.float32:
        if topk_weights.dtype not in _ELEMENTS:
            raise TypeError(
                f"topk_weights: expected float32, bfloat16 or float16, got {describe(topk_weights)}"
            )
        topk_weights = topk_weights.float()
    if hidden_states.stride(1) != 1 or hidden_states.is_neg():
        hidden_states = in_memory(hidden_states)
    topk_ids, topk_weights = in_memory(topk_ids), in_memory(topk_weights)
    if mask is not None:
        check_mask(mask, num_experts)  # again: it is the caller's, who may have resized it
    output = hidden_states.new_empty((tokens, hidden_size))
    tensors = _core.ForwardTensors(
        hidden_states.data_ptr(),
        hidden_states.stride(0),
        tokens,
        element,
        topk_ids.data_ptr(),
        topk_ids.dtype == torch.int64,
        topk_weights.data_ptr(),
        topk_ids.shape[1],
        0 if mask is None else mask.data_ptr(),
        output.data_ptr(),
    )
    return Call(tensors, output, (hidden_states, topk_ids, topk_weights, mask))


def in_memory(tensor: torch.Tensor) -> torch.Tensor:
    """Returns the tensor, or a contiguous one; a view's lazy minus sign is not in its memory."""
    if tensor.is_contiguous() and not tensor.is_neg():
        return tensor
    return tensor.resolve_neg().contiguous()


def check_mask(mask: torch.Tensor, num_experts: int) -> None:
    """Raises TypeError or ValueError unless `mask` is dense bool [num_experts] on the CPU."""
    require_dense_cpu(mask, "expert_mask")
    if mask.dtype != torch.bool:
        raise TypeError(f"expert_mask: expected bool, got {describe(mask)}")
    require_shape(tuple(mask.shape), (num_experts,), "expert_mask")
    if not mask.is_contiguous():
        raise ValueError("expert_mask: expected a contiguous tensor; pass .contiguous()")


def normalized(
    row: WeightFormat, matrices: MatrixStack, name: str, *, stacked: bool
) -> QuantizedMatrix:
    """Returns a matrix, or a stack, as bytes and scales that fit together."""
    if isinstance(matrices, tuple) and len(matrices) == 2:
        matrices = QuantizedMatrix(*matrices)
    if not isinstance(matrices, QuantizedMatrix):
        raise TypeError(
            f"{name}: expected a QuantizedMatrix or a tuple (codes, scales), got {_kind(matrices)}"
        )
    codes, scales = matrices.codes, matrices.scales
    codes = row.normalize_codes(codes, f"{name} codes")
    scales = row.normalize_scales(scales, f"{name} scales")
    if codes.dim() != (3 if stacked else 2):
        wanted = "[experts, N, K/2]" if stacked else "[N, K/2]"
        raise ValueError(f"{name} codes: expected {wanted}, got {list(codes.shape)}")
    columns = codes.shape[-1] * 8 // row.code_bits
    row.check_k(columns, f"{name}: K")
    expected = (*codes.shape[:-1], columns // row.group_size)
    require_shape(tuple(scales.shape), expected, f"{name} scales")
    return QuantizedMatrix(codes, scales, name=matrices.name or name)


def _kind(value: object) -> str:
    return f"a tuple of {len(value)}" if isinstance(value, tuple) else type(value).__name__


def integer(value: object, name: str) -> int:
    """Returns an int, or what stands for one, as an int; raises TypeError of anything else."""
    try:
        return operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        raise TypeError(f"{name}: expected an int, got {value!r}") from None


def require_shape(got: Sequence[int], expected: Sequence[int], name: str) -> None:
    """Raises ValueError unless the shapes are equal."""
    if tuple(got) != tuple(expected):
        raise ValueError(f"{name}: expected {list(expected)}, got {list(got)}")


def checked_biases(
    biases: Sequence[torch.Tensor | None], widths: Mapping[str, int], *experts: int
) -> list[torch.Tensor]:
    """Returns the three biases, or none: ``[*experts, width]`` by name in `widths`."""
    given = [bias for bias in biases if bias is not None]
    if given and len(given) != len(widths):
        missing = ", ".join(n for n, b in zip(widths, biases, strict=True) if b is None)
        raise ValueError(f"{', '.join(widths)}: expected all three or none, got no {missing}")
    for bias, (name, width) in zip(given, widths.items(), strict=False):
        require_dense_cpu(bias, name)
        if bias.dtype not in _ELEMENTS:
            raise TypeError(f"{name}: expected bfloat16, float16 or float32, got {describe(bias)}")
        require_shape(bias.shape, (*experts, width), name)
    return given


def require_dense_cpu(tensor: torch.Tensor, name: str) -> None:
    """Raises TypeError or ValueError unless `tensor` is a dense tensor on the CPU."""
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {type(tensor).__name__}")
    if tensor.layout != torch.strided:
        raise ValueError(
            f"{name}: expected a dense tensor, got layout {tensor.layout}; pass .to_dense()"
        )
    if not tensor.is_cpu:
        raise ValueError(
            f"{name}: expected a CPU tensor, got device {tensor.device}; move it with .cpu()"
        )


def matrix_view(matrix: QuantizedMatrix, name: str) -> _core.Matrix:
    """Returns the addresses of one matrix; `name` is for the engine's errors."""
    codes, scales = matrix.codes, matrix.scales
    rows, columns = matrix.shape
    return _core.Matrix(
        name,
        rows,
        columns,
        codes.data_ptr(),
        codes.stride(0) * codes.itemsize,
        scales.data_ptr(),
        scales.stride(0) * scales.itemsize,
    )
