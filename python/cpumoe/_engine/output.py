"""The memory that a forward call writes: a new tensor, or the caller's `out`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch

from cpumoe import _core
from cpumoe._base.scalars import boolean
from cpumoe._base.tensors import describe, dtype_name, plain, span

# The dtypes of hidden states and results.
ELEMENTS = {
    torch.bfloat16: _core.DType.BF16,
    torch.float16: _core.DType.FP16,
    torch.float32: _core.DType.FP32,
}


class Destination(NamedTuple):
    """Where the result of a call goes, and how; `Experts.__call__` describes the arguments."""

    out: torch.Tensor | None = None
    dtype: torch.dtype | None = None
    accumulate: bool = False
    # Whether the inputs are copied before the call writes.
    may_overlap: bool = False

    def check(self) -> None:
        """Raises unless these options are possible together."""
        boolean(self.accumulate, "accumulate")
        if self.dtype is not None and self.dtype not in ELEMENTS:
            raise TypeError(
                "out_dtype: expected torch.bfloat16, torch.float16 or torch.float32, got "
                f"{self.dtype!r}"
            )
        if self.accumulate and self.out is None:
            raise ValueError("accumulate: expected out=, the tensor to add onto, got None")
        if self.accumulate and self.dtype not in (None, torch.float32):
            raise TypeError(
                "out_dtype: expected torch.float32 with accumulate, which adds onto out in fp32, "
                f"got {self.dtype!r}; leave out_dtype out"
            )


NEW_TENSOR = Destination()


def callers_output(
    destination: Destination, shape: torch.Size, inputs: Iterable[tuple[torch.Tensor, str]]
) -> tuple[torch.Tensor, int]:
    """Returns the caller's buffer and its address after all checks.

    Args:
        destination: whose `out` is not None.
        shape: the shape of the call's result.
        inputs: the tensors that the call reads, with their names.

    Raises:
        TypeError: the kind of tensor, see `plain`; its dtype.
        ValueError: its shape or strides; its memory overlaps an input.
    """
    out = destination.out
    assert out is not None
    tensor = plain(out, "out")
    if out.is_neg():
        raise TypeError("out: expected a tensor without lazy negation; pass a new tensor")
    check_output(tensor, destination, shape)
    for other, name in () if destination.may_overlap else inputs:
        refuse_overlap(tensor, other, name)
    return out, span(tensor)[0]


def refuse_overlap(out: torch.Tensor, other: torch.Tensor, name: str) -> None:
    """Raises ValueError if `out` uses memory of a tensor that the call reads, called `name`."""
    start, end = span(out)
    first, last = span(other)
    if max(start, first) < min(end, last):
        raise ValueError(
            f"out: expected memory that {name} does not use, got a tensor that overlaps it; pass a "
            "tensor with memory of its own"
        )


def check_output(out: torch.Tensor, destination: Destination, shape: torch.Size) -> None:
    """Checks dtype, shape and strides of a buffer for a result of this shape.

    Raises:
        TypeError, ValueError: see `callers_output`.
    """
    dtype = out.dtype
    if dtype not in ELEMENTS:
        raise TypeError(f"out: expected bfloat16, float16 or float32, got {describe(out)}")
    if destination.dtype not in (None, dtype):
        raise TypeError(
            f"out: expected {dtype_name(destination.dtype)} like out_dtype, got "
            f"{describe(out)}; leave out_dtype out"
        )
    if destination.accumulate and dtype != torch.float32:
        raise TypeError(f"out: expected float32 to accumulate onto, got {describe(out)}")
    if out.shape != shape:
        raise ValueError(f"out: expected {list(shape)}, got {list(out.shape)}")
    if not out.is_contiguous():
        raise ValueError(
            f"out: expected a contiguous tensor, got strides {list(out.stride())}; pass a "
            "contiguous tensor and copy from it"
        )


def wrote_output(out: torch.Tensor) -> None:
    """Tells autograd that `out` changes, so that it finds results that need the old values."""
    if not out.is_inference():  # tensors of inference mode count no versions
        torch.autograd.graph.increment_version(out)
