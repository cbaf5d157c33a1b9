"""Checks weights and masks, and turns them into addresses for the engine."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch

from cpumoe import _core
from cpumoe._base.tensors import address, describe, plain, refuse_tracing
from cpumoe._engine.output import ELEMENTS
from cpumoe.formats import QuantizedMatrix, WeightFormat
from cpumoe.formats.weight_format import KERNEL_GROUP

# A stack of matrices [experts, N, K]: a QuantizedMatrix, a tuple of its parts, or the weights of a
# format without scales.
MatrixStack = QuantizedMatrix | tuple[torch.Tensor, ...] | torch.Tensor


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
        raise ValueError(
            f"expert_mask: expected a contiguous tensor, got strides {list(mask.stride())}; pass "
            ".contiguous()"
        )
    return start


def normalized(
    fmt: WeightFormat, matrices: MatrixStack | None, name: str, *, stacked: bool
) -> QuantizedMatrix:
    """Returns a matrix, or a stack, as bytes of codes and scales whose shapes fit."""
    if isinstance(matrices, tuple) and len(matrices) in (2, fmt.num_parts):
        matrices = QuantizedMatrix(*matrices)
    elif isinstance(matrices, torch.Tensor) and fmt.scale_dtype is None:
        matrices = QuantizedMatrix(matrices)
    if not isinstance(matrices, QuantizedMatrix):
        raise TypeError(
            f"{name}: expected a QuantizedMatrix or {wanted_parts(fmt)}, got {kind(matrices)}; "
            f"{fmt.remedy}"
        )
    refuse_tracing(name)
    codes = fmt.normalize_codes(matrices.codes, f"{name} codes")
    scales = fmt.normalize_scales(matrices.scales, f"{name} scales")
    if codes.dim() != (3 if stacked else 2):
        k = "K/2" if codes.dtype == torch.uint8 else "K"
        wanted = f"[experts, N, {k}]" if stacked else f"[N, {k}]"
        how = "stack the experts' matrices" if stacked else "pass one expert's matrix"
        raise ValueError(f"{name} codes: expected {wanted}, got {list(codes.shape)}; {how}")
    fmt.check_shapes(codes, scales, name)
    if fmt.factor_for is not None and matrices.factor is None:  # whoever forgot it gets no results
        raise TypeError(f"{name} factor: expected float32, got None; {fmt.remedy}")
    factor = fmt.normalize_factor(matrices.factor, codes.shape[:-2], f"{name} factor")
    return QuantizedMatrix(codes, scales, factor, name=matrices.name or name)


def wanted_parts(fmt: WeightFormat) -> str:
    """Returns what may be passed instead of a QuantizedMatrix, for errors."""
    parts = ("codes", "scales", "factor")[: fmt.num_parts]
    return f"a tuple ({', '.join(parts)})" if len(parts) > 1 else "a tensor"


def kind(value: object) -> str:
    """Returns the name of a value's type, and how long a tuple is, for errors."""
    return f"a tuple of {len(value)}" if isinstance(value, tuple) else type(value).__name__


def require_shape(got: Sequence[int], expected: Sequence[int], name: str, remedy: str = "") -> None:
    """Raises ValueError unless the shapes are equal."""
    if tuple(got) != tuple(expected):
        end = f"; {remedy}" if remedy else ""
        raise ValueError(f"{name}: expected {list(expected)}, got {list(got)}{end}")


def checked_biases(
    biases: Sequence[torch.Tensor | None], widths: Mapping[str, int], *experts: int
) -> list[torch.Tensor]:
    """Returns the biases ``[*experts, width]``, detached, or none; `widths` has their names."""
    given = {n: b for n, b in zip(widths, biases, strict=True) if b is not None}
    if given and len(given) != len(widths):
        missing = ", ".join(name for name in widths if name not in given)
        everything = "both" if len(widths) == 2 else "all three"
        raise ValueError(f"{', '.join(widths)}: expected {everything} or none, got no {missing}")
    return [_bias(bias, name, (*experts, widths[name])) for name, bias in given.items()]


def dense_bias(bias: torch.Tensor | None, width: int) -> torch.Tensor | None:
    """Returns a copy of a bias ``[width]``, or None if there is none.

    Raises:
        TypeError, ValueError: the bias is something else.
    """
    return None if bias is None else _bias(bias, "bias", (width,)).clone()


def _bias(bias: torch.Tensor, name: str, shape: tuple[int, ...]) -> torch.Tensor:
    bias = plain(bias, name).detach()
    if bias.dtype not in ELEMENTS:
        raise TypeError(f"{name}: expected bfloat16, float16 or float32, got {describe(bias)}")
    require_shape(bias.shape, shape, name)
    return bias


# The engine's names of the dtypes of scales in a QuantizedMatrix.
SCALE_TYPES = {
    torch.uint8: _core.ScaleType.E8M0,
    torch.float8_e8m0fnu: _core.ScaleType.E8M0,
    torch.bfloat16: _core.ScaleType.BF16,
    torch.float16: _core.ScaleType.FP16,
    torch.float32: _core.ScaleType.FP32,
    torch.float8_e4m3fn: _core.ScaleType.E4M3,
}


def layer_scale_type(fmt: WeightFormat, dtypes: Iterable[torch.dtype]) -> _core.ScaleType:
    """Returns the type of scales for which a layer is made.

    Args:
        fmt: the layer's format.
        dtypes: the dtypes of its experts' scales. Float32 holds scales of several dtypes.
    """
    types = {SCALE_TYPES[dtype] for dtype in dtypes if dtype in fmt.scale_dtypes}
    if len(types) > 1:
        return _core.ScaleType.FP32
    return next(iter(types), _core.ScaleType.OWN)


# The gate of experts without one.
NO_MATRIX = _core.Matrix(name="gate", rows=0, columns=0, codes=0, codes_stride=0)


def matrix_view(matrix: QuantizedMatrix, name: str) -> _core.Matrix:
    """Returns the addresses of one matrix; `name` is for the engine's errors."""
    codes, scales = matrix.codes, matrix.scales
    rows, columns = matrix.shape
    scale_rows, scale_depth = matrix.scale_grid or (1, KERNEL_GROUP)
    return _core.Matrix(
        name=name,
        rows=rows,
        columns=columns,
        codes=address(codes, f"{name} codes"),
        codes_stride=codes.stride(0) * codes.itemsize,
        scales=0 if scales is None else address(scales, f"{name} scales"),
        scales_stride=0 if scales is None else scales.stride(0) * scales.itemsize,
        scale_rows=scale_rows,
        scale_depth=scale_depth,
        scale_type=_core.ScaleType.OWN if scales is None else SCALE_TYPES[scales.dtype],
        factor=1.0 if matrix.factor is None else matrix.factor.item(),
    )
