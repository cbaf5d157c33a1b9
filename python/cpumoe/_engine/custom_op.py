"""``torch.ops.cpumoe.experts``: a call of experts as compilers and tracers record it.

A tracer cannot look into C++. It records this operator instead, whose fake implementation says what
the result looks like. Eager calls do not pass here, because the dispatcher takes time.

The operator finds its layer by a handle, a tensor with a random number. As a tensor, the handle is
an input of a compiled graph and no constant in it, so layers of equal shape share a graph, and
caches of compiled graphs serve later processes. As a random number, it never names another layer:
not in a forked child, nor in a process that loads an exported program.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, NamedTuple, NoReturn, cast
from weakref import WeakValueDictionary

import torch

from cpumoe._base.operators import define
from cpumoe._base.tensors import describe
from cpumoe._engine.calls import check_inputs
from cpumoe._engine.gradients import without_gradients
from cpumoe._engine.output import NEW_TENSOR, Destination, check_output
from cpumoe._engine.repetition import Inputs

# A layer computes what `Experts.__call__` describes, from three tensors and `out_dtype`. Layers are
# not kept alive here, so running a graph that has outlived its layer is an error.
_layers: WeakValueDictionary[int, Callable[..., torch.Tensor]] = WeakValueDictionary()


class Handle(NamedTuple):
    """Names a layer in this process, for as long as the layer lives."""

    number: int
    tensor: torch.Tensor  # the number as int64 scalar, the operator's argument


def new_handle(layer: Callable[..., torch.Tensor]) -> Handle:
    """Returns a handle for a layer."""
    # 53 bits, so that the number stays whole if a compiler keeps it as fp64.
    number = int.from_bytes(os.urandom(8), "little") >> 11
    _layers[number] = layer
    with torch.inference_mode(False):  # the tensor may be used outside of that mode
        return Handle(number, torch.tensor(number, dtype=torch.int64, device="cpu"))


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
    _check_handle(layer)
    known = _layers.get(int(layer))
    if known is None:
        raise RuntimeError(
            f"layer: expected the handle of an Experts in this process, got {int(layer)}; its "
            "Experts was deleted, or another process made it. Keep Experts alive while compiled "
            "code uses them, and export programs in the process that runs them"
        )
    with torch.no_grad():  # gradients are the business of _autograd
        return known(hidden_states, topk_ids, topk_weights, out_dtype=out_dtype)


def _fake(
    hidden_states: torch.Tensor,
    topk_ids: torch.Tensor,
    topk_weights: torch.Tensor,
    layer: torch.Tensor,
    *,
    out_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    _check_handle(layer)
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


def _check_handle(layer: torch.Tensor) -> None:
    if layer.dtype != torch.int64 or layer.dim():
        raise TypeError(f"layer: expected Experts.handle, an int64 scalar, got {describe(layer)}")


# Dynamo must not look into what the dispatcher calls.
@torch._disable_dynamo  # type: ignore[attr-defined]
def _autograd(keyset: Any, *arguments: torch.Tensor, **options: Any) -> torch.Tensor:
    for tensor in arguments:
        if torch._C._functorch.is_gradtrackingtensor(tensor):
            raise TypeError(
                "cpumoe::experts: expected plain tensors, got one that torch.func (grad, jvp) is "
                "transforming; experts compute no gradients, so keep them out of the transformed "
                "function"
            )
    keyset &= torch._C._after_autograd_keyset
    with torch._C._AutoDispatchBelowAutograd():
        result = torch.ops.cpumoe.experts.default.redispatch(keyset, *arguments, **options)
    hidden_states, _, topk_weights, _ = arguments
    return without_gradients(result, hidden_states, topk_weights)


def _vmap(*_: Any, **__: Any) -> NoReturn:
    raise TypeError(
        "cpumoe::experts: expected plain tensors, got one that torch.func.vmap is transforming; "
        "put all tokens into one dimension"
    )


_LIBRARY = define(
    "experts(Tensor hidden_states, Tensor topk_ids, Tensor topk_weights, Tensor layer, *, "
    "ScalarType? out_dtype=None) -> Tensor",
    _compute,
    _fake,
)
_LIBRARY.impl("experts", _autograd, "Autograd", with_keyset=True)  # type: ignore[no-untyped-call]
torch.library.register_vmap("cpumoe::experts", _vmap, lib=_LIBRARY)
