"""The memory that a forward call writes: a new tensor, or the caller's `out`."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from cpumoe import _core
from cpumoe._base.tensors import describe, dtype_name, plain, refuse_tracing, span

# The dtypes of hidden states and results.
ELEMENTS = {
    torch.bfloat16: _core.DType.BF16,
    torch.float16: _core.DType.FP16,
    torch.float32: _core.DType.FP32,
}


def check_output_options(
    out: torch.Tensor | None, out_dtype: torch.dtype | None, accumulate: bool
) -> None:
    """Raises unless the options of a call's result are possible together, here and now."""
    refuse_tracing("out")
    if out_dtype is not None and out_dtype not in ELEMENTS:
        raise TypeError(
            f"out_dtype: expected torch.bfloat16, torch.float16 or torch.float32, got {out_dtype!r}"
        )
    if accumulate and out is None:
        raise ValueError("accumulate: expected out=, the tensor to add onto, got None")


def callers_output(
    out: torch.Tensor,
    shape: torch.Size,
    *,
    out_dtype: torch.dtype | None,
    accumulate: bool,
    apart: Iterable[tuple[torch.Tensor, str]],
) -> tuple[int, _core.DType]:
    """Returns the address and the dtype of the caller's buffer after all checks.

    Args:
        out: the caller's buffer.
        shape: the shape of the call's result.
        out_dtype: the dtype that the caller expects, if any.
        accumulate: whether results are added onto `out`.
        apart: tensors, with their names, whose memory the call reads while it writes `out`.

    Raises:
        TypeError: the kind of tensor, see `plain`; its dtype.
        ValueError: its shape or strides; its memory overlaps a tensor that the call reads.
    """
    tensor = plain(out, "out")
    if out.is_neg():
        raise TypeError("out: expected a tensor without lazy negation; pass a new tensor")
    element = ELEMENTS.get(tensor.dtype)
    if element is None:
        raise TypeError(f"out: expected bfloat16, float16 or float32, got {describe(tensor)}")
    if out_dtype is not None and tensor.dtype != out_dtype:
        raise TypeError(
            f"out: expected {dtype_name(out_dtype)} like out_dtype, got {describe(tensor)}; "
            "leave out_dtype out"
        )
    if accumulate and element is not _core.DType.FP32:
        raise TypeError(f"out: expected float32 to accumulate onto, got {describe(tensor)}")
    if tensor.shape != shape:
        raise ValueError(f"out: expected {list(shape)}, got {list(tensor.shape)}")
    if not tensor.is_contiguous():
        raise ValueError(
            f"out: expected a contiguous tensor, got strides {list(tensor.stride())}; pass a "
            "contiguous tensor and copy from it"
        )
    start, end = span(tensor)
    for other, name in apart:
        first, last = span(other)
        if max(start, first) < min(end, last):
            raise ValueError(
                f"out: expected memory that {name} does not use, got a tensor that overlaps it; "
                "pass a tensor with memory of its own"
            )
    return start, element


def wrote_output(out: torch.Tensor) -> None:
    """Tells autograd that `out` changes, so that it finds results that need the old values."""
    if not out.is_inference():  # tensors of inference mode count no versions
        torch.autograd.graph.increment_version(out)
