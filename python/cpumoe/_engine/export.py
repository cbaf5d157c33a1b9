"""Gives experts back in the form in which their checkpoint stores them."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Mapping
from dataclasses import dataclass

import torch

from cpumoe import _core
from cpumoe._base.tensors import describe, dtype_name, plain, refuse_tracing, span
from cpumoe._engine.arguments import matrix_view, require_shape
from cpumoe._engine.output import wrote_output
from cpumoe._engine.packing import ExpertForm, checked_matrices
from cpumoe.checkpoint import ExpertWeights
from cpumoe.formats import QuantizedMatrix, WeightFormat
from cpumoe.formats.weight_format import K_MULTIPLE

# Memory for a matrix [N, K]: a QuantizedMatrix, a tuple (codes, scales), or a tensor in a format
# without scales.
MatrixBuffer = QuantizedMatrix | tuple[torch.Tensor, torch.Tensor] | torch.Tensor


def new_expert(
    layer: _core.Layer, form: ExpertForm, expert: int
) -> tuple[QuantizedMatrix, QuantizedMatrix, QuantizedMatrix]:
    """Returns memory for a packed expert's gate, up and down."""
    fmt = form.fmt

    def matrix(rows: int, columns: int, group_size: int) -> QuantizedMatrix:
        # The engine writes to CPU memory, whatever the caller's default device is.
        if fmt.scale_storage is None:
            return QuantizedMatrix(
                torch.empty(rows, columns, dtype=fmt.code_dtypes[0], device="cpu")
            )
        code_bytes, groups = columns * fmt.code_bits // 8, columns // group_size
        return QuantizedMatrix(
            torch.empty(rows, code_bytes, dtype=torch.uint8, device="cpu"),
            torch.empty(rows, groups, dtype=fmt.scale_storage, device="cpu"),
        )

    sizes = _sizes(form, form.intermediate_size).values()
    depths = layer.scale_depths(expert=expert)
    gate, up, down = (matrix(*size, depth) for size, depth in zip(sizes, depths, strict=True))
    return gate, up, down


def export_into(
    layer: _core.Layer,
    form: ExpertForm,
    expert: int,
    buffers: Mapping[str, MatrixBuffer],
    intermediate: slice | range | None,
    runtime: _core.Runtime,
) -> None:
    """Writes a packed expert to the caller's memory; see `Experts.export_into`."""
    features = _features(intermediate, form)
    targets = _targets(form, buffers, len(features))
    shard = ([target.matrix for target in targets], features.start)
    layer.unpack(runtime=runtime, expert=expert, shards=[shard])
    for target in targets:
        target.finish()


