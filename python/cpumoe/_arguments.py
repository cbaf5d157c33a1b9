"""Checks the tensors that callers pass, and turns them into addresses for the engine."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch

from cpumoe import _core
from cpumoe._gradients import without_gradients
from cpumoe._tensors import address, contiguous, describe, new_like, plain, refuse_tracing
from cpumoe.formats import QuantizedMatrix, WeightFormat
from cpumoe.precision import resolve_precision

# A stack of matrices [experts, N, K]: a QuantizedMatrix, or a tuple (codes, scales).
MatrixStack = QuantizedMatrix | tuple[torch.Tensor, torch.Tensor]

_ELEMENTS = {
    torch.bfloat16: _core.DType.BF16,
    torch.float16: _core.DType.FP16,
    torch.float32: _core.DType.FP32,
}
_FP32 = _ELEMENTS[torch.float32]
_ID_DTYPES = (torch.int64, torch.int32)


class Call(NamedTuple):
    """A forward call's addresses, its output, and the tensors that the addresses point into."""

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
    precision: str,
) -> Call:
    """Checks a forward call's tensors (see `Experts.__call__`) and allocates its output."""
    x, x_address, shape = contiguous(hidden_states, "hidden_states", True)
    ids, ids_address, routed = contiguous(topk_ids, "topk_ids")
    weights, weights_address, weighted = contiguous(topk_weights, "topk_weights")
    output, output_address = new_like(x, "hidden_states")
    element = _ELEMENTS.get(x.dtype)
    if element is None:
        raise TypeError(f"hidden_states: expected bfloat16, float16 or float32, got {describe(x)}")
    if len(shape) != 2 or shape[1] != hidden_size:
        raise ValueError(f"hidden_states: expected [tokens, {hidden_size}], got {list(shape)}")
    tokens = shape[0]
    id_dtype = ids.dtype
    if id_dtype not in _ID_DTYPES:
        raise TypeError(f"topk_ids: expected int32 or int64, got {describe(ids)}")
    if len(routed) != 2 or routed[0] != tokens:
        raise ValueError(f"topk_ids: expected [{tokens}, top_k], got {list(routed)}")
    if weighted != routed:
        raise ValueError(
            f"topk_weights: expected {list(routed)} like topk_ids, got {list(weighted)}"
        )
    if weights.dtype != torch.float32:
        if weights.dtype not in _ELEMENTS:
            raise TypeError(
                f"topk_weights: expected float32, bfloat16 or float16, got {describe(weights)}"
            )
        weights, weights_address, _ = contiguous(weights.float(), "topk_weights")
    tensors = _core.ForwardTensors(
        x_address,
        hidden_size if x.is_contiguous() else x.stride(0),
        tokens,
        element,
        ids_address,
        id_dtype == torch.int64,
        weights_address,
        routed[1],
        # Checked on each call, because the caller may have resized the mask.
        0 if mask is None else check_mask(mask, num_experts),
        output_address,
        # The engine uses this flag for fp32 calls only.
        element is _FP32 and resolve_precision(precision, torch.float32) == "bf16",
    )
    output = without_gradients(output, hidden_states, topk_weights)
    return tuple.__new__(Call, (tensors, output, (x, ids, weights, mask)))  # 0.1 us faster


def check_mask(mask: torch.Tensor, num_experts: int) -> int:
    """Returns the address of a mask, which must be bool [num_experts] and contiguous.

    Raises:
        TypeError, ValueError: the mask is something else.
    """
    start = address(mask, "expert_mask")
    if mask.dtype != torch.bool:
        raise TypeError(f"expert_mask: expected bool, got {describe(mask)}")
    require_shape(tuple(mask.shape), (num_experts,), "expert_mask")
    if not mask.is_contiguous():
        raise ValueError("expert_mask: expected a contiguous tensor; pass .contiguous()")
    return start


def normalized(
    row: WeightFormat, matrices: MatrixStack, name: str, *, stacked: bool
) -> QuantizedMatrix:
    """Returns a matrix, or a stack, as bytes of codes and scales whose shapes fit."""
    if isinstance(matrices, tuple) and len(matrices) == 2:
        matrices = QuantizedMatrix(*matrices)
    if not isinstance(matrices, QuantizedMatrix):
        raise TypeError(
            f"{name}: expected a QuantizedMatrix or a tuple (codes, scales), got {_kind(matrices)}"
        )
    refuse_tracing(name)
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
    """Returns an integer of any type as an int; raises TypeError for anything else."""
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
    """Returns the three biases ``[*experts, width]``, detached, or none; `widths` has names."""
    given = {n: b for n, b in zip(widths, biases, strict=True) if b is not None}
    if given and len(given) != len(widths):
        missing = ", ".join(name for name in widths if name not in given)
        raise ValueError(f"{', '.join(widths)}: expected all three or none, got no {missing}")
    return [_bias(bias, name, (*experts, widths[name])) for name, bias in given.items()]


def _bias(bias: torch.Tensor, name: str, shape: tuple[int, ...]) -> torch.Tensor:
    bias = plain(bias, name).detach()
    if bias.dtype not in _ELEMENTS:
        raise TypeError(f"{name}: expected bfloat16, float16 or float32, got {describe(bias)}")
    require_shape(bias.shape, shape, name)
    return bias


def matrix_view(matrix: QuantizedMatrix, name: str) -> _core.Matrix:
    """Returns the addresses of one matrix; `name` is for the engine's errors."""
    codes, scales = matrix.codes, matrix.scales
    rows, columns = matrix.shape
    return _core.Matrix(
        name,
        rows,
        columns,
        address(codes, f"{name} codes"),
        codes.stride(0) * codes.itemsize,
        address(scales, f"{name} scales"),
        scales.stride(0) * scales.itemsize,
    )
