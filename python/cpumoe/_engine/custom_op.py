"""``torch.ops.cpumoe.experts``: a call of experts as compilers and tracers record it.

A tracer cannot look into C++. It records this operator instead, whose fake implementation says what
the result looks like. Eager calls do not pass here, because the dispatcher takes time.

The operator finds its layer by a handle (`cpumoe._engine.handles`).
"""

from __future__ import annotations

from typing import cast

import torch

from cpumoe._base.operators import define
from cpumoe._engine.calls import check_inputs
from cpumoe._engine.gradients import refuse_derivatives
from cpumoe._engine.handles import Handles
from cpumoe._engine.output import NEW_TENSOR, Destination, check_output
from cpumoe._engine.repetition import Inputs

# A layer computes what `Experts.__call__` describes, from three tensors and `out_dtype`.
_handles = Handles("Experts")
new_handle = _handles.new


def record_call(
    handle: torch.Tensor | int,
    hidden_size: int | None,
    given: Inputs,
    destination: Destination = NEW_TENSOR,
) -> torch.Tensor:
    """Calls the operator in code that is being traced.

    Args:
        handle: the tensor of a layer's handle, or its number. Only Dynamo accepts a tensor from
            outside, but all tracers see one that is made here.
        hidden_size: that of the layer; None leaves its check to the computation.
        given: hidden states, ids and weights.
        destination: where the result goes.

    Raises:
        TypeError, ValueError: see `Experts.__call__`.
    """
    out, out_dtype = destination.out, destination.dtype
    hidden_states = given[0]
    destination.check()
    # torch.jit.trace computes what it records, with all checks. Here it would warn about them.
    if isinstance(handle, torch.Tensor) or torch._C._get_tracing_state() is None:
        check_inputs(*given, hidden_size)
    if out is not None:
        if not isinstance(out, torch.Tensor):
            raise TypeError(f"out: expected a torch.Tensor, got {type(out).__name__}")
        check_output(out, destination, hidden_states.shape)
        if out.device.type != hidden_states.device.type:
            wanted = "meta" if hidden_states.is_meta else "CPU"
            raise TypeError(
                f"out: expected a {wanted} tensor like the inputs, got device {out.device}; pass "
                "an out on the device of the inputs"
            )
        out_dtype = out.dtype
    if isinstance(handle, int):
        handle = hidden_states.new_full((), handle, dtype=torch.int64)
    result = cast("torch.Tensor", torch.ops.cpumoe.experts(*given, handle, out_dtype=out_dtype))
    if out is None:
        return result
    return out.add_(result) if destination.accumulate else out.copy_(result)


def _compute(
    hidden_states: torch.Tensor,
    topk_ids: torch.Tensor,
    topk_weights: torch.Tensor,
    layer: torch.Tensor,
    *,
    out_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    known = _handles.layer(layer)
    with torch.no_grad():  # gradients are the business of refuse_derivatives
        return known(hidden_states, topk_ids, topk_weights, out_dtype=out_dtype)


def _fake(
    hidden_states: torch.Tensor,
    topk_ids: torch.Tensor,
    topk_weights: torch.Tensor,
    layer: torch.Tensor,
    *,
    out_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    _handles.check(layer)
    for name, tensor in (
        ("hidden_states", hidden_states),
        ("topk_ids", topk_ids),
        ("topk_weights", topk_weights),
    ):
        wanted = "meta" if hidden_states.is_meta else "CPU"
        if tensor.device.type != wanted.lower():
            raise TypeError(f"{name}: expected a {wanted} tensor, got device {tensor.device}")
    Destination(dtype=out_dtype).check()
    check_inputs(hidden_states, topk_ids, topk_weights, None)
    return hidden_states.new_empty(hidden_states.shape, dtype=out_dtype)


_LIBRARY = define(
    "experts(Tensor hidden_states, Tensor topk_ids, Tensor topk_weights, Tensor layer, *, "
    "ScalarType? out_dtype=None) -> Tensor",
    _compute,
    _fake,
)
refuse_derivatives("experts", _LIBRARY, inputs=(0, 2))