def copy_into(
    weights: ExpertWeights,
    form: ExpertForm,
    expert: int,
    buffers: Mapping[str, MatrixBuffer],
    intermediate: slice | range | None,
) -> None:
    """Writes an expert that is not packed to the caller's memory; see `Experts.export_into`."""
    features = _features(intermediate, form)
    targets = _targets(form, buffers, len(features))
    matrices = checked_matrices(form.fmt, expert, weights)
    for matrix in matrices:
        form.fmt.check_scales(matrix.scales, matrix.name)
    first, last = features.start, features.stop
    for name, matrix, target in zip(buffers, matrices, targets, strict=True):
        column = 0
        if name == "down":
            column = first
            per = form.intermediate_size // matrix.codes.shape[1]  # features per element
            target.codes.copy_(matrix.codes[:, first // per : last // per])
        else:
            matrix = matrix[first:last]
            target.codes.copy_(matrix.codes)
        if target.scales is not None:
            target.scales.detach().copy_(_scales_of(matrix, column, target))
        target.finish()


def _scales_of(matrix: QuantizedMatrix, column: int, target: _Target) -> torch.Tensor:
    """Returns the scales of a matrix' columns from `column` on, as `target` wants them."""
    scales, stored, wanted = matrix.given_scales, matrix.group_size, target.group_size
    assert stored
    assert wanted
    assert target.scales is not None
    starts = torch.arange(target.scales.shape[1], device="cpu") * wanted + column
    chosen = starts // stored
    ends = (starts + wanted - 1).clamp(max=matrix.shape[1] - 1) // stored
    if not torch.equal(chosen, ends):
        raise ValueError(
            f"{matrix.name}: {stored} weights share a scale, so columns from {column} on cannot "
            f"have a scale for each {wanted}"
        )
    if target.matrix.scales_as_bf16:
        scales = scales.view(torch.float8_e8m0fnu)
    if stored == wanted:  # the usual case, without a copy
        return scales[:, int(chosen[0]) : int(chosen[-1]) + 1]
    return scales[:, chosen]


@dataclass(frozen=True)
class _Target:
    """A matrix that is written."""

    matrix: _core.Matrix
    codes: torch.Tensor  # the caller's memory; bytes, or bf16 weights
    scales: torch.Tensor | None  # the caller's memory, bf16 or as the format stores scales
    group_size: int | None  # of these scales
    written: tuple[torch.Tensor, ...]  # the caller's tensors
    memories: tuple[tuple[torch.Tensor, str], ...]  # with their names

    def finish(self) -> None:
        """Tells autograd of the change."""
        for tensor in self.written:
            wrote_output(tensor)


def _sizes(form: ExpertForm, features: int) -> dict[str, tuple[int, int]]:
    hidden = form.hidden_size
    return {"gate": (features, hidden), "up": (features, hidden), "down": (hidden, features)}


def _features(intermediate: slice | range | None, form: ExpertForm) -> range:
    size, group = form.intermediate_size, K_MULTIPLE
    if intermediate is None:
        return range(size)
    if not isinstance(intermediate, slice | range):
        raise TypeError(
            f"intermediate: expected a slice or a range, got {type(intermediate).__name__}"
        )
    try:
        features = (
            range(*intermediate.indices(size)) if isinstance(intermediate, slice) else intermediate
        )
    except TypeError:
        raise TypeError(
            f"intermediate: expected bounds that are ints or None, got {intermediate}"
        ) from None
    whole = features.start % group == 0 and features.stop % group == 0
    if features.step != 1 or not (0 <= features.start < features.stop <= size and whole):
        raise ValueError(
            f"intermediate: expected whole groups of {group} features within 0..{size}, got "
            f"{intermediate}"
        )
    return features


def _targets(form: ExpertForm, buffers: Mapping[str, MatrixBuffer], features: int) -> list[_Target]:
    """Returns the checked buffers of gate, up and down."""
    refuse_tracing("export_into")
    targets = [
        _target(form.fmt, buffers[name], name, *size)
        for name, size in _sizes(form, features).items()
    ]
    memories = [memory for target in targets for memory in target.memories]
    for (first, name), (second, other) in itertools.combinations(memories, 2):
        if _overlap(first, second):
            raise ValueError(
                f"{other}: expected memory that {name} does not use, got tensors that overlap; "
                "pass tensors with memory of their own"
            )
    return targets


def _target(fmt: WeightFormat, buffer: MatrixBuffer, name: str, rows: int, columns: int) -> _Target:
    if isinstance(buffer, tuple) and len(buffer) == 2:
        buffer = QuantizedMatrix(*buffer)
    elif isinstance(buffer, torch.Tensor) and fmt.scale_storage is None:
        buffer = QuantizedMatrix(buffer)
    if not isinstance(buffer, QuantizedMatrix):
        wanted = "a tensor" if fmt.scale_storage is None else "a tuple (codes, scales)"
        raise TypeError(
            f"{name}: expected a QuantizedMatrix or {wanted}, got {type(buffer).__name__}"
        )
    codes, scales = buffer.codes, buffer.scales
    code_memory = _memory(codes, f"{name} codes", fmt.code_dtypes, rows, columns * fmt.code_bits)
    if fmt.scale_storage is None:
        if scales is not None:
            raise TypeError(f"{name} scales: {fmt.name} has no scales; pass the weights alone")
        matrix = matrix_view(QuantizedMatrix(code_memory), name)
        return _Target(matrix, code_memory, None, None, (codes,), ((code_memory, f"{name} codes"),))
    groups = columns // fmt.group_size
    if fmt.groups_vary and isinstance(scales, torch.Tensor) and scales.dim() == 2:
        fewer = scales.shape[1]
        if fewer and columns % (fewer * fmt.group_size) == 0:
            groups = fewer
    # Whether the caller asks for powers of two as bf16.
    is_bf16 = getattr(scales, "dtype", None) == torch.bfloat16
    converts = is_bf16 and fmt.scale_dtype == torch.float8_e8m0fnu
    accepted = (torch.bfloat16,) if converts else fmt.scale_dtypes
    bits = groups * 8 * (torch.bfloat16.itemsize if converts else fmt.scale_storage.itemsize)
    scale_memory = _memory(scales, f"{name} scales", accepted, rows, bits)
    written = QuantizedMatrix(
        code_memory.view(torch.uint8),
        scale_memory if converts else scale_memory.view(fmt.scale_storage),
    )
    matrix = matrix_view(written, name, scales_as_bf16=converts)
    memories = ((code_memory, f"{name} codes"), (scale_memory, f"{name} scales"))
    assert scales is not None
    return _Target(
        matrix, written.codes, written.scales, columns // groups, (codes, scales), memories
    )


def _overlap(first: torch.Tensor, second: torch.Tensor) -> bool:
    """Whether two matrices share bytes. Their rows may alternate in memory without doing so."""
    start, end = span(first)
    other, last = span(second)
    if max(start, other) >= min(end, last):
        return False
    pitch = first.stride(0) * first.itemsize
    if pitch != second.stride(0) * second.itemsize:
        return True
    behind = (other - start) % pitch
    return (
        behind < first.shape[1] * first.itemsize
        or pitch - behind < second.shape[1] * second.itemsize
    )


def _memory(
    tensor: torch.Tensor | None,
    name: str,
    accepted: Collection[torch.dtype],
    rows: int,
    row_bits: int,
) -> torch.Tensor:
    """Returns a tensor whose memory the engine may write, `row_bits` in each of `rows` rows."""
    if tensor is None:
        raise TypeError(f"{name}: expected a tensor, got None")
    memory = plain(tensor, name)
    if tensor.is_neg():
        raise TypeError(f"{name}: expected a tensor without lazy negation; pass a new tensor")
    if memory.dtype not in accepted:
        expected = " or ".join(dtype_name(dtype) for dtype in accepted)
        raise TypeError(f"{name}: expected {expected}, got {describe(memory)}")
    columns = row_bits // (8 * memory.itemsize)
    require_shape(memory.shape, (rows, columns), name)
    row_stride, stride = memory.stride()
    if (columns > 1 and stride != 1) or (rows > 1 and row_stride < columns):
        raise ValueError(
            f"{name}: expected rows that are contiguous and do not overlap, got strides "
            f"{list(memory.stride())}; pass a contiguous tensor and copy from it"
        )
    return memory
