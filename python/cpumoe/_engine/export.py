"""Gives experts back in the form in which their checkpoint stores them."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace

import torch

from cpumoe import _core
from cpumoe._base.tensors import describe, dtype_name, plain, refuse_tracing, span
from cpumoe._engine.arguments import (
    NO_MATRIX,
    SCALE_TYPES,
    kind,
    matrix_view,
    require_shape,
    wanted_parts,
)
from cpumoe._engine.output import wrote_output
from cpumoe._engine.packing import ExpertForm, checked_matrices, require_no_gate
from cpumoe.checkpoint import ExpertWeights
from cpumoe.formats import QuantizedMatrix, WeightFormat
from cpumoe.formats.quantized_matrix import BLOCK, group_of
from cpumoe.formats.weight_format import KERNEL_GROUP

# Memory for a matrix [N, K]: a QuantizedMatrix, a tuple of its parts, or a tensor in a format that
# has no scales.
MatrixBuffer = QuantizedMatrix | tuple[torch.Tensor, ...] | torch.Tensor


# The dtypes of scales by the engine's names.
_SCALE_DTYPES = {stored: dtype for dtype, stored in SCALE_TYPES.items()}


def new_matrix(
    fmt: WeightFormat, rows: int, columns: int, stored: _core.StoredScales
) -> QuantizedMatrix:
    """Returns memory for a packed matrix that had these scales."""
    # The engine writes to CPU memory, whatever the caller's default device is.
    elements = columns * fmt.code_bits // (8 * fmt.code_storage.itemsize)
    codes = torch.empty(rows, elements, dtype=fmt.code_storage, device="cpu")
    if fmt.scale_storage is None:
        return QuantizedMatrix(codes)
    grid = stored.grid
    shape = (-(-rows // grid.rows), -(-columns // grid.depth))
    dtype = fmt.stored_scale(_SCALE_DTYPES[grid.type])
    scales = torch.empty(shape, dtype=dtype, device="cpu")
    if fmt.factor_for is None:
        return QuantizedMatrix(codes, scales)
    factor = torch.tensor(stored.factor, dtype=torch.float32, device="cpu")
    return QuantizedMatrix(codes, scales, factor)


def new_expert(
    layer: _core.Layer, form: ExpertForm, expert: int
) -> tuple[QuantizedMatrix, QuantizedMatrix, QuantizedMatrix]:
    """Returns memory for a packed expert's gate, up and down. Without a gate it is `up`."""
    sizes = _sizes(form, form.intermediate_size)
    stored = dict(zip(("gate", "up", "down"), layer.scales(expert=expert), strict=True))
    made = {name: new_matrix(form.fmt, *size, stored[name]) for name, size in sizes.items()}
    return made.get("gate", made["up"]), made["up"], made["down"]


def export_into(
    layer: _core.Layer,
    form: ExpertForm,
    expert: int,
    buffers: Mapping[str, MatrixBuffer | None],
    intermediate: slice | range | None,
    runtime: _core.Runtime,
) -> None:
    """Writes a packed expert to the caller's memory; see `Experts.export_into`."""
    features = feature_range(intermediate, form)
    targets = _targets(form, buffers, len(features))
    matrices = [target.matrix for target in targets]
    shard = (matrices if form.gated else [NO_MATRIX, *matrices], features.start)
    layer.unpack(runtime=runtime, expert=expert, shards=[shard])
    for target, stored in zip(targets, layer.scales(expert=expert)[-len(targets) :], strict=True):
        target.set_factor(stored.factor)
        target.finish()


