"""Checks the tensors that callers pass, and turns them into addresses for the engine."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch

from cpumoe import _core
from cpumoe._base.tensors import address, contiguous, describe, new_like, plain, refuse_tracing
from cpumoe._engine.gradients import refuse_gradients, without_gradients
from cpumoe._engine.output import ELEMENTS, callers_output, check_output_options, wrote_output
from cpumoe.formats import QuantizedMatrix, WeightFormat
from cpumoe.numerics.precision import resolve_precision

# A stack of matrices [experts, N, K]: a QuantizedMatrix, or a tuple (codes, scales).
MatrixStack = QuantizedMatrix | tuple[torch.Tensor, torch.Tensor]

_FP32 = ELEMENTS[torch.float32]
_ID_DTYPES = (torch.int64, torch.int32)


class Call(NamedTuple):
    """A forward call: the engine's part, the addresses, and the tensors that they point into."""

    engine: _core.Call
    addresses: tuple[int, ...]  # the arguments of `engine.run`
    output: torch.Tensor
    inputs: tuple[torch.Tensor | None, ...]


class Calls:
    """Makes a layer's calls for the engine. The last one is kept, for the next call like it."""

    def __init__(self, layer: _core.Layer) -> None:
        """Makes calls of `layer`."""
        self._layer = layer
        self._kept: tuple[object, _core.Call | None] = (None, None)

    def get(
        self,
        runtime: _core.Runtime,
        input_dtype: _core.DType,
        output_dtype: _core.DType,
        accumulate: bool,
        fp32_as_bf16: bool,
        top_k: int,
        ids_are_64_bit: bool,
        mask: int,
    ) -> _core.Call:
        """Returns the call that has these properties; `mask` is an address."""
        key = (
            runtime,
            input_dtype,
            output_dtype,
            accumulate,
            fp32_as_bf16,
            top_k,
            ids_are_64_bit,
            mask,
        )
        kept, call = self._kept
        if call is None or kept != key:
            call = _core.Call(
                runtime=runtime,
                layer=self._layer,
                input_dtype=input_dtype,
                output_dtype=output_dtype,
                accumulate=accumulate,
                fp32_as_bf16=fp32_as_bf16,
                top_k=top_k,
                ids_are_64_bit=ids_are_64_bit,
                mask=mask,
            )
            self._kept = (key, call)
        return call


def prepare_call(
    hidden_states: torch.Tensor,
    topk_ids: torch.Tensor,
    topk_weights: torch.Tensor,
    mask: torch.Tensor | None,
    num_experts: int,
    hidden_size: int,
    precision: str,
    calls: Calls,
    runtime: _core.Runtime,
    out: torch.Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    accumulate: bool = False,
    copy_inputs: bool = False,
) -> Call:
    """Checks a forward call's tensors (see `Experts.__call__`) and allocates its output.

    With `copy_inputs`, `out` may lie in the memory of an input.
    """
    if out is not None or out_dtype is not None or accumulate:
        check_output_options(out, out_dtype, accumulate)
    x, x_address, shape = contiguous(hidden_states, "hidden_states", True)
    ids, ids_address, routed = contiguous(topk_ids, "topk_ids")
    weights, weights_address, weighted = contiguous(topk_weights, "topk_weights")
    if out is None:
        output, output_address = new_like(x, "hidden_states", out_dtype)
    element = ELEMENTS.get(x.dtype)
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
        if weights.dtype not in ELEMENTS:
            raise TypeError(
                f"topk_weights: expected float32, bfloat16 or float16, got {describe(weights)}"
            )
        weights, weights_address, _ = contiguous(weights.float(), "topk_weights")
    output_element = element if out_dtype is None else ELEMENTS[out_dtype]
    if out is not None:
        output = out
        read = ((x, "hidden_states"), (ids, "topk_ids"), (weights, "topk_weights"))
        output_address, output_element = callers_output(
            out,
            shape,
            out_dtype=out_dtype,
            accumulate=accumulate,
            apart=() if copy_inputs else read,
        )
    engine = calls.get(
        runtime,
        element,
        output_element,
        accumulate,
        # The engine uses this flag for fp32 calls only.
        element is _FP32 and resolve_precision(precision, torch.float32) == "bf16",
        routed[1],
        id_dtype == torch.int64,
        # Checked on each call, because the caller may have resized the mask.
        0 if mask is None else check_mask(mask, num_experts),
    )
    addresses = (  # in the order of _core.Call.run; keywords would take 0.5 us longer
        x_address,
        hidden_size if x.is_contiguous() else x.stride(0),
        tokens,
        ids_address,
        weights_address,
        output_address,
    )
    if out is None:
        output = without_gradients(output, hidden_states, topk_weights)
    else:
        refuse_gradients(out, hidden_states, topk_weights)
        wrote_output(out)
    # 0.1 us faster than calling the class.
    return tuple.__new__(Call, (engine, addresses, output, (x, ids, weights, mask)))


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
    fmt: WeightFormat, matrices: MatrixStack, name: str, *, stacked: bool
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
    codes = fmt.normalize_codes(codes, f"{name} codes")
    scales = fmt.normalize_scales(scales, f"{name} scales")
    if codes.dim() != (3 if stacked else 2):
        wanted = "[experts, N, K/2]" if stacked else "[N, K/2]"
        raise ValueError(f"{name} codes: expected {wanted}, got {list(codes.shape)}")
    columns = codes.shape[-1] * 8 // fmt.code_bits
    fmt.check_k(columns, f"{name}: K")
    expected = (*codes.shape[:-1], columns // fmt.group_size)
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
    if bias.dtype not in ELEMENTS:
        raise TypeError(f"{name}: expected bfloat16, float16 or float32, got {describe(bias)}")
    require_shape(bias.shape, shape, name)
    return bias


def matrix_view(matrix: QuantizedMatrix, name: str) -> _core.Matrix:
    """Returns the addresses of one matrix; `name` is for the engine's errors."""
    codes, scales = matrix.codes, matrix.scales
    rows, columns = matrix.shape
    return _core.Matrix(
        name=name,
        rows=rows,
        columns=columns,
        codes=address(codes, f"{name} codes"),
        codes_stride=codes.stride(0) * codes.itemsize,
        scales=address(scales, f"{name} scales"),
        scales_stride=scales.stride(0) * scales.itemsize,
    )
