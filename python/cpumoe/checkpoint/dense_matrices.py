"""Quantized matrices of dense layers, as a checkpoint stores them.

A matrix is a few tensors, which its kinds of tensors tell apart:

- FP8: weight float8_e4m3fn ``[N, K]``, and a scale, weight_scale_inv or weight_scale. The scale is
  ``[ceil(N/128), ceil(K/128)]``, ``[N, 1]`` or one number, of which each row gets a copy.
- INT4: weight_packed int32 ``[N, K/8]`` and weight_scale ``[N, K/group]``.
- MXFP4: weight_packed uint8 ``[N, K/2]`` and weight_scale uint8 (E8M0) ``[N, K/32]``.
- NVFP4: weight_packed uint8 ``[N, K/2]``, weight_scale float8_e4m3fn ``[N, K/16]``, and
  weight_global_scale, a float32 number that divides all weights.

The readers of experts (`fp8`, `compressed_tensors`) name the sources.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch

from cpumoe.checkpoint.header import TORCH_DTYPES
from cpumoe.checkpoint.shards import SafetensorsFolder
from cpumoe.formats import WEIGHT_FORMATS, QuantizedMatrix
from cpumoe.formats.quantized_matrix import BLOCK


class _Form(NamedTuple):
    """The tensors of a matrix in one format: their kinds, and the dtypes that tell formats apart.

    Attributes:
        format: the format's name.
        codes: the kind of the codes.
        dtype: the dtype of the codes.
        scales: the kind of the scales.
        divisor: the kind of a number that divides all weights; None: there is none.
    """

    format: str
    codes: str
    dtype: torch.dtype
    scales: str
    divisor: str | None = None


_FORMS = (
    _Form("fp8", "weight", torch.float8_e4m3fn, "weight_scale_inv"),
    _Form("fp8", "weight", torch.float8_e4m3fn, "weight_scale"),
    _Form("int4", "weight_packed", torch.int32, "weight_scale"),
    _Form("mxfp4", "weight_packed", torch.uint8, "weight_scale"),
    _Form("nvfp4", "weight_packed", torch.uint8, "weight_scale", "weight_global_scale"),
)
# Repeats the sizes, or scales activations, which are not quantized.
_IDLE = {"weight_shape", "activation_scale", "input_scale", "input_global_scale"}
# The order of a matrix' inputs, if it is not theirs.
_ORDER = "weight_g_idx"


class StoredMatrix(NamedTuple):
    """A dense layer's matrix as views of the mapped checkpoint, and its format's name."""

    matrix: QuantizedMatrix
    format: str


def stored_matrix(
    folder: SafetensorsFolder, tensors: Mapping[str, str], shape: tuple[int, int]
) -> StoredMatrix | None:
    """Returns a dense layer's matrix without reading its weights; None: its form is not known.

    Args:
        folder: the checkpoint.
        tensors: the names of the layer's tensors by their kinds, the bias excepted.
        shape: N and K of the weights.

    Raises:
        CheckpointError: a number that divides weights is not positive and finite.
        FileNotFoundError, OSError, ValueError: see `SafetensorsFolder.tensor`.
    """
    kinds = tensors.keys() - _IDLE
    for form in _FORMS:
        if kinds == {form.codes, form.scales, form.divisor} - {None}:
            found = _matrix(folder, tensors, form, shape)
            if found is not None:
                return StoredMatrix(found, form.format)
    return None


def has_known_blocks(quantization: Mapping[str, Any]) -> bool:
    """Whether all blocks of which a quantization_config speaks are 128 x 128 weights.

    A scale's shape alone does not tell blocks of 120 x 120 from these.
    """
    blocks = [quantization.get("weight_block_size")]
    groups = quantization.get("config_groups")
    if isinstance(groups, Mapping):
        weights = (g.get("weights") for g in groups.values() if isinstance(g, Mapping))
        blocks += [w.get("block_structure") for w in weights if isinstance(w, Mapping)]
    return all(block is None or list(block) == [BLOCK, BLOCK] for block in blocks)


def _matrix(
    folder: SafetensorsFolder, tensors: Mapping[str, str], form: _Form, shape: tuple[int, int]
) -> QuantizedMatrix | None:
    fmt = WEIGHT_FORMATS[form.format]
    n, k = shape
    codes = _tensor(folder, tensors[form.codes])
    scales = _tensor(folder, tensors[form.scales])
    if codes is None or scales is None or scales.dtype not in fmt.scale_dtypes:
        return None
    if codes.dtype != form.dtype:
        return None
    width = -(-k * fmt.code_bits // (8 * codes.itemsize))
    if not fmt.takes_k(k) or tuple(codes.shape) != (n, width):
        return None
    if f"{tensors[form.codes].rpartition('.')[0]}.{_ORDER}" in folder:
        return None
    if fmt.blocks and scales.numel() == 1 and (scales.dim() < 2 or n > BLOCK or k > BLOCK):
        scales = scales.reshape(1, 1).repeat(n, 1)
    factor = None
    if form.divisor is not None:
        number = _tensor(folder, tensors[form.divisor])
        if number is None or number.dtype != torch.float32 or number.numel() != 1:
            return None
        factor = number.reshape(()).reciprocal()
        if not (factor.isfinite() and number.isfinite() and number > 0):
            return None
    name = tensors[form.codes]
    # The last word of codes may have some behind the row's last.
    codes = fmt.normalize_codes(codes, name)[:, : k * fmt.code_bits // 8]
    stored = fmt.normalize_scales(scales, name) if scales.dim() == 2 else None
    try:
        fmt.check_shapes(codes, stored, name)
    except (TypeError, ValueError):
        return None
    return QuantizedMatrix(codes, stored, factor, name=name)


def _tensor(folder: SafetensorsFolder, name: str) -> torch.Tensor | None:
    """Returns a tensor as a view of the file; None: PyTorch has no such dtype."""
    info = folder.info(name)
    dtype = TORCH_DTYPES.get(info.dtype)
    return None if dtype is None else folder.tensor(name, (dtype,), info.shape)