def copy_into(
    weights: ExpertWeights,
    form: ExpertForm,
    expert: int,
    buffers: Mapping[str, MatrixBuffer | None],
    intermediate: slice | range | None,
) -> None:
    """Writes an expert that is not packed to the caller's memory; see `Experts.export_into`."""
    features = feature_range(intermediate, form)
    targets = _targets(form, buffers, len(features))
    matrices = checked_matrices(form, expert, weights)
    for matrix in matrices:
        form.fmt.check_scales(matrix.scales, matrix.name)
    first, last = features.start, features.stop
    for name, matrix, target in zip(form.projections, matrices, targets, strict=True):
        row, column = first, 0
        if name == "down":
            row, column = 0, first
            per = form.intermediate_size // matrix.codes.shape[1]  # features per element
            target.codes.copy_(matrix.codes[:, first // per : last // per])
        else:
            target.codes.copy_(matrix.codes[first:last])
        if target.scales is not None:
            target.scales.detach().copy_(_scales_of(matrix, row, column, target))
        target.set_factor(1.0 if matrix.factor is None else matrix.factor.item())
        target.finish()


def _scales_of(matrix: QuantizedMatrix, row: int, column: int, target: _Target) -> torch.Tensor:
    """Returns a matrix' scales from `row` and `column` on, as `target` wants them."""
    scales, stored, written = matrix.given_scales, matrix.scale_grid, target.written
    wanted = written.scale_grid
    assert stored
    assert wanted
    (rows, columns), given = written.shape, written.given_scales
    chosen_rows = _blocks(matrix.name, "rows", (row, rows), wanted[0], stored[0])
    chosen = _blocks(matrix.name, "columns", (column, columns), wanted[1], stored[1])
    if scales.dtype == torch.uint8 and given.dtype != torch.uint8:
        scales = scales.view(torch.float8_e8m0fnu)
    exact = scales.dtype == given.dtype or given.dtype == torch.float32
    if not exact and scales.dtype != torch.float8_e8m0fnu:
        raise ValueError(
            f"{matrix.name}: {dtype_name(given.dtype)} scales cannot hold the stored "
            f"{dtype_name(scales.dtype)} ones; pass scales of that dtype"
        )
    return scales[chosen_rows][:, chosen]


def _blocks(
    name: str, what: str, span: tuple[int, int], wanted: int, stored: int
) -> torch.Tensor | slice:
    """Returns the indices of the stored blocks of scales that hold the wanted ones.

    Args:
        name: the matrix' name, for errors.
        what: rows or columns.
        span: the first row or column, and their number.
        wanted: how many of them share a wanted scale.
        stored: how many of them share a stored scale.
    """
    begin, count = span
    starts = torch.arange(begin, begin + count, wanted, device="cpu")
    chosen = starts // stored
    ends = (starts + wanted - 1).clamp(max=begin + count - 1) // stored
    if not torch.equal(chosen, ends):
        raise ValueError(
            f"{name}: {stored} {what} share a scale, so {count} {what} from {begin} on cannot have "
            f"a scale for each {wanted}"
        )
    if stored == wanted:  # the usual case, without a copy
        return slice(int(chosen[0]), int(chosen[-1]) + 1)
    return chosen


@dataclass(frozen=True)
class _Target:
    """A matrix that is written."""

    matrix: _core.Matrix
    written: QuantizedMatrix  # the caller's memory
    given: tuple[torch.Tensor, ...]  # the caller's tensors
    memories: tuple[tuple[torch.Tensor, str], ...]  # with their names

    @property
    def codes(self) -> torch.Tensor:
        return self.written.codes

    @property
    def scales(self) -> torch.Tensor | None:
        return self.written.scales

    def set_factor(self, factor: float) -> None:
        if self.written.factor is not None:
            self.written.factor.fill_(factor)

    def finish(self) -> None:
        """Tells autograd of the change."""
        for tensor in self.given:
            wrote_output(tensor)


def _sizes(form: ExpertForm, features: int) -> dict[str, tuple[int, int]]:
    hidden = form.hidden_size
    return {
        name: (hidden, features) if name == "down" else (features, hidden)
        for name in form.projections
    }


def feature_range(intermediate: slice | range | None, form: ExpertForm) -> range:
    """Returns the intermediate features that a caller chooses; None: all.

    Raises:
        TypeError: `intermediate` is no slice or range of ints.
        ValueError: it has no whole groups of features, or others than the experts have.
    """
    size, group = form.intermediate_size, KERNEL_GROUP
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
    whole = features.start % group == 0 and features.stop in (size, features.stop // group * group)
    if features.step != 1 or not (0 <= features.start < features.stop <= size and whole):
        raise ValueError(
            f"intermediate: expected whole groups of {group} features within 0..{size}, got "
            f"{intermediate}"
        )
    return features


def _targets(
    form: ExpertForm, buffers: Mapping[str, MatrixBuffer | None], features: int
) -> list[_Target]:
    """Returns the checked buffers of gate, up and down."""
    refuse_tracing("export_into")
    require_no_gate(buffers["gate"], "gate", gated=form.gated)
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


def _target(
    fmt: WeightFormat, buffer: MatrixBuffer | None, name: str, rows: int, columns: int
) -> _Target:
    if isinstance(buffer, tuple) and len(buffer) in (2, fmt.num_parts):
        buffer = QuantizedMatrix(*buffer)
    elif isinstance(buffer, torch.Tensor) and fmt.scale_storage is None:
        buffer = QuantizedMatrix(buffer)
    if not isinstance(buffer, QuantizedMatrix):
        raise TypeError(
            f"{name}: expected a QuantizedMatrix or {wanted_parts(fmt)}, got {kind(buffer)}"
        )
    codes, scales = buffer.codes, buffer.scales
    factor = _factor_memory(fmt, buffer.factor, f"{name} factor")
    code_memory = _memory(codes, f"{name} codes", fmt.code_dtypes, rows, columns * fmt.code_bits)
    if fmt.scale_storage is None:
        if scales is not None:
            raise TypeError(f"{name} scales: {fmt.name} has no scales; pass the weights alone")
        written = QuantizedMatrix(code_memory)
        memories: tuple[tuple[torch.Tensor, str], ...] = ((code_memory, f"{name} codes"),)
        return _Target(matrix_view(written, name), written, (codes,), memories)
    # Whether the caller asks for powers of two as bf16.
    is_bf16 = getattr(scales, "dtype", None) == torch.bfloat16
    converts = is_bf16 and fmt.scale_dtype == torch.float8_e8m0fnu
    accepted = (torch.bfloat16,) if converts else fmt.scale_dtypes
    scale_rows, scale_columns = _scale_shape(fmt, scales, rows, columns)
    size = getattr(getattr(scales, "dtype", None), "itemsize", 1)
    scale_memory = _memory(scales, f"{name} scales", accepted, scale_rows, scale_columns * 8 * size)
    # Words of eight codes may have some behind the row's last, which stay as they are.
    stored_codes = code_memory.view(fmt.code_storage)
    if fmt.values:
        stored_codes = stored_codes[:, : columns * fmt.code_bits // 8]
    written = QuantizedMatrix(
        stored_codes,
        scale_memory if converts else scale_memory.view(fmt.stored_scale(scale_memory.dtype)),
    )
    memories = ((code_memory, f"{name} codes"), (scale_memory, f"{name} scales"))
    if factor is not None:  # as a matrix, like the others
        memories = (*memories, (factor.as_strided((1, 1), (1, 1)), f"{name} factor"))
    assert scales is not None
    given = (codes, scales) if buffer.factor is None else (codes, scales, buffer.factor)
    view = matrix_view(written, name)  # the engine does not write factors
    return _Target(view, replace(written, factor=factor), given, memories)


def _factor_memory(fmt: WeightFormat, factor: object, name: str) -> torch.Tensor | None:
    """Returns the memory for a matrix' factor; None: the format has none."""
    if fmt.factor_for is None:
        if factor is not None:
            raise TypeError(f"{name}: {fmt.name} has no factors; pass codes and scales alone")
        return None
    wanted = f"{name}: expected a float32 tensor of one element"
    if not isinstance(factor, torch.Tensor):
        got = "None" if factor is None else type(factor).__name__
        raise TypeError(f"{wanted}, got {got}; pass torch.empty(()) as the third part")
    memory = plain(factor, name)
    _refuse_negated(factor, name)
    if factor.dtype != torch.float32:
        raise TypeError(f"{wanted}, got {describe(factor)}")
    if factor.numel() != 1:
        raise ValueError(f"{wanted}, got {describe(factor)}")
    return memory.detach()


def _refuse_negated(tensor: torch.Tensor, name: str) -> None:
    """Raises TypeError for a tensor whose minus sign is lazy: what it holds is not its memory."""
    if tensor.is_neg():
        raise TypeError(f"{name}: expected a tensor without lazy negation; pass a new tensor")


def _scale_shape(
    fmt: WeightFormat, scales: torch.Tensor | None, rows: int, columns: int
) -> tuple[int, int]:
    """Returns the shape of a buffer's scales if the format allows it, else the usual one."""
    if isinstance(scales, torch.Tensor) and scales.dim() == 2:
        fewer = scales.shape[1]
        if fmt.groups_vary and group_of(columns, fewer, fmt.group_size):
            return rows, fewer
        if fmt.blocks and tuple(scales.shape) == (rows, 1):
            return rows, 1
    return (-(-rows // BLOCK) if fmt.blocks else rows), -(-columns // fmt.group_size)


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
    _refuse_negated(tensor, name)
    if memory.dtype not in accepted:
        expected = " or ".join(dtype_name(dtype) for dtype in accepted)
        raise TypeError(f"{name}: expected {expected}, got {describe(memory)}")
    columns = -(-row_bits // (8 * memory.itemsize))
    require_shape(memory.shape, (rows, columns), name)
    row_stride, stride = memory.stride()
    if (columns > 1 and stride != 1) or (rows > 1 and row_stride < columns):
        raise ValueError(
            f"{name}: expected rows that are contiguous and do not overlap, got strides "
            f"{list(memory.stride())}; pass a contiguous tensor and copy from it"
        )
    return memory
