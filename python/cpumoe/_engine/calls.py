"""Checks the tensors of forward calls, and turns them into addresses for the engine."""

from __future__ import annotations

from typing import Any

import torch

from cpumoe import _core
from cpumoe._base.tensors import contiguous, describe, new_like, refuse_tracing
from cpumoe._engine.gradients import refuse_gradients, without_gradients
from cpumoe._engine.output import ELEMENTS, Destination, callers_output, wrote_output
from cpumoe._engine.repetition import Call, Inputs, Repetition, repetition_of
from cpumoe.numerics.precision import resolve_precision

_FP32 = ELEMENTS[torch.float32]
_ID_DTYPES = (torch.int64, torch.int32)


class Calls:
    """Makes a layer's calls. What the last one needed is kept, for the next call like it."""

    def __init__(self, layer: _core.Layer, *, hidden_size: int, precision: str) -> None:
        """Makes calls of `layer`."""
        self._layer = layer
        self._hidden_size = hidden_size
        self._precision = precision
        self.forget()

    def forget(self) -> None:
        """Forgets what is kept, which would keep an old runtime alive."""
        self._engine: tuple[dict[str, Any], _core.Call | None] = ({}, None)
        # The runtime, whether fp32 may be rounded to bf16 (None: no fp32), and the call's tensors.
        self._repetition: tuple[object, bool | None, Repetition | None] = (None, None, None)

    def repeat(
        self, given: Inputs, destination: Destination, runtime: _core.Runtime
    ) -> Call | None:
        """Returns a call if it is like the last one that was checked.

        Args:
            given: hidden states, ids and weights.
            destination: where the result goes.
            runtime: the threads that the call will run on.
        """
        kept, setting, repetition = self._repetition
        if (
            repetition is not None
            and kept is runtime
            and (setting is None or setting == self._fp32_as_bf16())
        ):
            return repetition.again(given, destination)
        return None

    def prepare(self, given: Inputs, destination: Destination, runtime: _core.Runtime) -> Call:
        """Checks a call's tensors (see `Experts.__call__`) and allocates its output.

        Args:
            given: see `repeat`.
            destination: see `repeat`.
            runtime: see `repeat`.
        """
        call = self._checked(given, destination, runtime)
        setting = self._fp32_as_bf16() if given[0].dtype == torch.float32 else None
        self._repetition = (runtime, setting, repetition_of(call, given, destination))
        return call

    def _fp32_as_bf16(self) -> bool:
        return resolve_precision(self._precision, torch.float32) == "bf16"

    def _checked(self, given: Inputs, destination: Destination, runtime: _core.Runtime) -> Call:
        hidden_states, topk_ids, topk_weights = given
        out = destination.out
        destination.check()
        if out is not None:
            refuse_tracing("out")
        x, x_address, shape = contiguous(hidden_states, "hidden_states", True)
        ids, ids_address, routed = contiguous(topk_ids, "topk_ids")
        weights, weights_address, _ = contiguous(topk_weights, "topk_weights")
        if out is None:
            output, output_address = new_like(x, "hidden_states", destination.dtype)
        check_inputs(x, ids, weights, self._hidden_size)
        element = ELEMENTS[x.dtype]
        if weights.dtype != torch.float32:
            weights, weights_address, _ = contiguous(weights.float(), "topk_weights")
        if out is None:
            output = without_gradients(output, hidden_states, topk_weights)
        else:
            read = ((x, "hidden_states"), (ids, "topk_ids"), (weights, "topk_weights"))
            output, output_address = callers_output(destination, shape, read)
            refuse_gradients(output, hidden_states, topk_weights)
            wrote_output(output)
        engine = self._engine_call(
            runtime=runtime,
            input_dtype=element,
            output_dtype=ELEMENTS[output.dtype],
            accumulate=destination.accumulate,
            # The engine uses this flag for fp32 calls only.
            fp32_as_bf16=element is _FP32 and self._fp32_as_bf16(),
            top_k=routed[1],
            ids_are_64_bit=ids.dtype == torch.int64,
        )
        addresses = (  # in the order of _core.Call.run; keywords would take 0.5 us longer
            x_address,
            self._hidden_size if x.is_contiguous() else x.stride(0),
            shape[0],
            ids_address,
            weights_address,
            output_address,
        )
        return Call(engine, addresses, output, (x, ids, weights))

    def _engine_call(self, **properties: Any) -> _core.Call:
        """Returns the engine's call with these properties."""
        kept, call = self._engine
        if call is None or kept != properties:
            call = _core.Call(layer=self._layer, **properties)
            self._engine = (properties, call)
        return call


def check_inputs(
    x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, hidden_size: int | None
) -> None:
    """Checks dtypes and shapes of hidden states, ids and weights; see `Experts.__call__`.

    `hidden_size` may be unknown.
    """
    if x.dtype not in ELEMENTS:
        raise TypeError(f"hidden_states: expected bfloat16, float16 or float32, got {describe(x)}")
    if x.dim() != 2 or (hidden_size is not None and x.shape[1] != hidden_size):
        wanted = "hidden" if hidden_size is None else hidden_size
        raise ValueError(f"hidden_states: expected [tokens, {wanted}], got {list(x.shape)}")
    if ids.dtype not in _ID_DTYPES:
        raise TypeError(f"topk_ids: expected int32 or int64, got {describe(ids)}")
    if ids.dim() != 2 or ids.shape[0] != x.shape[0]:
        raise ValueError(f"topk_ids: expected [{x.shape[0]}, top_k], got {list(ids.shape)}")
    if weights.shape != ids.shape:
        raise ValueError(
            f"topk_weights: expected {list(ids.shape)} like topk_ids, got {list(weights.shape)}"
        )
    if weights.dtype not in ELEMENTS:
        raise TypeError(
            f"topk_weights: expected float32, bfloat16 or float16, got {describe(weights)}"
        )
