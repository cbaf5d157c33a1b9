"""The short way to a forward call that is like an earlier one.

The checks of a call ask PyTorch some thirty questions about its tensors. Between two calls of a
decoding model the code that answers them leaves the caches, and each answer then takes a
microsecond or more. But the tensors of these calls differ in nothing but their memory.

PyTorch has guards, by which compiled code decides whether inputs fit it. One query of a guard
compares almost everything else: class, dtype, shape, strides, whether a gradient is required, and
the dispatch keys. The keys say whether a tensor is dense, on the CPU and not lazily negated, and
whether a tracer or a transform is active.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch.autograd import forward_ad

from cpumoe import _core
from cpumoe._base.tensors import (
    dispatch_modes,
    modes_are_active,
    new_strided,
    reach,
    start_in_memory,
)
from cpumoe._engine.output import Destination, wrote_output


def _guard_of(*tensors: torch.Tensor) -> Any:
    """Returns a function that tells whether other tensors are like these.

    Returns None if this PyTorch has no such guard, or another kind. Then every call takes the long
    way, which is slower and otherwise equal.
    """
    try:
        guard = torch._C._dynamo.guards.TensorGuards(
            *tensors, dynamic_dims_sizes=None, dynamic_dims_strides=None
        )
        return guard.check if guard.check(*tensors) else None
    except (AttributeError, TypeError):
        return None


# Hidden states, ids and weights as the caller passed them.
Inputs = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


class Call(NamedTuple):
    """A forward call: the engine's part, the addresses, and the tensors that they point into."""

    engine: _core.Call
    addresses: tuple[int, ...]  # the arguments of `engine.run`
    output: torch.Tensor
    inputs: Inputs


class Repetition:
    """Makes calls that are like one that passed all checks.

    Memory is checked each time, because a tensor like an earlier one may have lost its storage.
    """

    def __init__(self, call: Call, given: Inputs, destination: Destination, guard: Any) -> None:
        """Use `repetition_of`."""
        x = given[0]
        out = destination.out
        self._is_like = guard
        self._options = (out is None, destination.dtype, destination.accumulate)
        self._engine = call.engine
        self._stride, self._tokens = call.addresses[1:3]
        self._x, self._ids, self._weights = ((reach(t), t.itemsize) for t in given)
        self._output = (reach(call.output), call.output.itemsize)
        self._new = (tuple(x.shape), (x.shape[1], 1), call.output.dtype)

    def again(self, given: Inputs, destination: Destination) -> Call | None:
        """Returns a call, or None if it is not like the earlier one."""
        out = destination.out
        if self._options != (out is None, destination.dtype, destination.accumulate):
            return None
        x, ids, weights = given
        x_start = start_in_memory(x, *self._x)
        ids_start = start_in_memory(ids, *self._ids)
        weights_start = start_in_memory(weights, *self._weights)
        start = 0 if out is None else start_in_memory(out, *self._output)
        if not (x_start and ids_start and weights_start and (start or out is None)):
            return None
        # A guard ends the process if a tensor has no shape or no strides. These tensors have both.
        if not (self._is_like(x, ids, weights) if out is None else self._is_like(*given, out)):
            return None
        if dispatch_modes() or forward_ad._current_level >= 0:
            return None
        if out is None:
            output, start = new_strided(*self._new)
        else:
            starts = (x_start, ids_start, weights_start)
            if not destination.may_overlap and self._overlaps(start, starts):
                return None
            wrote_output(out)
            output = out
        addresses = (x_start, self._stride, self._tokens, ids_start, weights_start, start)
        # 0.1 us faster than calling the class.
        return tuple.__new__(Call, (self._engine, addresses, output, given))

    def _overlaps(self, start: int, starts: tuple[int, int, int]) -> bool:
        end = start + self._output[0]
        lengths = (self._x[0], self._ids[0], self._weights[0])
        return any(
            first < end and start < first + length
            for first, length in zip(starts, lengths, strict=True)
        )


def repetition_of(call: Call, given: Inputs, destination: Destination) -> Repetition | None:
    """Returns what makes calls like a checked one, or None if a guard cannot tell what is like it.

    Args:
        call: the checked call.
        given: hidden states, ids and weights as the caller passed them.
        destination: where the call's result goes.
    """
    tensors = given if destination.out is None else (*given, destination.out)
    for tensor in tensors:
        # A guard does not see whether gradients are enabled, but does see who requires one.
        if type(tensor) is not torch.Tensor or tensor.requires_grad or not tensor.numel():
            return None
    copied = any(used is not tensor for used, tensor in zip(call.inputs, given, strict=True))
    if copied or modes_are_active():
        return None
    guard = _guard_of(*tensors)
    return None if guard is None else Repetition(call, given, destination, guard)
