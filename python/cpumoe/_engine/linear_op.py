"""``torch.ops.cpumoe.linear``: a call of a dense layer as compilers and tracers record it.

The operator finds its layer by a handle (`cpumoe._engine.handles`).
"""

from __future__ import annotations

from typing import Any, cast

import torch

from cpumoe._base.operators import define
from cpumoe._base.tensors import describe
from cpumoe._engine.gradients import refuse_derivatives
from cpumoe._engine.handles import Handles
from cpumoe._engine.output import ELEMENTS, Destination

# A layer has a method `compute`, which takes x and `out_dtype` as `Linear.forward` does.
_handles = Handles("Linear")
new_handle = _handles.new


def check_input(x: torch.Tensor, in_features: int | None) -> None:
    """Checks dtype and shape of x; see `Linear.forward`. `in_features` may be unknown."""
    if x.dtype not in ELEMENTS:
        raise TypeError(f"input: expected bfloat16, float16 or float32, got {describe(x)}")
    if not x.dim() or (in_features is not None and x.shape[-1] != in_features):
        wanted = "in_features" if in_features is None else in_features
        raise ValueError(f"input: expected [..., {wanted}], got {list(x.shape)}")


def record_linear(
    handle: torch.Tensor | int,
    sizes: tuple[int, int],
    x: torch.Tensor,
    out_dtype: torch.dtype | None,
) -> torch.Tensor:
    """Calls the operator in code that is being traced.

    Args:
        handle: the tensor of a layer's handle, or its number. Only Dynamo accepts a tensor from
            outside, but all tracers see one that is made here.
        sizes: in_features and out_features of the layer.
        x: see `Linear.forward`.
        out_dtype: see `Linear.forward`.
    """
    Destination(dtype=out_dtype).check()
    check_input(x, sizes[0])
    if isinstance(handle, int):
        handle = x.new_full((), handle, dtype=torch.int64)
    return cast("torch.Tensor", torch.ops.cpumoe.linear(x, handle, sizes[1], out_dtype=out_dtype))


def _compute(
    x: torch.Tensor,
    layer: torch.Tensor,
    out_features: int,
    *,
    out_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    # The layer itself is not called: whoever recorded the operator recorded its hooks as well.
    known: Any = _handles.layer(layer)
    with torch.no_grad():  # gradients are the business of refuse_derivatives
        y: torch.Tensor = known.compute(x, out_dtype)
    if y.shape[-1] != out_features:
        raise ValueError(
            f"out_features: expected {y.shape[-1]}, which the layer has, got {out_features}"
        )
    return y


def _fake(
    x: torch.Tensor,
    layer: torch.Tensor,
    out_features: int,
    *,
    out_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    _handles.check(layer)
    if x.device.type not in ("cpu", "meta"):
        raise TypeError(f"input: expected a CPU tensor, got device {x.device}")
    Destination(dtype=out_dtype).check()
    check_input(x, None)
    return x.new_empty((*x.shape[:-1], out_features), dtype=out_dtype)


_LIBRARY = define(
    "linear(Tensor x, Tensor layer, SymInt out_features, *, ScalarType? out_dtype=None) -> Tensor",
    _compute,
    _fake,
)
refuse_derivatives("linear", _LIBRARY, inputs=(0,))
